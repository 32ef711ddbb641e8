"""Where exports, comparisons and files of masks and networks may go: never over anything that is worth more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gumbel_plugin import save_pruned
from gumbel_plugin.errors import ConfigError, DataError
from gumbel_plugin.runs.export import FORMATS, export_run
from gumbel_plugin.runs.reporting import write_comparison
from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.shrinking.mask_file import save_masks
from gumbel_plugin.shrinking.pruned_file import read_header
from gumbel_plugin.storage.files import write_bytes

pytestmark = pytest.mark.slow

RUN = {
    "model": {"name": "digits_cnn"},
    "data": {"name": "digits", "batch_size": 512},
    "training": {"max_epochs": 1, "accelerator": "cpu"},
    "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]},
    "report": {"html": False, "tensorboard": False, "latency_batches": []},
}
FILES = [
    "small.safetensors",
    "masks.safetensors",
    "summary.json",
    "config.yaml",
    "log.csv",
    "gates.jsonl",
    "report.html",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "run"
    run(RunConfig.load(RUN), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestFilesOfARun:
    @pytest.mark.parametrize("name", FILES)
    def test_are_not_replaced(self, name: str, finished: Path, tmp_path: Path) -> None:
        before = contents(finished)
        (tmp_path / "link").symlink_to(finished)
        places = [finished / name, tmp_path / "link" / name, finished / ".." / "run" / name, finished / name.upper()]
        for place in places:
            with pytest.raises(ConfigError, match="is a run, which needs its own"):
                export_run(finished, "safetensors", place)
            with pytest.raises(ConfigError, match="is a run, which needs its own"):
                write_comparison([finished], place)
        assert contents(finished) == before

    def test_its_own_network_is_the_export(self, finished: Path) -> None:
        before = contents(finished)
        assert export_run(finished, "safetensors") == (finished / "small.safetensors", 0.0)
        assert contents(finished) == before

    def test_other_names_and_folders_are_free(self, finished: Path, tmp_path: Path) -> None:
        for place in (finished / "mine.safetensors", tmp_path / "small.safetensors"):
            assert export_run(finished, "safetensors", place)[0] == place
            assert export_run(finished, "safetensors", place)[0] == place  # again: an export may be replaced
            place.unlink()


class TestWhatIsNoRegularFile:
    def test_is_never_replaced(self, finished: Path, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "file").write_text("valuable")
        (tmp_path / "link").symlink_to(tmp_path / "file")
        (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
        kinds = {
            "folder": "it is a folder",
            "pipe": "it is no regular file",
            "link": "it is a symbolic link",
            "dangling": "it is a symbolic link",
            "no/file": "its folder does not exist",
            "file/file": "its folder does not exist",
        }
        for name, problem in kinds.items():
            for kind in FORMATS:
                with pytest.raises(ConfigError, match=f"{name}' cannot be written: {problem}"):
                    export_run(finished, kind, tmp_path / name)
            with pytest.raises(ConfigError, match=f"{name}' cannot be written: {problem}"):
                save_masks(tmp_path / name, {"fc": {"weight": torch.ones(2)}})
            with pytest.raises(ConfigError, match=f"{name}' cannot be written: {problem}"):
                save_pruned(tmp_path / name, nn.Linear(2, 2))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "folder", "link", "pipe"]
        assert (tmp_path / "file").read_text() == "valuable"

    def test_a_link_of_the_temporary_name_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("valuable")
        (tmp_path / "masks.partial").symlink_to(tmp_path / "file")
        save_masks(tmp_path / "masks", {"fc": {"weight": torch.ones(2)}})
        assert (tmp_path / "file").read_text() == "valuable"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "masks"]

    def test_a_folder_of_the_temporary_name(self, tmp_path: Path) -> None:
        (tmp_path / "masks.partial").mkdir()
        with pytest.raises(ConfigError, match="masks' cannot be written"):
            save_masks(tmp_path / "masks", {"fc": {"weight": torch.ones(2)}})


# What a full disk does, for every file system and user: no file of the process grows beyond 200 bytes.
FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from gumbel_plugin import save_pruned
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.storage.files import append_text
from gumbel_plugin.runs.export import export_run
from gumbel_plugin.runs.checkpoint import write_checkpoint
from gumbel_plugin.runs.reporting import write_comparison, write_report
from gumbel_plugin.shrinking.mask_file import save_masks
run, there = Path(sys.argv[1]), Path(sys.argv[2])
export_run(run, "pt2", there / "warm.pt2")  # what torch writes once, elsewhere, is not of interest
(there / "warm.pt2").unlink()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
calls = {
    "pt2": lambda file: export_run(run, "pt2", file),
    "masks": lambda file: save_masks(file, {"fc": {"weight": torch.ones(300)}}),
    "network": lambda file: save_pruned(file, torch.nn.Linear(20, 20)),
    "checkpoint": lambda file: write_checkpoint(file, {"weights": torch.ones(300)}),
    "comparison.html": lambda file: write_comparison([run], file),
    "report.html": lambda file: write_report(run),
    "gates.jsonl": lambda file: append_text(file, "x" * 300),
}
for name, call in calls.items():
    try:
        call(there / name)
    except ConfigError as error:
        print(name in str(error) and "cannot be written: File too large" in str(error), error)
    else:
        print(False, name)
"""


def test_a_full_disk(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    pytest.importorskip("matplotlib")
    before = contents(finished)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(finished), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert all(line.startswith("True") for line in lines), done.stdout
    assert contents(tmp_path) == {"gates.jsonl": b"x" * 200}  # of an appended line, readers leave out what is cut off
    assert contents(finished) == before


def test_a_network_that_cannot_read_what_its_file_names(finished: Path, tmp_path: Path) -> None:
    from gumbel_plugin import load_pruned
    from gumbel_plugin.runs.models import build_model

    for name, content in contents(finished).items():
        (tmp_path / name).write_bytes(content)
    small = load_pruned(finished / "small.safetensors", lambda: build_model("digits_cnn"))
    for shape in ([3, 8, 8], [1, 2**20, 2**20], []):
        save_pruned(tmp_path / "small.safetensors", small, input_shape=shape)
        assert read_header(tmp_path / "small.safetensors")["input_shape"] == shape
        with pytest.raises(DataError, match=r"cannot read inputs of the shape"):
            export_run(tmp_path, "pt2", tmp_path / "small.pt2")
    assert not (tmp_path / "small.pt2").exists()


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"first")
    write_bytes(tmp_path / "file", b"second")
    assert contents(tmp_path) == {"file": b"second"}
