from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gumbel_plugin.errors import ConfigError, DataError
from gumbel_plugin.shrinking.mask_file import FORMAT, load_masks, read_header, save_masks
from gumbel_plugin.storage.tensor_file import write_tensors


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
    assert header.keys() == {"format", "sparsity", "model", "shapes", "versions", "digest"}
    assert all(isinstance(value, str) for value in header.values())
    read = read_header(path)
    assert (read["format"], read["sparsity"], read["model"]) == (FORMAT, "0.750000", "lenet5")
    assert read["shapes"] == {"fc.weight": [4]}
    assert torch.__version__.startswith(read["versions"]["torch"].partition("+")[0])


def test_the_same_masks_are_the_same_file(tmp_path: Path) -> None:
    for number in range(4):
        save_masks(tmp_path / str(number), masks(), model="lenet5")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_every_plain_type_is_a_mask(dtype: torch.dtype, tmp_path: Path) -> None:
    save_masks(tmp_path / "m", {"fc": {"weight": torch.tensor([1, 0, 1]).to(dtype)}})
    assert load_masks(tmp_path / "m")["fc"]["weight"].tolist() == [1.0, 0.0, 1.0]


def test_one_mask_may_serve_two_layers(tmp_path: Path) -> None:
    mask = torch.tensor([1, 0, 1], dtype=torch.uint8)
    save_masks(tmp_path / "m", {"a": {"weight": mask}, "b": {"weight": mask}})
    assert load_masks(tmp_path / "m")["b"]["weight"].tolist() == [1.0, 0.0, 1.0]


def test_saving_again_replaces(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks())
    save_masks(path, {"fc": {"weight": torch.ones(2)}})
    assert set(load_masks(path)) == {"fc"}


READERS = pytest.mark.parametrize("read", [load_masks, read_header])


@READERS
def test_a_missing_file_is_an_error(read: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.safetensors cannot be read"):
        read(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_is_an_error(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks())
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"masks, honestly", "empty": b""}[damage])
    with pytest.raises(DataError, match="cannot be read"):
        load_masks(path)


@READERS
@pytest.mark.parametrize("header", [{"format": "pt"}, {}])
def test_another_safetensors_file_is_an_error(
    header: dict[str, str], read: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"fc.weight": torch.ones(2)}, path, metadata=header)
    with pytest.raises(DataError, match="is no masks file: its header says " + re.escape(json.dumps(header))):
        read(path)


class TestWhatIsNoMasksFile:
    @READERS
    def test_what_would_never_end_is_not_opened(self, read: Callable[[Path], Any], tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
            with pytest.raises(DataError, match="cannot be read: it is no regular file"):
                read(path)

    @pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
    def test_a_name_that_no_file_has(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be read") as caught:
            load_masks(tmp_path / name)
        assert len(str(caught.value)) < 600
        with pytest.raises(ConfigError, match="cannot be written"):
            save_masks(tmp_path / name, masks())

    def test_other_values_than_0_and_1(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "m", {"fc.weight": torch.tensor([0, 1, 65])}, {"format": FORMAT})
        with pytest.raises(DataError, match=r"is no masks file: mask for fc\.weight holds 65"):
            load_masks(tmp_path / "m")
        torch.save({"fc": {"weight": torch.tensor([0.0, float("nan")])}}, tmp_path / "masks.pth")
        with pytest.raises(DataError, match=r"is no masks file: mask for fc\.weight holds nan"):
            load_masks(tmp_path / "masks.pth")

    def test_a_pickle(self, tmp_path: Path) -> None:
        (tmp_path / "masks.pkl").write_bytes(pickle.dumps({"fc": {"weight": [1.0]}}))
        with pytest.raises(DataError, match="cannot be read"):
            load_masks(tmp_path / "masks.pkl")

    def test_a_compressed_archive_is_not_unpacked(self, tmp_path: Path) -> None:
        """A kilobyte of it can hold gigabytes."""
        torch.save({"fc": {"weight": torch.ones(2)}}, tmp_path / "whole")
        with (
            zipfile.ZipFile(tmp_path / "whole") as whole,
            zipfile.ZipFile(tmp_path / "small", "w", zipfile.ZIP_DEFLATED) as small,
        ):
            for name in whole.namelist():
                small.writestr(name, whole.read(name))
        with pytest.raises(DataError, match="it is compressed"):
            load_masks(tmp_path / "small")


class TestDigest:
    def test_every_flipped_bit_is_found(self, tmp_path: Path) -> None:
        save_masks(tmp_path / "m", {"a": {"weight": torch.tensor([1, 0, 1, 1])}, "b": {"bias": torch.ones(3)}})
        whole = (tmp_path / "m").read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << (place % 8)
            (tmp_path / "m").write_bytes(damaged)
            with pytest.raises(DataError, match=r"m (was damaged or changed|cannot be read)|is no masks file"):
                load_masks(tmp_path / "m")

    def test_a_file_that_lost_its_digest(self, tmp_path: Path) -> None:
        save_file({"fc.weight": torch.ones(2)}, tmp_path / "m", metadata={"format": FORMAT})
        with pytest.raises(DataError, match="was damaged or changed"):
            load_masks(tmp_path / "m")

    def test_a_file_of_0_1_0_loads_with_a_warning(self) -> None:
        path = Path(__file__).parents[1] / "data" / "written_by_0_1_0" / "masks.safetensors"
        with pytest.warns(UserWarning, match=r"masks\.safetensors was written by gumbel-plugin 0\.1\.0"):
            loaded = load_masks(path)
        assert loaded["2"]["weight"].tolist() == [[0.0, 1.0] * 3] * 2
        with pytest.warns(UserWarning, match="without a digest"):
            assert read_header(path)["model"] == "tiny"


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

    @pytest.mark.parametrize(
        "content",
        [[torch.ones(2)], {"fc": torch.ones(2)}, {"fc": {"weight": 1.0}}, torch.nn.Linear(2, 2).state_dict()],
        ids=["list", "tensor", "number", "state dict"],
    )
    def test_other_content_is_an_error(self, content: Any, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "masks.pth")
        with pytest.raises(DataError, match="is no masks file"):
            load_masks(tmp_path / "masks.pth")
