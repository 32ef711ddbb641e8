"""The geometry of layers: which dimension of a weight runs over which channels. One definition for everybody."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError


def input_channels(module: torch.nn.Module) -> int:
    """Return how many input channels a convolution or linear layer reads."""
    channels = getattr(module, "in_channels", getattr(module, "in_features", None))
    if not isinstance(channels, int):
        raise ConfigError(f"{type(module).__name__} has neither in_channels nor in_features")
    return channels


def output_dimension(module: torch.nn.Module) -> int | None:
    """Return the dimension of a module's weight that runs over its output channels; None if no single one does."""
    if isinstance(module, torch.nn.Embedding):  # (vocabulary, channels)
        return 1
    if not getattr(module, "transposed", False):
        return 0
    groups = int(module.groups)  # type: ignore[arg-type]
    if groups == 1:  # (in, out, ...)
        return 1
    # (in, out / groups, ...): the outputs of all groups share dimension 1, unless every channel is a group of its own.
    return 0 if groups == module.in_channels == module.out_channels else None


def input_dimension(module: torch.nn.Module) -> int:
    """Return the dimension of a module's weight that runs over its input channels."""
    return 0 if getattr(module, "transposed", False) else 1


def columns_view(module: torch.nn.Module, columns: Tensor) -> Tensor:
    """Shape one value per input channel so that it multiplies the module's weight.

    Args:
        module: A convolution (grouped, transposed) or linear layer.
        columns: One value per input channel, shape (in_channels,).

    Returns:
        A tensor that broadcasts against ``module.weight``.
    """
    weight_dims = 2 if isinstance(module, torch.nn.Linear) else 2 + len(module.kernel_size)  # type: ignore[arg-type]
    tail = (1,) * (weight_dims - 2)
    if getattr(module, "transposed", False):  # weight is (in, out / groups, ...)
        return columns.reshape(-1, 1, *tail)
    groups = int(getattr(module, "groups", 1))
    if groups == 1:
        return columns.reshape(1, -1, *tail)
    # Weight rows of group g read inputs g*c .. (g+1)*c - 1 only: repeat each group's columns for each of its rows.
    rows = int(module.out_channels) // groups  # type: ignore[arg-type]
    return columns.reshape(groups, 1, -1).expand(-1, rows, -1).reshape(groups * rows, -1, *tail)


def layer_channels(module: nn.Module) -> tuple[int, int]:
    """Return how many input and output channels a layer has; of a normalization both are the same."""
    for before, after in (("in_channels", "out_channels"), ("in_features", "out_features")):
        if hasattr(module, before):
            return int(getattr(module, before)), int(getattr(module, after))
    weight = module.weight
    width = weight.shape[-1] if isinstance(weight, Tensor) else 0
    return width, width


def is_matrix(module: nn.Module) -> bool:
    """Whether a layer sums over its inputs: a convolution or a linear layer."""
    has_width = hasattr(module, "in_channels") or hasattr(module, "in_features")
    return has_width and isinstance(getattr(module, "weight", None), Tensor)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution keeps its channels apart, so that input and output widths are one."""
    groups = getattr(module, "groups", 1)
    return bool(groups > 1 and groups == module.out_channels)


def read_channels(module: nn.Module) -> Tensor:
    """Return which input channels of a convolution or linear layer have a non-zero weight, bool, (in_channels,)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    nonzero = weight.detach() != 0
    groups = int(getattr(module, "groups", 1))
    if getattr(module, "transposed", False):  # (in, out / groups, ...)
        return nonzero.flatten(1).any(1)
    per_group = nonzero.reshape(groups, -1, *nonzero.shape[1:])  # (groups, out / groups, in / groups, ...)
    return per_group.flatten(3).any(3).any(1).flatten() if nonzero.dim() > 2 else per_group.any(1).flatten()
