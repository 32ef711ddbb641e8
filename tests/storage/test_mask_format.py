"""Masks hold 0 and 1 only: anything else is refused wherever masks come in, by its name and value, NNI's ways too."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin import shrink
from gumbel_plugin.config import PruningConfig
from gumbel_plugin.errors import TargetError
from gumbel_plugin.shrinking.mask_file import save_masks
from gumbel_plugin.shrinking.shrink import masked_copy
from gumbel_plugin.training.session import MaskingSession

INPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


ENTRY = {"op_names": ["2"], "granularity": "element", "sparse_ratio": 0.5}


def fix_masks(masks: Any) -> None:
    MaskingSession(network(), PruningConfig.load({"pruning": {"config_list": [ENTRY]}}).pruning).fix_masks(masks)


def adapter(name: str) -> Any:
    """Return something of the NNI adapter's."""
    pytest.importorskip("nni")
    module, _, attribute = f"gumbel_nni.{name}".rpartition(".")
    return getattr(importlib.import_module(module), attribute)


ENTRANCES: dict[str, Callable[[Any], Any]] = {
    "shrink": lambda masks: shrink(network(), masks, INPUTS),
    "masked_copy": lambda masks: masked_copy(network(), masks),
    "fix_masks": fix_masks,
    "gumbel_nni.speedup": lambda masks: adapter("speedup")(network(), masks, INPUTS),
    "gumbel_nni.update_masks": lambda masks: adapter("GumbelPruner")(network(), [ENTRY]).update_masks(masks),
    "remove_channels": lambda masks: adapter("compat.exact_speedup.remove_channels")(network(), masks, INPUTS),
}


def one_off(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    mask = torch.ones(2, 8, dtype=dtype)
    mask[0, 1] = value
    return mask


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates making them; files still hold them
        return torch.quantize_per_tensor(one_off(1), 1.0, 0, torch.quint8)


OTHER_VALUES = pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (one_off(65), "holds 65"),
        (one_off(0.5), "holds 0.5"),
        (one_off(-1), "holds -1"),
        (one_off(float("nan")), "holds nan"),
        (one_off(3, torch.uint8), "holds 3"),
        (one_off(1).to(torch.complex64), "another kind"),
        (one_off(1).to_sparse(), "another kind"),
        (one_off(1).to("meta"), "another kind"),
        (quantized(), "another kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
MISFITS = pytest.mark.parametrize(
    ("masks", "problem"),
    [
        ({"3": {"weight": torch.ones(2, 8)}}, "module '3'"),
        ({"22": {"weight": torch.ones(2, 8)}}, "'22', .*did you mean '2'"),
        ({"2": {"wait": torch.ones(2, 8)}}, r"2\.wait, (which is no tensor of that module|no pruning target)"),
        ({"2": {"weight": torch.ones(8, 2)}}, r"2\.weight: mask \(8, 2\)"),
        ({"2": torch.ones(2, 8)}, "masks of module '2' are Tensor"),
        ({2: {"weight": torch.ones(2, 8)}}, "masks of module 2 are dict"),
        ({"2": {3: torch.ones(2, 8)}}, "target 3"),
        (torch.ones(2, 8), "masks are a Tensor"),
    ],
)


@pytest.mark.parametrize("entrance", ENTRANCES)
@OTHER_VALUES
def test_other_values_are_refused(entrance: str, mask: Tensor, problem: str) -> None:
    with pytest.raises(TargetError, match=rf"mask for 2\.weight .*{problem}"):
        ENTRANCES[entrance]({"2": {"weight": mask}})


@pytest.mark.parametrize("entrance", ENTRANCES)
@MISFITS
def test_masks_that_fit_nothing_are_refused(entrance: str, masks: Any, problem: str) -> None:
    with pytest.raises(TargetError, match=problem):
        ENTRANCES[entrance](masks)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64])
def test_0_and_1_of_any_type_do_the_same(dtype: torch.dtype) -> None:
    mask = torch.tensor([1, 0] * 4).expand(2, 8)
    expected = shrink(network(), {"2": {"weight": mask.float()}}, INPUTS)
    small = shrink(network(), {"2": {"weight": mask.to(dtype)}}, INPUTS)
    assert small[0].out_features == 4
    assert torch.equal(small(INPUTS), expected(INPUTS))


def test_nothing_is_written_of_masks_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"mask for 2\.weight holds 0\.3"):
        save_masks(tmp_path / "masks", {"2": {"weight": one_off(0.3)}})
    assert list(tmp_path.iterdir()) == []
