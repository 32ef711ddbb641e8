"""Repairs NNI before any test module imports it; writes the conformance table where the environment asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import gumbel_nni  # noqa: F401  (repairs NNI)

_INTRODUCTION = """\
# What NNI promises of a pruner, and who keeps it

A row is a promise of NNI's, a column a pruner; NNI's own are those of NNI 3.0 with the repairs of `gumbel_nni.compat`.
✓ kept; ✗ not kept, with the reason below. The cells are tests (`tests/gumbel_nni/test_conformance.py`); this page is
written by

    make nni-conformance
"""


@pytest.fixture(autouse=True)
def _nni_shrinks_by_itself(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail where NNI's backend fell back on Torch-Pruning unexpectedly; who expects it clears the log."""
    yield
    assert "Torch-Pruning's functions do it" not in caplog.text


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write the table to the path in NNI_CONFORMANCE, from the reports of the tests that ran."""
    path = os.environ.get("NNI_CONFORMANCE")
    if path is None:
        return
    cells: dict[str, dict[str, str]] = {}
    reasons: dict[str, list[str]] = {}
    for outcome in ("passed", "xfailed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            found = dict(report.user_properties)
            if "promise" in found:
                cells.setdefault(found["promise"], {})[found["pruner"]] = "✓" if outcome == "passed" else "✗"
            if outcome == "xfailed" and "promise" in found:
                promises = reasons.setdefault(report.wasxfail, [])
                promises += [found["promise"]] * (found["promise"] not in promises)
    order = sorted(cells, key=lambda text: _ORDER.index(text) if text in _ORDER else len(_ORDER))
    pruners = list(next(iter(cells.values()), {}))
    lines = [_INTRODUCTION, f"NNI {version('nni')}, torch {version('torch')}.", ""]
    lines += [f"| promise | {' | '.join(pruners)} |", f"|---|{':---:|' * len(pruners)}"]
    lines += [f"| {text} | {' | '.join(cells[text].get(name, '-') for name in pruners)} |" for text in order]
    lines += ["", "## Why not", "", *(f"- NNI {reason} ({'; '.join(text)})." for reason, text in reasons.items()), ""]
    Path(path).write_text("\n".join(lines), encoding="utf-8")


_ORDER: list[str] = []


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Remember the rows' order: that of the file."""
    for item in items:
        text = getattr(getattr(item, "function", None), "promise", None)
        if text is not None and text not in _ORDER:
            _ORDER.append(text)
