"""The compiler's disk cache under every kind of damage, its fallback and its errors; most with a faked compiler."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import stat
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shflnb.errors import DeviceError, MissingDependencyError
from shflnb.kernels import compiler, disk_cache, launch

CODE = b"\x7fELF" + bytes(range(256)) * 40


class Builds:
    """Counts what is compiled and assembled; the machine code is a constant."""

    def __init__(self) -> None:
        self.compiled = 0

    def build(self, key: str = "kernel", arch: str = "sm_80") -> compiler.Cubin:
        return compiler.build(key, lambda: None, list, arch, "name", 128)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Builds:
    found = Builds()

    def compile_ptx(*_: Any) -> str:
        found.compiled += 1
        return "ptx"

    monkeypatch.setenv("SHFLNB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_ptx", compile_ptx)
    monkeypatch.setattr(compiler, "_assemble", lambda ptx, arch: CODE)
    return found


def only_file(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 1, files
    return files[0]


def test_the_second_build_comes_from_the_cache(builds: Builds, tmp_path: Path) -> None:
    first, second = builds.build(), builds.build()
    assert (first.from_cache, second.from_cache, builds.compiled) == (False, True, 1)
    assert (second.name, second.arch, second.code) == ("name", "sm_80", CODE)
    assert only_file(tmp_path).suffix == ".cubin"


def test_key_and_architecture_have_files_of_their_own(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    builds.build()
    builds.build(key="other")
    builds.build(arch="sm_90a")
    assert builds.compiled == 3
    monkeypatch.setattr(compiler, "_fingerprint", lambda: "other tools or sources")
    builds.build()
    assert builds.compiled == 4


def test_a_driver_that_refuses_the_assembled_code_gets_the_linked(
    builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ptxas on PATH may be newer than the driver; both codes are cached, and an error names both refusals."""
    core = pytest.importorskip("cuda.core")
    refused: set[bytes] = {CODE}
    linked = CODE + b" by the linker"

    class Code:
        def __init__(self, code: bytes) -> None:
            self.code = code

        def get_kernel(self, name: str) -> str:
            if self.code in refused:
                raise RuntimeError(f"no image for this device: {len(self.code)} bytes")
            return f"{name} of {len(self.code)} bytes"

    monkeypatch.setattr(core, "ObjectCode", SimpleNamespace(from_cubin=Code))
    monkeypatch.setattr(compiler, "_link", lambda ptx, arch: linked)
    spec = launch.KernelSpec("key", "name", "copy", lambda: None, 1, 128)
    monkeypatch.setattr(launch.KernelSpec, "signature", lambda self: [])
    for compiled in (2, 2):
        cubin, kernel = launch.load_cubin(spec, "sm_80")
        assert cubin.code == linked and kernel == f"name of {len(linked)} bytes" and builds.compiled == compiled
    refused.add(linked)
    with pytest.raises(DeviceError, match=rf"{len(CODE)} bytes; linked anew: no image .* {len(linked)} bytes"):
        launch.load_cubin(spec, "sm_80")
    refused.clear()
    assert launch.load_cubin(spec, "sm_80")[0].code == CODE


