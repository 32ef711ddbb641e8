"""Whatever is imported first: torchvision works afterwards, as far as its own library does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

OPERATORS = """
import torch, torchvision
boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.01], [5.0, 5.0, 6.0, 6.0]])
try:
    kept = torchvision.ops.nms(boxes, torch.tensor([0.5, 0.6, 0.4]), 0.5)
except RuntimeError as error:  # as torchvision itself says where its library does not load
    assert not torchvision.extension._has_ops() and "Couldn't load custom C++ ops" in str(error), error
else:
    assert torchvision.extension._has_ops() and kept.tolist() == [1, 2]
assert torchvision.models.resnet18(num_classes=3).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
print("done")
"""
LAYOUT = """
from gumbel_plugin.torchvision_import import make_torchvision_importable
import torch, torchvision.submodule
assert torchvision.__file__.startswith({folder!r})
assert hasattr(torch.ops.torchvision, "nms") == {declared}
print("done")
"""


def run(program: str, folder: Path, *extra_paths: Path) -> None:
    lines = [f"import sys; sys.path[:0] = {[str(path) for path in extra_paths]}", program]
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("done\n")


@pytest.mark.parametrize("ours", ["gumbel_plugin", "gumbel_nni", "gumbel_lightning", "gumbel_transformers"])
def test_ours_may_come_first(ours: str, tmp_path: Path) -> None:
    if ours == "gumbel_nni":
        pytest.importorskip("nni")
    run(f"import {ours}" + OPERATORS, tmp_path)


@pytest.mark.parametrize("other", ["torchvision", "nni.compression", "lightning"])
def test_ours_may_come_last(other: str, tmp_path: Path) -> None:
    if other == "nni.compression":
        pytest.importorskip("nni")
    # Beside a torch without CUDA the first import fails, whatever we do: we are not there yet. The next one works.
    program = f"""
try:
    import {other}
except RuntimeError as error:
    assert "operator torchvision::nms does not exist" in str(error)
import gumbel_plugin, {other}, gumbel_torch_pruning
"""
    run(program + OPERATORS, tmp_path)


@pytest.mark.parametrize(
    ("extension", "declared"),
    [
        ("def _has_ops(): return True", False),  # its library was loaded, under whatever name
        ("def _has_ops(): return False", True),
        ("HAS_OPS = False", False),  # not the torchvision that is known: nothing is done
        ("import torchvision.submodule\ndef _has_ops(): return False", False),  # not decided yet at that moment
    ],
    ids=["loaded", "not_loaded", "unknown_layout", "undecided"],
)
def test_torchvision_decides_not_the_name_of_a_file(extension: str, declared: bool, tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import extension, submodule", encoding="utf-8")
    (package / "extension.py").write_text(extension, encoding="utf-8")
    (package / "submodule.py").write_text("", encoding="utf-8")
    run(LAYOUT.format(folder=str(tmp_path), declared=declared), tmp_path, tmp_path)
