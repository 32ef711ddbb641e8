from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gumbel_plugin.errors import DataError
from gumbel_plugin.shrinking.mask_file import FORMAT, load_masks, save_masks


def masks() -> dict[str, dict[str, torch.Tensor | None]]:
    torch.manual_seed(0)
    rows = (torch.rand(6) < 0.5).float()
    return {
        "block.0.conv": {"weight": rows.view(6, 1, 1, 1).expand(6, 3, 2, 2), "bias": rows},  # not contiguous
        "fc": {"weight": torch.rand(4, 6) < 0.5, "bias": None},
    }


def test_masks_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks())
    loaded = load_masks(path)
    assert {name: set(targets) for name, targets in loaded.items()} == {
        "block.0.conv": {"weight", "bias"},
        "fc": {"weight"},
    }
    for name, targets in loaded.items():
        for target, mask in targets.items():
            assert mask.dtype == torch.float32
            assert torch.equal(mask, masks()[name][target].float())
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]


def test_the_header_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(str(path), {"fc": {"weight": torch.tensor([1.0, 0.0, 0.0, 0.0])}}, model="lenet5")
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
    assert header == {"format": FORMAT, "torch": torch.__version__, "sparsity": "0.750000", "model": "lenet5"}


def test_what_is_not_zero_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, {"fc": {"weight": torch.tensor([0.3, 0.0, -1.0, 256.0])}})
    assert load_masks(path)["fc"]["weight"].tolist() == [1.0, 0.0, 1.0, 1.0]


def test_one_mask_may_serve_two_layers(tmp_path: Path) -> None:
    mask = torch.tensor([1, 0, 1], dtype=torch.uint8)
    save_masks(tmp_path / "m", {"a": {"weight": mask}, "b": {"weight": mask}})
    assert load_masks(tmp_path / "m")["b"]["weight"].tolist() == [1.0, 0.0, 1.0]


def test_saving_again_replaces(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks())
    save_masks(path, {"fc": {"weight": torch.ones(2)}})
    assert set(load_masks(path)) == {"fc"}


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.safetensors cannot be read"):
        load_masks(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_is_an_error(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks())
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"masks, honestly", "empty": b""}[damage])
    with pytest.raises(DataError, match="cannot be read"):
        load_masks(path)


def test_another_safetensors_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"fc.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r'is no masks file: its header says \{"format": "pt"\}'):
        load_masks(path)
