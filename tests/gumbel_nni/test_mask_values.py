"""Masks of other values than 0 and 1, or that fit nothing, are refused by the NNI adapter as by the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import gumbel_nni
from gumbel_plugin.errors import TargetError
from tests.storage.test_mask_format import ENTRY, INPUTS, MISFITS, OTHER_VALUES, network

ENTRANCES: dict[str, Callable[[Any], Any]] = {
    "speedup": lambda masks: gumbel_nni.speedup(network(), masks, INPUTS),
    "update_masks": lambda masks: gumbel_nni.GumbelPruner(network(), [ENTRY]).update_masks(masks),
}


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
