"""Several packed matrices in one launch of the few-column kernel, run without a GPU by `ptx_emulator.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda (extra cu12 or cu13)")

from emulated import EmulatedArray, EmulatedDevice
from gpu_cases import DTYPES, random_packed

from shflnb.formats import ShflBWMatrix
from shflnb.kernels import skinny_parts
from shflnb.kernels.operands import check_bias
from shflnb.kernels.registry import all_specs
from shflnb.kernels.skinny_config import choose_config, config_of, stores_directly
from shflnb.kernels.skinny_parts import Part, Parts, part_queue
from shflnb.kernels.skinny_plan import kernel_spec, launch_skinny
from shflnb.reference import judge


def packed_parts(sizes: Sequence[int], k: int, v: int, dtype: str, *, integers: bool) -> list[ShflBWMatrix]:
    """Matrices of these numbers of rows, with unequal groups and an empty one."""
    found = []
    for seed, m in enumerate(sizes):
        lengths = [(77 * seed + 130 * g) % (k + 1) for g in range(-(-m // v))]
        found.append(random_packed(m, k, v, lengths, dtype, seed, integers=integers))
    return found


def compute(device: EmulatedDevice, parts: Parts, x: EmulatedArray, sizes: Sequence[int], is_feature: bool
            ) -> list[np.ndarray]:  # fmt: skip
    """The results (n, rows) of all parts."""
    n = x.shape[0]
    road = parts.road(n, is_feature, 0)
    dtype = parts.dtype
    out, work = device.empty(1, parts.m * n, dtype), device.empty(1, max(1, road.work_values[0]), dtype)
    launch_skinny(road, 0, x.address, out.address, (work.address, 0), 0, 0)
    assert device.machine.memory.unwritten_reads == 0
    flat, results, first = device.read(out)[0], [], 0
    for m in sizes:
        piece = flat[first * n : (first + m) * n]
        results.append(piece.reshape(m, n).T if is_feature else piece.reshape(n, m))
        first += m
    return results


CASES = [
    # v, n, sizes, k, multiprocessors, ranks, layout of the results, whether the product stitches token-major x
    (64, 1, (128, 69, 64), 200, 3, 2, "token", True),
    (64, 5, (69, 3, 130), 150, 1, 1, "token", True),
    (32, 8, (64, 40), 200, 8, 4, "feature", True),
    (64, 16, (128, 69, 64), 140, 4, 2, "feature", False),
    (32, 16, (33, 64, 70), 130, 1, 1, "token", False),
    (128, 40, (128, 130), 140, 2, 1, "feature", False),
    (64, 33, (70, 64), 130, 4, 2, "token", False),
]  # fmt: skip


@pytest.mark.parametrize(("v", "n", "sizes", "k", "sms", "ranks", "layout", "token_major"), CASES)
def test_small_integers_are_exact(
    v: int, n: int, sizes: tuple[int, ...], k: int, sms: int, ranks: int, layout: str, token_major: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Unequal and empty groups, cut last groups in the middle, one to four ranks, x turned before it or not."""
    dtype = "float16" if v == 64 else "bfloat16"
    matrices = packed_parts(sizes, k, v, dtype, integers=True)
    config = config_of(v, n, ranks, dtype, 1, token_major=token_major, parts=True)
    monkeypatch.setattr(skinny_parts, "choose_config", lambda *_, **__: config)
    monkeypatch.setattr(skinny_parts, "takes_tokens", lambda *_: token_major)
    device = EmulatedDevice(n, sm_count=sms)
    parts = Parts(device, [Part(packed) for packed in matrices], None, 0)  # type: ignore[arg-type]
    x = np.random.default_rng(n).integers(-2, 3, (n, k)).astype(DTYPES[dtype])
    results = compute(device, parts, device.array(x), sizes, layout == "feature")
    for packed, y in zip(matrices, results, strict=True):
        want = x.astype(np.float64) @ packed.to_dense().astype(np.float64).T
        assert (y.astype(np.float64) == want).all()
    names = [config.name] if token_major else ["shflnb_skinny_turn_in", config.name]
    assert device.launched == names and f"_r{ranks}_" in config.name and config.name.endswith("_parts_plain")


@pytest.mark.parametrize(("n", "ranks", "is_feature"), [(3, 2, False), (16, 1, True)])
def test_each_part_has_its_own_bias_and_choice_of_activation(
    n: int, ranks: int, is_feature: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, k, dtype = (70, 64, 5), 120, "float16"
    matrices = packed_parts(sizes, k, 64, dtype, integers=False)
    config = config_of(64, n, ranks, dtype, 1, parts=True, token_major=n == 3)
    monkeypatch.setattr(skinny_parts, "choose_config", lambda *_, **__: config)
    monkeypatch.setattr(skinny_parts, "takes_tokens", lambda *_: n == 3)
    device = EmulatedDevice(n, sm_count=4)
    rng = np.random.default_rng(n)
    biases = [rng.standard_normal(70, np.float32), None, rng.standard_normal(5).astype(np.float16)]
    activated = (True, False, True)
    given = []
    for packed, bias, is_activated in zip(matrices, biases, activated, strict=True):
        at = check_bias(None if bias is None else device.array(bias), packed, 0)
        given.append(Part(packed, *at, is_activated))
    x = (rng.standard_normal((n, k)) * 0.5).astype(np.float16)
    parts = Parts(device, given, "silu", 0)  # type: ignore[arg-type]
    for packed, bias, is_activated, y in zip(
        matrices, biases, activated, compute(device, parts, device.array(x), sizes, is_feature), strict=True
    ):
        verdict = judge(y.T, packed, np.ascontiguousarray(x.T), bias, "silu" if is_activated else None, None)
        assert verdict.holds, verdict


def test_a_queue_has_every_group_once() -> None:
    tiles = [(np.array([0, 3, 4]), np.array([3, 1, 5])), (np.array([0]), np.array([2])), (np.array([7, 0]), [1, 7])]
    addresses = [(1 << 40, 256), (2 << 40, 512), (3 << 40, (1 << 33) + 768)]
    queue = part_queue([(f, np.asarray(c)) for f, c in tiles], addresses, 4)
    found = {}
    for record in queue.reshape(-1, 8):
        if record[2]:
            group, first, count, part = (int(word) for word in record[:4])
            assert (part, group) not in found
            found[part, group] = (first, count)
            assert tuple(record[4:].view(np.uint64)) == addresses[part]
    assert found == {(p, g): (f, c) for p, own in enumerate(tiles) for g, (f, c) in enumerate(zip(*own, strict=True))}


def test_what_is_chosen_is_in_the_registry() -> None:
    known = {spec.key for spec in all_specs("sm_90a")}
    for v in (32, 64, 128):
        for n, token_major in ((1, True), (16, True), (16, False), (17, False), (32, False), (64, False)):
            for groups, tiles in ((2, 2), (16, 256), (96, 1536), (96, 5000), (448, 7168), (448, 3584)):
                config = choose_config(v, n, groups, tiles, "float16", 132, token_major=token_major, parts=True)
                assert kernel_spec(config.with_epilogue("silu")).key in known
    assert stores_directly(9000, 16, parts=True) and not stores_directly(9000, 16)
    assert not stores_directly(11000, 16, parts=True) and stores_directly(28672, 8, parts=True)
