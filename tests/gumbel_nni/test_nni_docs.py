"""What docs/nni.md names is there; its recipes run with those of all pages, in tests/test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "nni.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_there_are_five() -> None:
    assert TEXT.count("```python") == TEXT.count("```text") == 5


def test_what_the_page_names_exists() -> None:
    links = re.findall(r"\]\(([\w./]+)\)", TEXT)
    assert links
    assert all((PAGE.parent / name).is_file() for name in links)
    configs = set(re.findall(r"configs/\w+\.yaml", TEXT))
    assert configs
    assert all((ROOT / name).is_file() for name in configs)
    assert "nni-conformance:" in (ROOT / "Makefile").read_text(encoding="utf-8")
