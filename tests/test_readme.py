"""Every Python block of the README runs, and prints what it says it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(README.count("```python")))
def test_block_runs_and_prints_what_it_says(number, run_block):
    run_block(ROOT / "README.md", number)


def test_the_readme_has_its_examples():
    assert README.count("```python") >= 2
    assert "```text" in README.split("```python")[1], "the first example shows its output"


def test_every_config_that_the_readme_names_exists():
    named = re.findall(r"configs/[\w/]+\.yaml", README)
    assert named
    assert all((ROOT / name).is_file() for name in named)


def test_every_test_that_the_readme_names_exists():
    named = re.findall(r"`(tests/[\w/*.]+)`", README)
    assert named
    assert all(list(ROOT.glob(name)) for name in named)


def test_every_make_target_that_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
