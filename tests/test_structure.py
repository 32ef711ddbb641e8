"""What holds the house together: rooms import only those below them, files stay short, and names are given once."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "gumbel_plugin").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")])
LONGEST = 400


def test_imports_keep_the_contracts() -> None:
    pytest.importorskip("importlinter")  # needs Python 3.11
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_contributing_names_every_room() -> None:
    rooms = {path.parent.name for path in (ROOT / "gumbel_plugin").glob("*/__init__.py")}
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert rooms == {room for room in rooms if f"`{room}/`" in table}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_no_two_modules_have_the_same_name() -> None:
    places = defaultdict(list)
    for path in MODULES:
        places[path.stem].append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1 and name != "__init__"}


def test_test_files_mirror_the_modules() -> None:
    """A folder of tests is named like the room or adapter whose behavior it tests."""
    rooms = {path.parent.name for path in MODULES}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= rooms
