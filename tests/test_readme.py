"""The README tells the truth: its Python runs, its commands and links exist, and no figure in it was typed by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

from shflnb import cli, demo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NEEDS_GPU = "<!-- needs a GPU -->"
TABLE = re.compile(r"<!-- table:(\w+) -->\n(.*?)<!-- /table:\1 -->", flags=re.DOTALL)
# "1.8x", "3 ms", "120 GB/s", "0.5 TFLOP/s": what a measurement would look like. Shapes ("64x64") are none.
FIGURE = re.compile(r"\b\d+(\.\d+)?( ?x\b(?!\d)|[  ](us|ms|s|[GT]B/s|[GT]FLOP/s|times)\b)")


def blocks(language: str) -> list[tuple[str, bool]]:
    """The README's fenced blocks of a language, each with whether it may run without a GPU."""
    pattern = re.compile(rf"(?P<mark>{NEEDS_GPU}\n)?^```{language}\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE)
    return [(found["code"], found["mark"] is None) for found in pattern.finditer(README)]


def test_python_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    runnable = [code for code, on_cpu in blocks("python") if on_cpu]
    assert len(runnable) >= 3
    names: dict[str, Any] = {}
    for number, code in enumerate(runnable):
        exec(compile(code, f"README.md, Python block {number}", "exec"), names)
    assert np.array_equal(names["again"].to_dense(), names["pruned"].weight)


def test_demo_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    names: dict[str, Any] = {
        "w": rng.standard_normal((512, 512), dtype=np.float32),
        "x": rng.standard_normal((512, 5), dtype=np.float32),
        "b": rng.standard_normal(512, dtype=np.float32),
    }
    exec(compile(demo.SNIPPET, "the demo's Python", "exec"), names)
    expected = np.maximum(names["pruned"].weight.astype(np.float64) @ names["x"] + names["b"][:, None], 0)
    np.testing.assert_allclose(names["y"], expected, rtol=1e-5, atol=1e-4)
    assert (tmp_path / "layer.safetensors").is_file()


def test_opens_with_the_two_commands() -> None:
    first, _ = blocks("sh")[0]
    assert re.findall(r"^make (\w+)", first, flags=re.MULTILINE) == ["demo", "test"]
    assert README.index(first) < README.index("\n## ")


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z]+)\b", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "make test" in ci


def test_commands_and_their_options_exist() -> None:
    commands = get_command(cli.app).commands
    lines = re.findall(r"^shflnb (\w+)([^\n#]*)", "\n".join(code for code, _ in blocks("sh")), flags=re.MULTILINE)
    assert {name for name, _ in lines} >= {"doctor", "prune"}
    for name, rest in lines:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options
        assert "--json" in options


def test_links_into_the_repository_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_no_figure_was_typed_by_hand() -> None:
    prose = TABLE.sub("", README)
    assert FIGURE.search(prose) is None
    assert FIGURE.search("runs 1.8x faster") and FIGURE.search("in 3 ms") and not FIGURE.search("block 64x64, 32x64")


def test_extras_in_the_readme_are_in_setup() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    defined = set(re.findall(r'^    "(\w+)":', setup, flags=re.MULTILINE)) | set(
        re.findall(r'EXTRAS\["(\w+)"\]', setup)
    )
    named = set(re.findall(r"\.\[(\w+)\]", README))
    listed = re.search(r"Further extras: ([^.]+)\.", README)
    assert listed
    named |= set(re.findall(r"`(\w+)`", listed.group(1)))
    assert named == defined
