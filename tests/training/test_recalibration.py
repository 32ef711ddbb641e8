"""Running statistics of batch norms, estimated anew with hard masks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin import MaskingSession, recalibrate
from gumbel_plugin.errors import ConfigError, DataError


class Norms(nn.Module):
    """Batch norms of all dimensions, dropout, and one norm without statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv3, self.bn3 = nn.Conv3d(1, 3, 1), nn.BatchNorm3d(3, momentum=0.3)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)
        self.conv1, self.bn1 = nn.Conv1d(4, 5, 1), nn.BatchNorm1d(5, momentum=None)
        self.plain, self.drop = nn.BatchNorm1d(5, track_running_stats=False), nn.Dropout(0.9)
        self.unused = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn3(self.conv3(x.reshape(len(x), 1, 2, 4, 4))).mean(2)
        x = self.drop(torch.relu(self.bn2(self.conv2(x))))
        return self.plain(self.bn1(self.conv1(x.flatten(2))).mean(2))


def batches(count: int = 5, size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 32, generator=generator) for _ in range(count)]


def direct(model: Norms, data: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute in float64, by the definition: means over the batches of each batch's mean and unbiased variance."""
    model = copy.deepcopy(model).double()

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.transpose(0, 1).flatten(1)
        return rows.mean(1), rows.var(1)

    def normalized(x: Tensor, norm: Any) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        rows = x.transpose(0, 1).flatten(1)
        scale = norm.weight / (rows.var(1, unbiased=False) + norm.eps).sqrt()
        return (x - rows.mean(1).view(shape)) * scale.view(shape) + norm.bias.view(shape)

    found: dict[str, list[tuple[Tensor, Tensor]]] = {"bn3": [], "bn2": [], "bn1": []}
    with torch.no_grad():
        for batch in data:
            x = model.conv3(batch.double().reshape(len(batch), 1, 2, 4, 4))
            found["bn3"].append(moments(x))
            x = model.conv2(normalized(x, model.bn3).mean(2))
            found["bn2"].append(moments(x))
            x = model.conv1(torch.relu(normalized(x, model.bn2)).flatten(2))
            found["bn1"].append(moments(x))
    return {
        name: (torch.stack([m for m, _ in of]).mean(0), torch.stack([v for _, v in of]).mean(0))
        for name, of in found.items()
    }


def disturbed() -> Norms:
    model = Norms().train()
    for norm in (model.bn3, model.bn2, model.bn1, model.unused):
        nn.init.uniform_(norm.running_mean, 3, 4)
        nn.init.uniform_(norm.running_var, 3, 4)
        norm.num_batches_tracked.fill_(17)
    return model


def test_statistics_are_those_of_a_direct_computation() -> None:
    model, data = disturbed(), batches()
    assert recalibrate(model, data) == 5
    for name, (mean, variance) in direct(model, data).items():
        norm: Any = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)


def test_all_else_is_as_it_was() -> None:
    model = disturbed()
    model.drop.eval()
    before = copy.deepcopy(model)
    weights = [parameter.clone() for parameter in model.parameters()]
    random = torch.get_rng_state()
    recalibrate(model, batches())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [model.bn3.momentum, model.bn2.momentum, model.bn1.momentum] == [0.3, 0.1, None]
    assert int(model.bn3.num_batches_tracked) == int(model.bn1.num_batches_tracked) == 17
    assert torch.equal(model.unused.running_mean, before.unused.running_mean)  # no forward reaches it
    assert torch.equal(model.unused.running_var, before.unused.running_var)
    assert model.plain.running_mean is None


@pytest.mark.parametrize("form", ["tensor", "pair", "nested", "dict"])
def test_forms_of_batches(form: str) -> None:
    forms: dict[str, Any] = {
        "tensor": lambda x: x,
        "pair": lambda x: [x, torch.zeros(len(x)), "more"],
        "nested": lambda x: ((x,), torch.zeros(len(x))),
        "dict": lambda x: {"x": x},
    }
    expected, model = disturbed(), disturbed()
    recalibrate(expected, batches())
    recalibrate(model, map(forms[form], batches()))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), expected.buffers(), strict=True))


def test_stops_after_some_batches() -> None:
    drawn = []

    def endless() -> Iterator[Tensor]:
        while True:
            drawn.append(1)
            yield batches(1)[0]

    assert recalibrate(Norms(), endless(), batches=3) == 3 == len(drawn)
    assert recalibrate(Norms(), batches(4), batches=None) == 4
    assert recalibrate(nn.Linear(2, 2), endless()) == 0
    with pytest.raises(ConfigError, match="batches = 0"):
        recalibrate(Norms(), endless(), batches=0)


def test_statistics_stay_where_it_fails() -> None:
    model = disturbed()
    before = copy.deepcopy(model)
    with pytest.raises(DataError, match="no batch"):
        recalibrate(model, [])
    with pytest.raises(RuntimeError):
        recalibrate(model, [*batches(2), torch.zeros(1, 7)])
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))
    assert model.bn3.momentum == 0.3
    assert model.bn3.training


def test_norms_whose_count_was_taken_away() -> None:
    model, expected = disturbed(), disturbed()
    model.bn3.num_batches_tracked = None
    recalibrate(model, batches())
    recalibrate(expected, batches())
    assert model.bn3.num_batches_tracked is None
    assert torch.equal(model.bn3.running_mean, expected.bn3.running_mean)


def test_a_gated_network_has_its_hard_masks() -> None:
    """In the middle of the mask learning the statistics are those of the network that would be decided now."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    data = [torch.randn(8, 2, 6, 6) for _ in range(4)]
    session = MaskingSession(model, [{"op_types": ["Conv2d"]}], example_inputs=data[0], seed=3)
    session.start(50)
    with torch.no_grad():
        for gates in session.gate_parameters():
            gates.normal_()
    model.train()
    session.step()
    noise = session.plan.noise.forward
    assert recalibrate(model, data) == 4
    assert session.plan.noise.forward == noise  # no sample was drawn
    assert model.training
    found = [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]
    assert 0.2 < session.extract()["0"]["weight"].mean() < 0.8
    session.detach()
    recalibrate(model, data)
    expected = [buffer for name, buffer in model.named_buffers() if "running" in name]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
