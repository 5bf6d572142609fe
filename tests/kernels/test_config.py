"""Config: what it refuses, and its sizes against sums written out here."""

from __future__ import annotations

import dataclasses

import pytest

from shflnb.errors import ArgumentError
from shflnb.kernels.config import ARCHITECTURES, EPILOGUES, SMEM_LIMIT, Config, Problem, ceil_div, smem_limit
from shflnb.kernels.select import candidates

SM90 = Config("sm90", 64, 256, 64, 4, team=2)
SM80 = Config("sm80", 64, 128, 32, 4)
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
EVERY = [c for v in (16, 32, 64, 128) for cap in CAPABILITIES for c in candidates(v, "float16", cap)]


@pytest.mark.parametrize(
    ("base", "change", "text"),
    [
        (SM90, {"kernel": "sm70"}, "sm70"),
        (SM90, {"dtype": "float32"}, "float32.*float16 and bfloat16"),
        (SM90, {"epilogue": "tanh"}, "tanh"),
        (SM90, {"v": 48}, "v is 48; expected 16, 32, 64 or 128"),
        (SM90, {"tile_k": 48}, "tile_k = 48"),
        (SM90, {"stages": 1}, "stages = 1"),
        (SM90, {"tile_k": 16}, "tile_k = 16"),
        (SM90, {"tile_n": 80}, "tile_n = 80"),
        (SM90, {"tile_n": 192}, "inside an atom of 64"),
        (SM90, {"v": 32, "tile_n": 192, "alternate": True}, "inside an atom of 64"),
        (SM90, {"producers": 3}, "producers = 3"),
        (SM90, {"stages": 6}, "bytes of shared memory; at most"),
        (SM90, {"v": 128, "tile_n": 512, "tile_k": 32}, "accumulators"),
        (SM90, {"v": 32, "tile_n": 64}, "v <= 32"),
        (SM90, {"producers": 2, "tile_n": 512, "tile_k": 32}, "128 accumulators a thread with four warpgroups"),
        (SM90, {"alternate": True, "tile_n": 512, "tile_k": 32}, "tiles in turns need v <= 64 and tile_n <= 256"),
        (SM90, {"alternate": True, "v": 128, "tile_n": 128}, "tiles in turns need v <= 64"),
        (SM80, {"tile_n": 512}, "tile_n = 512"),
        (SM80, {"tile_n": 256, "tile_k": 64, "stages": 8}, "bytes of shared memory; at most"),
    ],
)
def test_bad_tilings_are_refused(base: Config, change: dict[str, object], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        dataclasses.replace(base, **change)  # type: ignore[arg-type]


def test_configs_are_frozen_hashable_and_named_apart() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SM90.v = 128  # type: ignore[misc]
    tilings = set(EVERY)
    assert len({config.name for config in tilings}) == len(tilings)
    names = {config.with_epilogue(e).name for config in tilings for e in EPILOGUES}
    assert len(names) == len(tilings) * len(EPILOGUES)
    assert SM90.with_epilogue("plain") is SM90
    assert eval(repr(SM90)) == SM90  # the compile key says everything


@pytest.mark.parametrize("config", sorted(set(EVERY), key=lambda c: c.name), ids=lambda c: c.name)
def test_sizes_against_sums_written_out(config: Config) -> None:
    x_values, w_values = config.tile_k * config.tile_n, config.tile_k * config.v
    atoms = -(-config.tile_n // 64) if config.kernel == "sm90" else config.tile_n / 64
    assert config.stage_bytes == config.tile_k * 128 * atoms + 2 * w_values
    outputs = config.v * config.tile_n
    if config.kernel == "sm80":
        assert config.threads % 32 == 0 and config.threads <= 1024
        assert config.accumulators * config.threads == outputs
        assert config.smem_bytes >= config.stages * config.stage_bytes
        chunks = x_values * 2 // 16
        assert chunks % config.threads == 0, "every thread copies as many chunks of x"
        # each warp's 16 rows of results, 16 bytes longer than the row, fit the ring that they reuse
        row = 2 * (config.accumulators * 32 // min(config.v, 64)) + 16
        assert config.staging_bytes == config.threads // 32 * 16 * row <= config.smem_bytes
    else:
        consumers = 256
        assert config.threads == consumers + 128 * config.producers
        assert config.accumulators * (consumers // 2 if config.alternate else consumers) == outputs
        # all registers that the warpgroups take fit what the launch gave: a multiple of 8 a thread
        launched = 65536 // config.threads // 8 * 8 * config.threads
        producer, consumer = config.registers
        assert 128 * (producer * config.producers + 2 * consumer) <= launched
        assert config.accumulators <= 128
        producing = 32 * config.team
        assert config.head_n in (64, 128, 256, 512) and config.tile_n < 2 * config.head_n
        assert config.head_n + config.tail_n == config.tile_n
        assert config.copies_per_stage * producing == config.tile_k * config.head_n // 8
        assert config.tail_copies * producing == config.tile_k * config.tail_n // 8, "no thread is idle"
        assert config.teams * config.team == 4 * config.producers
        # barriers: two of 8 bytes a stage, in 256 bytes; the ids of 8 stages of each producer warp, 4 bytes each
        assert 2 * 8 * config.stages + 2 * 8 * config.alternate <= 256
        rows_of_a_warp = max(1, config.tile_n // 256) * config.tile_k // config.team
        assert config.ids_bytes == 4 * config.producers * 8 * rows_of_a_warp * 4
        before = config.stages * config.stage_bytes + 256 + config.ids_bytes
        assert config.smem_bytes == before + config.staging_bytes
        assert before % 16 == 0, "staging is read 16 bytes at a time"
    assert config.smem_bytes <= SMEM_LIMIT[90]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_candidates_fit_their_device(capability: tuple[int, int]) -> None:
    limit = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}[capability] * 1024
    assert smem_limit(capability) == limit
    for v in (16, 32, 64, 128):
        found = candidates(v, "bfloat16", capability)
        assert found and all(c.v == v and c.dtype == "bfloat16" and c.smem_bytes <= limit for c in found)
        assert any(c.kernel == "sm80" for c in found)
        assert any(c.kernel == "sm90" for c in found) == (capability[0] == 9)
        if capability in ((9, 0), (10, 0)):
            held = 228 * 1024  # of a multiprocessor; each block takes 1 KiB more than it asks for
            assert all(c.blocks_per_sm * (c.smem_bytes + 1024) <= held for c in found), (
                "as many blocks as were promised"
            )


def test_unknown_devices_get_the_least_shared_memory() -> None:
    assert smem_limit((13, 7)) == 99 * 1024
    assert len(ARCHITECTURES) == len(set(ARCHITECTURES))


def test_problem() -> None:
    problem = Problem(m=130, k=100, n=7, v=64, dtype="float16", columns=60, longest=30)
    assert problem.groups == 3
    assert problem.density == pytest.approx(60 / 300)
    assert problem.flops == 2 * 60 * 64 * 7
    assert [ceil_div(a, 8) for a in (0, 1, 8, 9)] == [0, 1, 1, 2]
