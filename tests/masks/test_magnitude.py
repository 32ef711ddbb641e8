from __future__ import annotations

import pytest
import torch

from gumbel_plugin.errors import TargetError
from gumbel_plugin.masks.base import MaskOptions, NoiseSource, Phase
from gumbel_plugin.masks.magnitude import MagnitudeMask, RandomMask
from gumbel_plugin.sparsity.types import ELEMENT, KERNEL, SparsityType, granularity_of


def magnitude(weight: torch.Tensor, granularity: SparsityType) -> MagnitudeMask:
    return MagnitudeMask(granularity.latent_shape(weight.shape), MaskOptions(), NoiseSource(), 0, granularity)


def random(shape: tuple[int, ...], seed: int = 0, stream: int = 0) -> RandomMask:
    return RandomMask(shape, MaskOptions(), NoiseSource(seed), stream, ELEMENT)


def test_a_weights_score_is_its_absolute_value() -> None:
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(magnitude(weight, ELEMENT).scores(weight), weight.abs())


@pytest.mark.parametrize("granularity", [KERNEL, granularity_of([1, -1, -1, -1]), granularity_of([2, 2, 3, 3])])
def test_a_units_score_is_the_root_mean_square_of_its_weights(granularity: SparsityType) -> None:
    weight = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    scores = magnitude(weight, granularity).scores(weight)
    rows, columns = weight.shape[0] // scores.shape[0], weight.shape[1] // scores.shape[1]
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            unit = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            torch.testing.assert_close(scores[i, j].squeeze(), (unit**2).mean().sqrt())


@pytest.mark.parametrize("kind", [MagnitudeMask, RandomMask])
def test_nothing_is_masked_before_it_is_decided(kind: type[MagnitudeMask | RandomMask]) -> None:
    weight = torch.randn(4, 3)
    mask = kind((4, 3), MaskOptions(), NoiseSource(), 0, ELEMENT)
    mask.phase, mask.sparsity = Phase.LEARNING, 0.9
    for _ in range(2):
        assert mask.mask_weight(weight) is weight
        assert bool(mask.gates(weight).all())
        mask.eval()
    assert list(mask.parameters()) == []
    mask.fix(torch.eye(4, 3))
    assert torch.equal(mask.mask_weight(weight), weight * torch.eye(4, 3))


def test_random_scores_depend_on_the_seed_and_the_mask() -> None:
    first = random((50, 20)).scores(None)
    torch.manual_seed(3)
    assert torch.equal(first, random((50, 20)).scores(None))
    assert not torch.equal(first, random((50, 20), seed=1).scores(None))
    assert not torch.equal(first, random((50, 20), stream=1).scores(None))
    assert first.unique().numel() > 990
    loaded = random((50, 20), seed=1)
    loaded.load_state_dict(random((50, 20)).state_dict())
    assert torch.equal(first, loaded.scores(None))


def test_a_magnitude_of_no_weight_is_an_error() -> None:
    with pytest.raises(TargetError, match="MagnitudeMask are functions of a weight"):
        magnitude(torch.ones(2, 2), ELEMENT).scores(None)
