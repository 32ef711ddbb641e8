"""Every Python block of the documentation runs, and prints what it says it prints."""

from __future__ import annotations

import contextlib
import io
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NEEDS_NNI = re.compile(r"\bnni\b|GumbelPruner")
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCKS = [
    pytest.param(page, code, expected, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, (code, expected) in enumerate(
        re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", page.read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code", "expected"), BLOCKS)
def test_block_runs_and_prints_what_it_says(
    page: Path, code: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if NEEDS_NNI.search(code):
        pytest.importorskip("nni")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        for module in ("lightning", "pytorch_lightning", "transformers", "torch.onnx", "torch.utils.data"):
            warnings.filterwarnings("ignore", module=module)  # their hints to whoever trains; ours stay errors
        exec(compile(code, f"{page.name}", "exec"), {"__name__": "__main__"})
    if expected:
        assert printed.getvalue() == expected


@pytest.mark.slow
@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_the_example_of_a_library_runs_alone(library: str, tmp_path: Path) -> None:
    """In a fresh process nothing has been imported that the example itself does not import, in its own order."""
    page = (ROOT / "docs" / "training_loops.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = next(block for block in blocks if re.search(rf"^(import|from) {library}", block, re.MULTILINE))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


def test_how_a_channel_leaves_names_every_room_and_function_once() -> None:
    page = (ROOT / "docs" / "how_a_channel_leaves.md").read_text(encoding="utf-8")
    named = re.findall(r"`(gumbel_plugin\.[\w.]+)`", page)
    assert len(set(named)) == len(named)
    for name in named:
        assert pkgutil.resolve_name(name)
    rooms = {path.parent.name for path in (ROOT / "gumbel_plugin").glob("*/__init__.py")}
    assert rooms == {name.split(".")[1] for name in named} - {"config"}
