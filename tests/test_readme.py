"""Every Python block of the README and of CONTRIBUTING runs, and prints what it says it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from gumbel_plugin.masks import METHODS
from gumbel_plugin.masks.base import LearnedMask, NoiseSource, Phase
from gumbel_plugin.masks.functional import straight_through

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


def test_the_method_of_contributing_works():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    names = {"LearnedMask": LearnedMask, "nn": nn, "torch": torch, "straight_through": straight_through}
    exec(code, names)
    mask = names["CoinMask"]((1000,), LearnedMask.Options(), NoiseSource(0), 0)
    mask.phase = Phase.LEARNING
    gates = mask.gates()
    assert set(gates.tolist()) == {0.0, 1.0}
    gates.sum().backward()
    assert (mask.logit.grad > 0).all()
    assert abs(float(gates.detach().mean()) - 0.5) < 0.1
    assert "CoinMask" not in METHODS
