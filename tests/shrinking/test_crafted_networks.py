"""Network files whose digest is right and whose header is not: sizes that no layer has, indices of nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin import load_pruned, save_pruned, shrink
from gumbel_plugin.errors import DataError
from gumbel_plugin.graph.record import kept_of
from gumbel_plugin.shrinking.pruned_file import FORMAT
from gumbel_plugin.storage.tensor_file import read_tensors, write_tensors

INPUTS = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)).eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    mask = torch.ones(2, 96)
    mask[:, 16:48] = 0
    save_pruned(tmp_path / "small", shrink(dense(), {"4": {"weight": mask}}, INPUTS))
    return tmp_path / "small"


def craft(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors, metadata = read_tensors(file, "file")
    header = json.loads(metadata[FORMAT])
    change(header)
    write_tensors(file, tensors, {FORMAT: json.dumps(header)})


def size(module: str, key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["sizes"][module].update({key: value})


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a method": (size("0", "forward", 1), "'forward' is no size of '0'"),
    "the class": (size("0", "__class__", 1), "'__class__' is no size"),
    "the modules": (size("0", "_modules", 1), "'_modules' is no size"),
    "a switch": (size("0", "training", 1), "'training' is no size"),
    "another layer's": (size("4", "out_channels", 2), "'out_channels' is no size of '4'"),
    "negative": (size("4", "in_features", -64), r"4\.in_features = -64 does not fit"),
    "larger": (size("4", "in_features", 97), r"4\.in_features = 97 does not fit the factory's, which is 96"),
    "gigantic": (size("0", "kernel_size", [10**9, 10**9]), r"0\.kernel_size = \(1000000000, 1000000000\) does not fit"),
    "endless": (size("0", "groups", 10**400), "damaged header: 'sizes.0.groups"),
    "a number for two": (size("0", "stride", 1), r"0\.stride = 1 does not fit"),
    "too many": (size("0", "stride", [1, 1, 1]), r"0\.stride = \(1, 1, 1\) does not fit"),
    "a text": (size("0", "groups", "1"), "damaged header"),
    "a fraction": (size("0", "groups", 0.5), "damaged header"),
    "a truth": (size("0", "groups", True), "damaged header"),
    "nothing": (size("0", "groups", None), "damaged header"),
    "no module": (lambda h: h["sizes"].update({"7": {}}), "has no module '7'"),
    "kept of nothing": (lambda h: h["kept"].update({"7.weight": [None]}), "kept of '7.weight' does not fit"),
    "kept too few": (lambda h: h["kept"]["0.bias"][0].pop(), "kept of '0.bias' does not fit"),
    "kept twice": (lambda h: h["kept"].update({"0.bias": [[0, 0, 3, 4]]}), "kept of '0.bias' does not fit"),
    "kept outside": (lambda h: h["kept"].update({"0.bias": [[0, 3, 4, 6]]}), "kept of '0.bias' does not fit"),
    "kept below": (lambda h: h["kept"].update({"0.bias": [[-1, 3, 4, 5]]}), "damaged header"),
    "kept of other dimensions": (lambda h: h["kept"].update({"0.bias": [None, None]}), "kept of '0.bias' does not"),
    "a block of nothing": (lambda h: h["blocks"].append("7"), "no residual block '7'"),
    "a block that is none": (lambda h: h["blocks"].append("0"), "no residual block '0'"),
    "a class of torch": (lambda h: h["replaced"].update({"0": "nn"}), "no attention layer '0'"),
    "a function": (lambda h: h["replaced"].update({"0": "part_of"}), "no attention layer '0'"),
    "no attention": (lambda h: h["replaced"].update({"0": "CompactMultiheadAttention"}), "'0' is no attention layer"),
    "no windows": (lambda h: h["replaced"].update({"0": "CompactWindowAttention"}), "'0' is no attention layer"),
    "the network itself": (lambda h: h["replaced"].update({"": "CompactWindowAttention"}), "no attention layer ''"),
    "no sizes": (lambda h: h.pop("sizes"), "'sizes': Field required"),
    "no replacements": (lambda h: h.pop("replaced"), "damaged header: 'replaced': Field required"),
    "a list": (lambda h: h.update(sizes=[]), r"damaged header: 'sizes' = \[\]"),
    "an odd shape": (lambda h: h.update(input_shape=[-1]), "'input_shape.0' = -1"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_is_refused(name: str, file: Path) -> None:
    change, problem = HEADERS[name]
    craft(file, change)
    made: list[nn.Module] = []
    with pytest.raises(DataError, match=problem) as caught:
        load_pruned(file, lambda: made.append(dense()) or made[0])
    assert len(str(caught.value)) < 600
    assert all("forward" not in vars(layer) for model in made for layer in model.modules())


def test_more_keys_are_of_later_versions(file: Path) -> None:
    craft(file, lambda header: header.update({"forward": 1, "_modules": {}}))
    small = load_pruned(file, dense)
    assert small[4].in_features == 64
    assert [None if d is None else d.tolist() for d in kept_of(small)["0.bias"]] == [[0, 3, 4, 5]]
    assert small(INPUTS).shape == (3, 2)


def test_a_count_of_a_layer_of_ones_own_may_grow(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.calls = 0

    model = Counting()
    model.calls = 17
    save_pruned(tmp_path / "small", model)
    assert load_pruned(tmp_path / "small", Counting).calls == 17


def test_a_bias_of_another_shape_is_none(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(2, 2)}
    write_tensors(tmp_path / "small", tensors, {FORMAT: json.dumps({"kept": {}, "sizes": {}, "replaced": {}})})
    with pytest.raises(DataError, match="has a tensor 'bias'"):
        load_pruned(tmp_path / "small", lambda: nn.Linear(3, 2, bias=False))


class TestDigest:
    def test_every_flipped_bit_is_found(self, tmp_path: Path) -> None:
        save_pruned(tmp_path / "small", nn.Linear(2, 1))
        whole = (tmp_path / "small").read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << (place % 8)
            (tmp_path / "small").write_bytes(damaged)
            with pytest.raises(DataError, match="small"):
                load_pruned(tmp_path / "small", lambda: nn.Linear(2, 1))

    def test_a_file_of_0_1_0_loads_with_a_warning(self) -> None:
        path = Path(__file__).parents[1] / "data" / "written_by_0_1_0" / "small.safetensors"
        with pytest.warns(UserWarning, match=r"small\.safetensors was written by gumbel-plugin 0\.1\.0"):
            small = load_pruned(path, lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
        assert small[0].out_features == 3
        assert small(torch.ones(1, 4)).shape == (1, 2)
