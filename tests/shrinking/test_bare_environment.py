"""Loading a small network needs torch and safetensors only: it is done where nothing else is installed."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin import load_pruned, save_pruned, shrink

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OLD_FILE = ROOT / "tests" / "data" / "written_by_0_1_0" / "small.safetensors"

NETWORKS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    def forward(self, x):
        return torch.relu(x + self.bn(self.conv(x)))

class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8, 2)
    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])

def cnn():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))

def blocks():
    return nn.Sequential(nn.Conv2d(1, 4, 3), Block(), Block(), nn.Flatten(), nn.Linear(64, 2))

def old():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
"""

PROGRAM = """
import json, sys
import torch
import networks
from gumbel_plugin import load_pruned

for name, (path, factory, inputs, outputs) in json.loads(sys.argv[1]).items():
    small = load_pruned(path, getattr(networks, factory)).eval()
    with torch.no_grad():
        assert torch.allclose(small(torch.tensor(inputs)), torch.tensor(outputs), atol=1e-5), name
    print(name, small)
known = {*sys.stdlib_module_names, *sys.argv[2].split(), "gumbel_plugin", "networks", "__main__", "__mp_main__"}
others = {name.partition(".")[0] for name in sys.modules} - known
assert not others, others
allowed = ("layers", "storage", "errors", "torchvision_import", "shrinking.pruned_file", "shrinking.closed_blocks")
allowed += ("graph.record", "graph.channel_groups", "graph.residual_blocks")  # without Torch-Pruning
rooms = {"gumbel_plugin", "gumbel_plugin.graph", "gumbel_plugin.shrinking"}
ours = {name for name in sys.modules if name.startswith("gumbel_")} - rooms
assert all(name.removeprefix("gumbel_plugin.").startswith(allowed) for name in ours), ours
"""


def requirements(*names: str) -> set[str]:
    """Return distributions and all that they require without extras."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            wanted = [line for line in distribution(name).requires or () if ";" not in line]
            left += [re.split(r"[^\w.-]", line)[0].lower() for line in wanted]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Return the Python of an environment that has torch and safetensors only, and what can be imported there."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    linked = set()
    for name in requirements("torch", "safetensors"):
        own = distribution(name)
        for top in {file.parts[0] for file in own.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(own.locate_file(top))).resolve())
            linked.add(top.partition(".")[0])
    return folder / "bin" / "python", linked


def run(arguments: list[Any], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)


def closed_head(model: nn.Module) -> None:
    model.attention.out_proj.weight[:, 2:4] = 0


def closed_channels(model: nn.Module) -> None:
    model[4].weight[:, 16:48] = 0


def closed_block(model: nn.Module) -> None:
    model[2].bn.weight.zero_()
    model[2].bn.bias.zero_()


def test_torch_and_safetensors_are_enough(bare: tuple[Path, set[str]], tmp_path: Path) -> None:
    python, importable = bare
    (tmp_path / "networks.py").write_text(NETWORKS)
    networks = runpy.run_path(str(tmp_path / "networks.py"))
    files = {}
    images, tokens = torch.rand(2, 1, 6, 6), torch.rand(2, 5, 3)
    cases = {"cnn": (closed_channels, images), "blocks": (closed_block, images), "Attends": (closed_head, tokens)}
    for name, (close, inputs) in cases.items():
        torch.manual_seed(0)
        model = networks[name]().eval()
        with torch.no_grad():
            close(model)
            outputs = model(inputs)
        small = shrink(model, {}, inputs)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        save_pruned(tmp_path / name, small)
        files[name] = (str(tmp_path / name), name, inputs.tolist(), outputs.tolist())
    ones = torch.ones(1, 4)
    with pytest.warns(UserWarning, match=r"written by gumbel-plugin 0\.1\.0"):
        old = load_pruned(OLD_FILE, networks["old"])
    files["old"] = (str(OLD_FILE), "old", ones.tolist(), old(ones).tolist())
    ended = run([python, "-c", PROGRAM, json.dumps(files), " ".join(importable)], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "CompactMultiheadAttention" in ended.stdout
    assert "(2): ReLU()" in ended.stdout  # what is left of the block


@pytest.mark.parametrize("name", ["numpy", "pydantic", "torch_pruning", "gumbel_plugin.config"])
def test_nothing_else_is_there(bare: tuple[Path, set[str]], name: str, tmp_path: Path) -> None:
    ended = run([bare[0], "-c", f"import {name}"], tmp_path)
    assert "ModuleNotFoundError" in ended.stderr
