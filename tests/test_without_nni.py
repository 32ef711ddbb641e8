"""The core and its tests do without NNI, as an installation without the extra does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SAMPLE = "test_mask_format or test_example_inputs or test_schedules or selects_layers or test_history"
PROGRAM = """
import sys
sys.modules["nni"] = None  # as if it was not installed
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_all_core_tests_are_collected_without_nni_and_a_sample_of_them_passes() -> None:
    rooms = [path for path in TESTS.iterdir() if not path.name.startswith(("gumbel_", "conftest", Path(__file__).stem))]
    paths = [str(path) for path in sorted(rooms) if path.is_dir() or path.suffix == ".py"]
    command = [sys.executable, "-c", PROGRAM, "-p", "no:cacheprovider", "-x", "-k", SAMPLE, *paths]
    ended = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
