"""What many tests of groups do: close units of every exact group, remove them, and compare the outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.layers.geometry import columns_view, input_channels
from gumbel_plugin.shrinking.equivalence import verify_equivalence
from gumbel_torch_pruning import DependencyGroups


class Net(nn.Module):
    """A network whose forward is given, over named layers and parameters."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **terms: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, term in terms.items():
            setattr(self, name, term)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@torch.no_grad()
def perturbed(model: nn.Module) -> nn.Module:
    """Give all parameters and statistics random values, in place."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def cut_everywhere(model: nn.Module, inputs: Any) -> dict[str, str]:
    """Remove about a third of the units of every exact group; the outputs must stay as they are with closed units.

    Returns:
        By group name, why a group is not exact; empty for those that are, of which units were removed.
    """
    model = perturbed(model)
    small = copy.deepcopy(model)
    dependency = DependencyGroups(small, inputs)
    generator = torch.Generator().manual_seed(1)
    exact = [group for group in dependency.groups if group.safety == "exact"]
    units = {g.name: torch.randperm(g.size, generator=generator)[: max(1, g.size // 3)] for g in exact}
    for group in exact:
        for part in group.consumers:
            layer: Any = model.get_submodule(part.module)
            columns = torch.ones(input_channels(layer))
            columns[part.positions[torch.isin(part.units, units[group.name])]] = 0
            layer.weight.data.mul_(columns_view(layer, columns).to(layer.weight))
    if exact:
        dependency.remove_all(units)
        verify_equivalence(model, small, inputs).raise_for_failure()
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return {group.name: group.reason for group in dependency.groups}


def exact_groups(model: nn.Module, inputs: Any) -> set[str]:
    """Return the names of the groups of which `cut_everywhere` has removed units."""
    return {name for name, reason in cut_everywhere(model, inputs).items() if not reason}
