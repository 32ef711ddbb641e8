from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.layers.example_inputs import (
    batch_size_of,
    call_model,
    checked_inputs,
    dtype_of,
    inputs_following,
    inputs_on_device_of,
    observing,
    random_inputs_like,
    with_batch_size,
)
from gumbel_plugin.shrinking.equivalence import verify_equivalence


class Weighted(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return 2 * a + 3 * b


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ONE, TEN = torch.tensor([1.0]), torch.tensor([10.0])


@pytest.mark.parametrize(
    "inputs",
    [(ONE, TEN), [ONE, TEN], {"b": TEN, "a": ONE}, UserDict({"b": TEN, "a": ONE})],
    ids=lambda i: type(i).__name__,
)
def test_tuples_and_lists_are_positional_and_mappings_are_keywords(inputs) -> None:
    assert call_model(Weighted(), inputs).item() == 32.0


def test_a_tensor_is_the_one_argument() -> None:
    assert call_model(nn.Identity(), ONE) is ONE


@pytest.mark.parametrize("inputs", ["image", 3, None])
def test_other_inputs_are_refused_by_name(inputs) -> None:
    with pytest.raises(ConfigError, match=f"example_inputs is a {type(inputs).__name__}"):
        call_model(Weighted(), inputs)


def test_floating_inputs_become_standard_normal_of_the_same_shape() -> None:
    drawn = random_inputs_like(torch.full((100, 100), 7.0), seeded())
    assert drawn.shape == (100, 100)
    assert drawn.dtype == torch.float32
    assert abs(drawn.mean().item()) < 0.05
    assert abs(drawn.std().item() - 1) < 0.05


def test_the_dtype_changes_floating_inputs_only_and_not_the_numbers() -> None:
    inputs = {"x": torch.zeros(3), "ids": torch.arange(6).view(2, 3), "keep": torch.tensor([True, False]), "scale": 2}
    narrow = random_inputs_like(inputs, seeded())
    wide = random_inputs_like(inputs, seeded(), torch.float64)
    assert wide["x"].dtype == torch.float64
    torch.testing.assert_close(wide["x"].float(), narrow["x"], rtol=0, atol=0)
    assert torch.equal(wide["ids"], narrow["ids"])
    assert wide["ids"].dtype == torch.int64
    assert torch.equal(wide["keep"], inputs["keep"])
    assert wide["scale"] == 2


def test_integer_rows_keep_their_values_in_another_order() -> None:
    ids = torch.arange(60).view(3, 20)
    drawn = random_inputs_like(ids, seeded())
    assert not torch.equal(drawn, ids)
    assert torch.equal(drawn.sort(dim=-1).values, ids)


def test_the_structure_is_kept_and_the_example_is_not_written_to() -> None:
    images = [torch.zeros(3, 4), torch.zeros(3, 5)]
    (drawn,) = random_inputs_like((images,), seeded())
    assert [tuple(image.shape) for image in drawn] == [(3, 4), (3, 5)]
    assert all(not image.any() for image in images)


def test_draws_repeat_under_a_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (random_inputs_like(torch.zeros(4), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_repeat_or_are_cut_to_a_batch_size() -> None:
    inputs = {"x": torch.arange(3.0), "table": torch.ones(5, 2), "scale": torch.tensor(2.0)}
    assert batch_size_of(inputs) == 3
    grown = with_batch_size(inputs, 7)
    assert grown["x"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert grown["table"].shape == (5, 2)
    assert grown["scale"].item() == 2
    assert with_batch_size(inputs, 1)["x"].tolist() == [0]


def test_a_batch_needs_a_tensor_and_a_positive_size() -> None:
    with pytest.raises(ConfigError, match="no tensor with a batch dimension"):
        batch_size_of((torch.tensor(1.0), 3))
    with pytest.raises(ConfigError, match="batch size is 0"):
        with_batch_size(ONE, 0)


def test_inputs_go_where_the_model_is() -> None:
    moved = inputs_on_device_of(nn.Linear(1, 1, device="meta"), (ONE, 3))
    assert moved[0].device.type == "meta"
    assert moved[1] == 3
    assert inputs_on_device_of(nn.Identity(), ONE).device.type == "cpu"


def test_inputs_take_the_dtype_that_the_model_was_moved_to() -> None:
    model = nn.Linear(1, 1).double()
    moved = inputs_following(model, (ONE, ONE.half(), torch.tensor(3)), torch.float32)
    assert [tensor.dtype for tensor in moved] == [torch.float64, torch.float16, torch.int64]
    assert dtype_of(model) == torch.float64
    assert dtype_of(nn.Identity()) == torch.get_default_dtype()


def test_observing_leaves_no_trace_even_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model.train()
    model[0].eval()
    before = torch.get_rng_state()

    def fail_while_observed() -> None:
        with observing(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            torch.rand(3)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_while_observed()
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (torch.tensor([[1.0, float("nan")]]), r"shape \(1, 2\) holds NaN"),
        ((ONE, {"b": [torch.tensor([float("nan")])]}), r"shape \(1,\) holds NaN"),
        (torch.zeros(0, 6), r"shape \(0, 6\) is empty; pass a sample"),
        (torch.zeros(2, 3, device="meta"), "on the meta device"),
        ({"text": "words"}, r"\{'text': 'words'\}: there is no tensor in it"),
        ((), "there is no tensor in it"),
        (None, "example_inputs is a NoneType"),
        ("image.png", "example_inputs is a str"),
    ],
)
def test_inputs_that_nothing_can_be_traced_or_compared_with(inputs: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        checked_inputs(inputs)
    with pytest.raises(ConfigError, match=reason):
        verify_equivalence(Weighted(), Weighted(), inputs)


@pytest.mark.parametrize(
    "inputs",
    [
        (ONE, torch.tensor([[0.0, float("-inf")]])),  # an additive attention mask
        (ONE, torch.zeros(1, 0, 4)),  # an empty cache
        {"ids": torch.tensor([[1, 2]]), "past": None},
        torch.tensor(3.0),
    ],
)
def test_infinities_and_empty_parts_are_left_to_the_model(inputs: Any) -> None:
    assert checked_inputs(inputs) is inputs


@pytest.mark.parametrize("inputs", [[ONE, TEN], UserDict({"b": TEN, "a": ONE})], ids=lambda i: type(i).__name__)
def test_inputs_are_normalized_once(inputs: Any) -> None:
    normalized = checked_inputs(inputs)
    assert type(normalized) in (tuple, dict)
    assert checked_inputs(normalized) is normalized
    assert call_model(Weighted(), normalized).item() == 32.0
