"""The command line: what it prints, what it writes, its exit codes, and JSON alone on standard output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import shflnb
from shflnb import cli, demo, digits, doctor
from shflnb.machine import CudaDevice, CudaDriver


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `shflnb ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["shflnb", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def shflnb_command(capsys, monkeypatch):
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((100, 70), dtype=np.float32)


def test_version_help_and_unknown_command(shflnb_command) -> None:
    assert shflnb_command("--version")[:2] == (0, f"shflnb {shflnb.__version__}\n")
    code, out, _ = shflnb_command("--help")
    assert code == 0
    assert all(name in out for name in ("demo", "doctor", "prune"))
    assert shflnb_command("prone")[0] == 2


def test_runs_as_a_program() -> None:
    program = (
        "import sys; sys.argv = ['shflnb', 'prune', 'no-such-file.npy', 'out']; from shflnb.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "shflnb: no-such-file.npy is not a file; give a .npy or .safetensors file\n"


# -- prune ----------------------------------------------------------------------------------------------------


def test_prune_npy_writes_what_the_library_finds(shflnb_command, weight, tmp_path: Path) -> None:
    source, target = tmp_path / "w.npy", tmp_path / "w.safetensors"
    np.save(source, weight)
    code, out, err = shflnb_command("prune", source, target, "--sparsity", "0.5", "--block", "32x16", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    expected = shflnb.prune(weight, sparsity=0.5, block=(32, 16))
    packed = shflnb.load(target)
    assert np.array_equal(packed.to_dense(), expected.weight)
    assert packed.block == (32, 16)
    assert report["retained"] == pytest.approx(expected.retained)
    assert report["density"] == packed.density
    assert report["columns_per_group"] == {"least": packed.counts.min(), "most": packed.counts.max()}
    assert report["file_bytes"] == target.stat().st_size
    assert (report["dense_bytes"], report["packed_bytes"]) == (weight.nbytes, packed.nbytes)


def test_prune_table_names_the_essentials(shflnb_command, weight, tmp_path: Path) -> None:
    source, target = tmp_path / "w.npy", tmp_path / "w.safetensors"
    np.save(source, weight)
    code, out, _ = shflnb_command("prune", source, target, "--search", "identity")
    assert code == 0
    assert "100 x 70 float32" in out
    assert "magnitude, search identity" in out
    assert str(target) in out.replace("\n", "")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_prune_safetensors_keeps_the_dtype(shflnb_command, weight, tmp_path: Path, dtype) -> None:
    source, target = tmp_path / "model.safetensors", tmp_path / "w.safetensors"
    save_file({"fc.weight": weight.astype(dtype), "fc.bias": np.zeros(100, np.float32)}, source)
    assert shflnb_command("prune", source, target, "--json")[0] == 0  # the only matrix needs no --key
    packed = shflnb.load(target)
    assert packed.to_dense().dtype == np.dtype(dtype)
    kept = packed.to_dense() != 0
    assert 0 < kept.mean() <= 0.25
    assert np.array_equal(packed.to_dense()[kept], weight.astype(dtype)[kept])


def test_prune_needs_a_key_among_several(shflnb_command, weight, tmp_path: Path) -> None:
    source, target = tmp_path / "model.safetensors", tmp_path / "w.safetensors"
    save_file({"a.weight": weight, "b.weight": weight[:64]}, source)
    code, _, err = shflnb_command("prune", source, target)
    assert code == 1
    assert "holds 2 matrices; choose one with --key: a.weight, b.weight" in err
    code, _, err = shflnb_command("prune", source, target, "--key", "c.weight")
    assert code == 1
    assert "has no tensor 'c.weight'; choose one with --key: a.weight, b.weight" in err
    assert shflnb_command("prune", source, target, "--key", "b.weight")[0] == 0
    assert shflnb.load(target).shape == (64, 70)


def test_prune_replaces_only_when_told(shflnb_command, weight, tmp_path: Path) -> None:
    source, target = tmp_path / "w.npy", tmp_path / "w.safetensors"
    np.save(source, weight)
    target.write_bytes(b"precious")
    code, _, err = shflnb_command("prune", source, target)
    assert (code, target.read_bytes()) == (1, b"precious")
    assert "--force" in err
    assert shflnb_command("prune", source, target, "--force")[0] == 0
    assert shflnb.load(target).shape == (100, 70)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--block", "64"], "--block is '64'; needed is rows x columns, for example 64x64"),
        (["--block", "60x64"], "block"),
        (["--sparsity", "75"], "sparsity"),
        (["--search", "psychic"], "search"),
        (["--score", "taste"], "score"),
        (["--quality", "superb"], "quality"),
    ],
)
def test_prune_refuses_bad_options(shflnb_command, weight, tmp_path: Path, arguments, text) -> None:
    source, target = tmp_path / "w.npy", tmp_path / "w.safetensors"
    np.save(source, weight)
    code, out, err = shflnb_command("prune", source, target, *arguments, "--json")
    assert (code, out) == (1, "")
    assert err.startswith("shflnb: ") and text in err
    assert not target.exists()


def test_prune_refuses_bad_files(shflnb_command, weight, tmp_path: Path) -> None:
    target = tmp_path / "w.safetensors"
    bad = {"a.npy": b"\x93NUMPY garbage", "empty.npy": b"", "b.safetensors": b"\xff" * 64, "c.txt": b"1 2 3"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "vector.npy", weight[0])
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    np.save(tmp_path / "integers.npy", np.ones((64, 64), np.int64))
    for path in sorted(tmp_path.iterdir()):
        code, out, err = shflnb_command("prune", path, target)
        assert (code, out) == (1, ""), path.name
        assert err.startswith("shflnb: ") and err.count("\n") == 1, err
        assert not target.exists()


# -- demo ----------------------------------------------------------------------------------------------------


def test_demo_holds_every_check(shflnb_command) -> None:
    pytest.importorskip("sklearn")
    code, out, _ = shflnb_command("demo", "--json")
    report = json.loads(out)
    assert (code, report["passed"], report["failed"]) == (0, True, [])
    assert sum(len(step["checks"]) for step in report["steps"]) >= 12
    figures = {name: value for step in report["steps"] for name, value in step["figures"].items()}
    retained = figures["retained"]
    assert retained["identity"] < retained["refined"] < figures["retained_unstructured"]
    assert figures["tuned"] > 0.9


def test_demo_fails_when_a_check_fails(shflnb_command, monkeypatch) -> None:
    steps = [demo.Step("one", checks=[demo.Check("the sky is up", True), demo.Check("the sky is green", False)])]
    monkeypatch.setattr(demo, "run", lambda seed: iter(steps))
    code, out, _ = shflnb_command("demo")
    assert code == 1
    assert "1 of 2 checks FAILED: the sky is green" in out
    code, out, _ = shflnb_command("demo", "--json")
    assert code == 1
    assert json.loads(out)["failed"] == ["the sky is green"]


def test_demo_text_shows_steps_tables_and_python(shflnb_command, monkeypatch) -> None:
    step = demo.Step("a title [x]", ["a line [y]"], [("who", "what"), ("[z]", "1.0x")], [demo.Check("it holds", True)])
    monkeypatch.setattr(demo, "run", lambda seed: iter([step]))
    code, out, _ = shflnb_command("demo")
    assert code == 0
    assert all(
        text in out for text in ("a title [x]", "a line [y]", "[z]", "1.0x", "ok it holds", "All 1 checks held.")
    )
    assert demo.SNIPPET.splitlines()[2] in out


@pytest.mark.parametrize("broken", ["matmul", "load"])
def test_demo_notices_a_wrong_library(monkeypatch, broken) -> None:
    """Each promise that the demo checks is really checked: break the library, and a check must fail."""
    pytest.importorskip("sklearn")
    images = digits.load_digits()
    w = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
    pruned = shflnb.prune(w, sparsity=0.75, block=(32, 64), search="identity")
    right = getattr(demo, broken)
    if broken == "matmul":
        monkeypatch.setattr(
            demo, "matmul", lambda packed, x, **options: right(packed, x, **options) * np.float32(1.001)
        )
    else:
        monkeypatch.setattr(demo, "load", lambda path: right(path).astype("float16").astype("float32"))
    step, packed = demo._pack_step(pruned)
    checks = step.checks
    x = digits.Network.random([64, 512], 0).activations(images.x_test)[-1]
    checks = checks + demo._multiply_step(packed, pruned.weight, np.zeros(512, np.float32), x, 0).checks
    assert any(not check.passed for check in checks)


def test_demo_without_scikit_learn_names_the_extra(shflnb_command, monkeypatch) -> None:
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    code, _, err = shflnb_command("demo", "--json")
    assert code == 1
    assert "pip install 'shflnb[demo]'" in err


# -- doctor --------------------------------------------------------------------------------------------------


def test_doctor_json_has_what_a_bug_report_needs(shflnb_command, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "cache_dir", lambda: tmp_path / "kernels")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/a.cubin").write_bytes(b"12345")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    code, out, _ = shflnb_command("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["shflnb"] == shflnb.__version__
    assert report["packages"]["numpy"] == np.__version__
    assert report["cpu"]["usable_cores"] >= 1
    assert report["caches"]["kernels"] == {
        "path": str(tmp_path / "kernels"),
        "files": 1,
        "bytes": 5,
        "writable": True,
    }
    assert report["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert report["product"]["right"] is True
    assert report["threads"] >= 1
    assert any(pool["user_api"] == "blas" for pool in report["pools"])


def test_doctor_text_names_missing_extras_with_the_pip_line(shflnb_command, monkeypatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "find_cuda", lambda: CudaDriver(None, (), "no CUDA driver"))
    requirements = [
        "numpy>=1",
        'torch>=2 ; extra == "torch"',
        'numba-cuda ; sys_platform != "darwin" and extra == "cu13"',
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requirements)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("torch", "numba-cuda") else real(name))
    code, out, _ = shflnb_command("doctor")
    assert code == 0
    assert "pip install 'shflnb[torch]'" in out
    assert "no driver here that could use it" in out  # a GPU extra is no use without a driver, so it is not advised
    driver = CudaDriver((13, 0), (CudaDevice("Alpha", (9, 0), 132, 141 << 30),), None)
    monkeypatch.setattr(doctor, "find_cuda", lambda: driver)
    _, out, _ = shflnb_command("doctor")
    assert "pip install 'shflnb[cu13]'" in out
    assert "Alpha, capability 9.0, 132 SMs, 141 GiB" in out
