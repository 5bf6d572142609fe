"""Every GPU kernel once, on tiny odd shapes, for compute-sanitizer; exits with 1 when a result is wrong.

    compute-sanitizer --report-api-errors no --tool memcheck  --error-exitcode 9 python tests/kernels/sanitize.py
    compute-sanitizer --report-api-errors no --tool racecheck --error-exitcode 9 python tests/kernels/sanitize.py
    compute-sanitizer --report-api-errors no --tool initcheck --error-exitcode 9 python tests/kernels/sanitize.py
    compute-sanitizer --report-api-errors no --tool synccheck --error-exitcode 9 python tests/kernels/sanitize.py

Run it once without the tool first: that fills the cache of compiled kernels (in several processes with --prebuild).
With "tiles", "few", "parts" or "moves" as arguments only these: kernels for more than 64 columns, fewer, and several
matrices at once, and transposes. The calls as the selection takes them come without arguments only. --share=1/4 takes
every fourth config from the first on: racecheck of all tiles takes longer than many a machine is lent for. Several
processes may share a GPU: all four tools, racecheck of tiles in eight shares, took 90 s at once on an H100.
torch only moves memory here; references come from NumPy, so that nearly all launches under the tool are ours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_cases as cases

from shflnb.kernels import device_call, skinny_parts, skinny_plan
from shflnb.kernels.epilogue import HAS_BIAS
from shflnb.kernels.launch import device_context
from shflnb.kernels.skinny_select import few_candidates, parts_candidates
from shflnb.kernels.spmm_device import device_linear, device_matmul, device_transpose
from shflnb.reference import judge


def on_device(a: np.ndarray) -> Any:
    """A device copy in an allocation of its own, so that a stray access leaves it."""
    return (
        torch.from_numpy(a.view(np.int16)).cuda().view(torch.bfloat16 if str(a.dtype) == "bfloat16" else torch.float16)
    )


def host(t: Any, dtype: str) -> np.ndarray:
    return t.cpu().contiguous().view(torch.int16).numpy().view(cases.DTYPES[dtype])


def run_config(config: Any, number: int) -> list[str]:
    """A plain product and one with everything in the epilogue; n cuts a chunk, m a group, k a tile."""
    wrong = []
    rng = np.random.default_rng(number)
    n_cut = config.head_n + 13 if getattr(config, "tail_n", 0) else 13  # into the tails of rows that have one
    for m, k, n in ((config.v + 3, 70, n_cut), (2, 5, 8)):
        packed = cases.random_packed(m, k, config.v, dtype=config.dtype, seed=number)
        x, residual, bias = (rng.standard_normal(s).astype(cases.DTYPES[config.dtype]) for s in ((k, n), (m, n), (m,)))
        y = device_matmul(packed, on_device(x), config=config)
        verdict = judge(host(y, config.dtype), packed, x)
        if not verdict.holds:
            wrong.append(f"{config.name} {m} x {k} x {n}: {verdict}")
        activation = ("gelu", "relu", "silu", None)[number % 4]
        extra = {"bias": on_device(bias), "residual": on_device(residual)}
        y = device_matmul(packed, on_device(x), activation=activation, config=config, **extra)
        verdict = judge(host(y, config.dtype), packed, x, bias, activation, residual)
        if not verdict.holds:
            wrong.append(f"{config.name} {activation} {m} x {k} x {n}: {verdict}")
    return wrong


def run_calls() -> list[str]:
    """What the selection takes by itself for few and many columns, token-major, strided and misaligned arrays."""
    wrong = []
    rng = np.random.default_rng(0)
    for v in (16, 32, 64, 128):
        for dtype in cases.DTYPE_NAMES:
            for n in (1, 2, 7, 8, 16, 33, 64, 65, 200):
                packed = cases.random_packed(v + 5, 77, v, dtype=dtype, seed=n)
                x = rng.standard_normal((77, n)).astype(cases.DTYPES[dtype])
                results = {
                    "matmul": device_matmul(packed, on_device(x)),
                    "linear": device_linear(on_device(x.T.copy()), packed).T,
                }
                room = np.zeros(77 * n + 1, x.dtype)
                room[1:] = x.reshape(-1)
                results["misaligned"] = device_matmul(packed, on_device(room)[1:].view(77, n))
                for name, y in results.items():
                    verdict = judge(host(y, dtype), packed, x)
                    if not verdict.holds:
                        wrong.append(f"{name} v{v} {dtype} n {n}: {verdict}")
    return wrong


def few_configs() -> list[Any]:
    """The few-column kernels in float16: every v, number of ranks, room for tokens and layout of x."""
    return [config for v in (16, 32, 64, 128) for n in (16, 32, 64) for config in few_candidates(v, n, "float16")]


def run_few(config: Any, number: int) -> list[str]:
    """Three groups, one of them empty, for one or two clusters; n cuts a chunk. In turns with another matrix."""
    rng = np.random.default_rng(number)
    n = 8 * config.chunks - 3
    packed = cases.random_packed(2 * config.v + 3, 150, config.v, [150, 0, 70], seed=number)
    other = cases.random_packed(config.v, 150, config.v, [99], seed=number)
    x = rng.standard_normal((150, n)).astype(np.float16)
    results = {}
    with mock.patch.object(device_call, "stores_directly", return_value=number % 2 == 0):
        if not config.token_major:
            results["matmul"] = device_matmul(packed, on_device(x), config=config)
        tokens = on_device(x.T.copy())
        for _ in range(2):  # the second time each has the other's weights fetched ahead
            device_linear(tokens, other, config=config)
            results["linear"] = device_linear(tokens, packed, config=config).T
    verdicts = {name: judge(host(y, "float16"), packed, x) for name, y in results.items()}
    return [f"{config.name} {name}: {verdict}" for name, verdict in verdicts.items() if not verdict.holds]


def parts_configs() -> list[Any]:
    """What products of several matrices take: v, ranks and layout of x."""
    return [config for v in (32, 64, 128) for n in (16, 64) for config in parts_candidates(v, n, "float16")]


def run_parts(config: Any, number: int) -> list[str]:
    """Three matrices, the first with a bias and an activation, in both layouts of the result."""
    rng, context, wrong = np.random.default_rng(number), device_context(0), []
    n, k, stream = 8 * config.chunks, 150, torch.cuda.current_stream().cuda_stream
    matrices = [cases.random_packed(m, k, config.v, seed=m) for m in (config.v + 3, 2 * config.v, 5)]
    x, bias = rng.standard_normal((n, k)).astype(np.float16), rng.standard_normal(config.v + 3).astype(np.float16)
    x_at, bias_at = on_device(x), on_device(bias)
    given = [skinny_parts.Part(matrices[0], bias_at.data_ptr(), HAS_BIAS, True), *map(skinny_parts.Part, matrices[1:])]
    with (
        mock.patch.object(skinny_parts, "choose_config", return_value=config),
        mock.patch.object(skinny_parts, "takes_tokens", return_value=config.token_major),
    ):
        parts = skinny_parts.Parts(context, given, "silu", stream)
        for is_feature in (False, True):
            road = parts.road(n, is_feature, stream)
            out, work = (torch.empty(max(1, size), dtype=torch.float16, device="cuda")
                         for size in (parts.m * n, road.work_values[0]))  # fmt: skip
            skinny_plan.launch_skinny(road, stream, x_at.data_ptr(), out.data_ptr(), (work.data_ptr(), 0), 0, 0)
            y, first = host(out, "float16"), 0
            for matrix, own_bias, activation in zip(matrices, (bias, None, None), ("silu", None, None), strict=True):
                m = matrix.shape[0]
                own = y[first * n : (first + m) * n]
                first += m
                rows = own.reshape(m, n) if is_feature else own.reshape(n, m).T
                verdict = judge(rows, matrix, x.T.copy(), own_bias, activation)
                if not verdict.holds:
                    wrong.append(f"{config.name} feature-major {is_feature}, {m} rows: {verdict}")
    return wrong


def run_moves() -> list[str]:
    """Transposes of whole and cut tiles, of more tiles than one, alone and with an addend, in place too."""
    wrong = []
    rng = np.random.default_rng(7)
    for dtype in cases.DTYPE_NAMES:
        for rows, cols in ((8, 1), (72, 203), (136, 129)):
            kind, shapes = cases.DTYPES[dtype], ((rows, cols), (cols, rows))
            values, others = (rng.standard_normal(shape).astype(kind) for shape in shapes)
            src, addend = on_device(values), on_device(others)
            sums = (values.T.astype(np.float32) + others.astype(np.float32)).astype(kind)
            results = {
                "x": (device_transpose(src), values.T),
                "a result": (device_transpose(src, is_result=True), values.T),
                "a sum": (device_transpose(src, is_result=True, addend=addend), sums),
                "a sum in place": (device_transpose(src, is_result=True, addend=addend, out=addend), sums),
            }
            for name, (y, want) in results.items():
                if not np.array_equal(host(y, dtype).view(np.int16), np.ascontiguousarray(want).view(np.int16)):
                    wrong.append(f"transpose of {name}, {dtype}, {rows} x {cols}")
    return wrong


def share_of(configs: list[Any]) -> list[Any]:
    """Of a list of configs those that --share asks for."""
    given = next((a.removeprefix("--share=") for a in sys.argv[1:] if a.startswith("--share=")), "1/1")
    number, of = (int(part) for part in given.split("/"))
    return configs[number - 1 :: of]


def main() -> int:
    asked = [argument for argument in sys.argv[1:] if not argument.startswith("-")] or [
        "tiles",
        "few",
        "parts",
        "moves",
        "calls",
    ]
    tiles = share_of(cases.configs() + cases.configs("bfloat16") if "tiles" in asked else [])
    few = share_of(few_configs() if "few" in asked else [])
    parts = share_of(parts_configs() if "parts" in asked else [])
    epilogues = {None: "identity", "gelu": "gelu", "relu": "relu", "silu": "silu"}
    if "--prebuild" in sys.argv:
        finished = [c.with_epilogue(epilogues[("gelu", "relu", "silu", None)[i % 4]]) for i, c in enumerate(tiles)]
        cases.prebuild([*tiles, *few, *finished, *(c.with_epilogue("silu") for c in parts)])
    wrong = [text for number, config in enumerate(tiles) for text in run_config(config, number)]
    wrong += [text for number, config in enumerate(few) for text in run_few(config, number)]
    wrong += [text for number, config in enumerate(parts) for text in run_parts(config, number)]
    wrong += run_moves() if "moves" in asked else []
    wrong += run_calls() if "calls" in asked else []
    torch.cuda.synchronize()
    print("\n".join(wrong) or f"all products of {len(tiles) + len(few) + len(parts)} configs are right ({asked})")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