def with_checksum(body: bytes) -> bytes:
    return compiler._MAGIC + hashlib.sha256(body).digest() + body


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda blob: b"",
    "magic only": lambda blob: blob[: len(compiler._MAGIC)],
    "cut in the checksum": lambda blob: blob[: len(compiler._MAGIC) + 7],
    "cut in the head": lambda blob: blob[: len(compiler._MAGIC) + 40],
    "cut in the code": lambda blob: blob[:-1],
    "longer": lambda blob: blob + b"\0",
    "other magic": lambda blob: b"shflnb-cubin-0\n" + blob[len(compiler._MAGIC) :],
    "a flipped bit in the code": lambda blob: blob[:-5] + bytes([blob[-5] ^ 1]) + blob[-4:],
    "a flipped bit in the checksum": lambda blob: blob[:20] + bytes([blob[20] ^ 128]) + blob[21:],
    "noise": lambda blob: os.urandom(len(blob)),
    "right checksum, no line end": lambda blob: with_checksum(b'{"name": "name"}'),
    "right checksum, no JSON": lambda blob: with_checksum(b"name\n" + CODE),
    "right checksum, no UTF-8": lambda blob: with_checksum(b"\xff\xfe\n" + CODE),
    "right checksum, a list": lambda blob: with_checksum(b"[1]\n" + CODE),
    "right checksum, no name": lambda blob: with_checksum(b"{}\n" + CODE),
    "right checksum, a number as name": lambda blob: with_checksum(b'{"name": 3}\n' + CODE),
    "right checksum, no code": lambda blob: with_checksum(b'{"name": "name"}\n'),
    "right checksum, code that is none": lambda blob: with_checksum(b'{"name": "name"}\n<html>'),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_means_a_recompute(what: str, builds: Builds, tmp_path: Path) -> None:
    builds.build()
    path = only_file(tmp_path)
    path.write_bytes(DAMAGE[what](path.read_bytes()))
    again = builds.build()
    assert (again.from_cache, again.code, builds.compiled) == (False, CODE, 2)
    assert builds.build().from_cache  # and the file is whole again


def test_a_directory_in_the_place_of_the_file(builds: Builds, tmp_path: Path) -> None:
    builds.build()
    path = only_file(tmp_path)
    path.unlink()
    path.mkdir()
    assert builds.build().code == CODE
    assert builds.build().code == CODE
    assert [p for p in path.parent.iterdir() if p != path] == []  # no temporary file stays behind


