from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gumbel_plugin.errors import DataError
from gumbel_plugin.shrinking.mask_file import FORMAT, load_masks, read_header, save_masks


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
    assert header.keys() == {"format", "sparsity", "model", "shapes", "versions"}
    assert all(isinstance(value, str) for value in header.values())
    read = read_header(path)
    assert (read["format"], read["sparsity"], read["model"]) == (FORMAT, "0.750000", "lenet5")
    assert read["shapes"] == {"fc.weight": [4]}
    assert torch.__version__.startswith(read["versions"]["torch"].partition("+")[0])


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


class TestOldFiles:
    """What NNI's users have: torch.save(pruner.get_masks(), path)."""

    def test_is_read_with_a_warning(self, tmp_path: Path) -> None:
        old: defaultdict[str, dict[str, torch.Tensor | None]] = defaultdict(dict)
        old.update(masks())
        torch.save(old, tmp_path / "masks.pth")
        with pytest.warns(UserWarning, match=r"masks\.pth is a torch\.save file; .*save_masks"):
            loaded = load_masks(tmp_path / "masks.pth")
        save_masks(tmp_path / "new", masks())
        expected = load_masks(tmp_path / "new")
        assert loaded.keys() == expected.keys()
        for name, targets in expected.items():
            assert loaded[name].keys() == targets.keys()
            assert all(torch.equal(mask, loaded[name][target]) for target, mask in targets.items())

    def test_runs_no_code(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "sprung",))

        torch.save({"fc": {"weight": Trap()}}, tmp_path / "masks.pth")
        with pytest.raises(DataError, match=r"masks\.pth cannot be read"):
            load_masks(tmp_path / "masks.pth")
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize("content", [[torch.ones(2)], {"fc": torch.ones(2)}, {"fc": {"weight": 1.0}}])
    def test_other_content_is_an_error(self, content: Any, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "masks.pth")
        with pytest.raises(DataError, match="is no masks file"):
            load_masks(tmp_path / "masks.pth")

    def test_a_state_dict_is_an_error(self, tmp_path: Path) -> None:
        torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pth")
        with pytest.raises(DataError, match="is no masks file"):
            load_masks(tmp_path / "weights.pth")


def test_a_header_can_be_read_of_masks_files_only(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match="is no masks file"):
        read_header(tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match="cannot be read"):
        read_header(tmp_path / "nowhere")