def test_a_file_in_the_place_of_the_directory(builds: Builds, tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("in the way")
    assert builds.build().code == CODE
    assert builds.build().from_cache is False


def test_a_cache_that_cannot_be_written(builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("read-only")

    monkeypatch.setattr(disk_cache.tempfile, "mkstemp", refuse)
    assert (builds.build().code, builds.build().code, builds.compiled) == (CODE, CODE, 2)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user that permissions bind")
def test_a_read_only_directory(builds: Builds, tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert (builds.build().code, builds.compiled) == (CODE, 1)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_disk_that_is_full(builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", full)
    assert builds.build().code == CODE
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def write_and_read(job: tuple[str, int]) -> int:
    """In a process of its own: many writes of one entry, with reads between; returns how many reads were wrong."""
    folder, number = job
    os.environ["SHFLNB_CACHE_DIR"] = folder
    path = compiler._cache_path("shared", "sm_80")
    wrong = 0
    for turn in range(60):
        compiler._write_cache(path, compiler.Cubin("name", "sm_80", CODE * (1 + (turn + number) % 5)))
        found = compiler._read_cache(path, "sm_80")
        wrong += found is None or len(found.code) % len(CODE) != 0
    return wrong


def test_processes_write_the_same_entry_at_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(write_and_read, [(str(tmp_path), number) for number in range(4)])) == [0] * 4
    only_file(tmp_path)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHFLNB_CACHE_DIR", str(tmp_path))
    assert disk_cache.cache_dir() == tmp_path / "kernels"
    monkeypatch.delenv("SHFLNB_CACHE_DIR")
    assert "shflnb" in disk_cache.cache_dir().parts


def test_who_assembles(monkeypatch: pytest.MonkeyPatch) -> None:
    """ptxas where it is there and takes the PTX, else the linker; an error names what both said."""

    def refuse(ptx: str, arch: str) -> bytes:
        raise RuntimeError("unsupported PTX version\nand more")

    def refused(ptx: str, arch: str) -> tuple[bytes, str]:
        raise DeviceError(f"ptxas refused the kernel for {arch}: too old")

    monkeypatch.setattr(compiler, "find_tool", lambda tool: "/bin/ptxas")
    monkeypatch.setattr(compiler, "ptxas_assemble", lambda ptx, arch: (b"ptxas for " + arch.encode(), ""))
    monkeypatch.setattr(compiler, "_link", lambda ptx, arch: b"linked for " + arch.encode())
    assert compiler._assemble("ptx", "sm_90a") == b"ptxas for sm_90a"
    assert compiler.assembler() == {"used": "ptxas", "problem": None}
    monkeypatch.setattr(compiler, "ptxas_assemble", refused)
    assert compiler._assemble("ptx", "sm_90a") == b"linked for sm_90a"
    assert compiler.assembler() == {"used": "cuda.core", "problem": "ptxas refused the kernel for sm_80: too old"}
    monkeypatch.setattr(compiler, "find_tool", lambda tool: None)
    assert compiler._assemble("ptx", "sm_90a") == b"linked for sm_90a"
    assert compiler.assembler()["used"] == "cuda.core" and "not found" in str(compiler.assembler()["problem"])
    monkeypatch.setattr(compiler, "_link", refuse)
    with pytest.raises(DeviceError, match=r"(?s)sm_90a: ptxas was not found.*unsupported PTX.*shflnb\[cu13\]"):
        compiler._assemble("ptx", "sm_90a")
    assert compiler.assembler()["used"] is None


def test_targets() -> None:
    assert compiler.arch_of((9, 0), "sm90") == "sm_90a"
    assert compiler.arch_of((9, 0), "sm80") == "sm_90"
    assert compiler.arch_of((12, 0), "transpose") == "sm_120"


def test_ptxas_errors_name_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "find_tool", lambda tool: None)
    with pytest.raises(MissingDependencyError, match="nvidia-cuda-nvcc"):
        compiler.ptxas_assemble("", "sm_80")
    monkeypatch.undo()
    if compiler.find_tool("ptxas") is None:
        pytest.skip("needs ptxas (extra cu13)")
    with pytest.raises(DeviceError, match="ptxas refused the kernel for sm_80"):
        compiler.ptxas_assemble("this is no PTX", "sm_80")


# --- the real tools --------------------------------------------------------------------------------------------------
def empty_kernel() -> Any:
    def kernel(address):
        return

    return kernel


def build_for_real(folder: str) -> tuple[str, bytes, bool]:
    os.environ["SHFLNB_CACHE_DIR"] = folder
    from numba.cuda import types

    compiler._assemble = lambda ptx, arch: compiler.ptxas_assemble(ptx, arch)[0]
    cubin = compiler.build("empty", empty_kernel, lambda: [types.uint64], "sm_80", "empty_kernel", 32)
    return cubin.name, cubin.code, cubin.from_cache


@pytest.mark.skipif(compiler.find_tool("ptxas") is None, reason="needs ptxas (extra cu13)")
def test_two_processes_build_the_same_kernel_and_a_third_finds_it(tmp_path: Path) -> None:
    pytest.importorskip("numba.cuda")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        built = list(pool.map(build_for_real, [str(tmp_path)] * 2))
        name, code, from_cache = pool.submit(build_for_real, str(tmp_path)).result()
    assert {item[0] for item in built} == {name} == {"empty_kernel"}
    assert code.startswith(b"\x7fELF") and b"empty_kernel" in code
    assert from_cache


@pytest.mark.parametrize("collects", [True, False])
def test_compiling_leaves_numba_and_the_collector_as_they_were(collects: bool) -> None:
    pytest.importorskip("numba.cuda")
    from numba.cuda import dispatcher, types

    before = dispatcher.get_current_device
    if not collects:
        gc.disable()
    try:
        ptx = compiler.compile_ptx(empty_kernel(), [types.uint64], "sm_90a", "some_name", 64, 2)
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    assert dispatcher.get_current_device is before
    assert ".entry some_name(" in ptx and ".target sm_90a" in ptx
    assert ".maxntid 64" in ptx and ".minnctapersm 2" in ptx
