"""The geometry of layers: which dimension of a weight runs over which channels. One definition for everybody."""

from __future__ import annotations

from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.layers.weights import read_weight


def input_channels(layer: nn.Module) -> int:
    """Return how many input channels a convolution or linear layer reads."""
    if is_input_major(layer):
        return int(read_weight(layer).shape[0])
    channels = getattr(layer, "in_channels", getattr(layer, "in_features", None))
    if not isinstance(channels, int):
        raise ConfigError(f"{type(layer).__name__} has neither in_channels nor in_features")
    return channels


def layer_channels(layer: nn.Module) -> tuple[int, int]:
    """Return how many input and output channels a layer has; of a normalization both are the same."""
    if is_input_major(layer):
        before_and_after: tuple[int, int] = tuple(read_weight(layer).shape)  # type: ignore[assignment]
        return before_and_after
    for before, after in (("in_channels", "out_channels"), ("in_features", "out_features")):
        if hasattr(layer, before):
            return int(getattr(layer, before)), int(getattr(layer, after))
    width = layer.weight.shape[-1] if isinstance(layer.weight, Tensor) else 0
    return width, width


def is_matrix(layer: nn.Module) -> bool:
    """Whether a layer sums over its inputs: a convolution or a linear layer."""
    has_width = hasattr(layer, "in_channels") or hasattr(layer, "in_features") or is_input_major(layer)
    return has_width and isinstance(getattr(layer, "weight", None), Tensor)


def is_input_major(layer: nn.Module) -> bool:
    """Whether a layer is a linear one whose weight is (in, out): the ``Conv1D`` of transformers (GPT-2's)."""
    kinds = type(layer).__mro__
    return any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in kinds)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer's weight is (in, out / groups, ...): of a transposed convolution, or see `is_input_major`."""
    return bool(getattr(layer, "transposed", False)) or is_input_major(layer)


def groups_of(layer: nn.Module) -> int:
    """Return into how many groups a convolution divides its channels; 1 for any other layer."""
    return int(getattr(layer, "groups", 1))


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a convolution keeps its channels apart: output channel c reads input channel c and no other.

    A convolution with a channel multiplier (2 inputs, 4 outputs, 2 groups) is none, and neither is one whose every
    output reads a group of inputs (4 inputs, 2 outputs, 2 groups): the numbers of their channels differ.
    """
    groups = groups_of(layer)
    return 1 < groups == layer.in_channels == layer.out_channels


def channel_dimension(layer: nn.Module) -> int:
    """Return the dimension of a layer's input and output that runs over channels; of a batch norm it is the second."""
    if hasattr(layer, "kernel_size"):
        return -1 - len(layer.kernel_size)  # type: ignore[arg-type]
    return -1 if isinstance(layer, nn.Linear | nn.LayerNorm | nn.Embedding) or is_input_major(layer) else 1


def output_dimension(layer: nn.Module) -> int | None:
    """Return the dimension of a layer's weight that runs over its output channels; None if no single one does."""
    if isinstance(layer, nn.Embedding):  # (vocabulary, channels)
        return 1
    if not is_transposed(layer):
        return 0
    if groups_of(layer) == 1:  # (in, out, ...)
        return 1
    # (in, out / groups, ...): the outputs of all groups share dimension 1, unless every channel is a group of its own.
    return 0 if is_depthwise(layer) else None


def input_dimension(layer: nn.Module) -> int:
    """Return the dimension of a layer's weight that runs over its input channels."""
    return 0 if is_transposed(layer) else 1


def rows_view(layer: nn.Module, rows: Tensor) -> Tensor:
    """Shape one value per output channel so that it multiplies the layer's weight.

    Args:
        layer: Any layer of which `output_dimension` is not None.
        rows: One value per output channel, shape (out_channels,).

    Returns:
        A tensor that broadcasts against ``layer.weight``.
    """
    dimension = output_dimension(layer)
    assert dimension is not None
    return rows.reshape([-1 if each == dimension else 1 for each in range(read_weight(layer).dim())])


def columns_view(layer: nn.Module, columns: Tensor) -> Tensor:
    """Shape one value per input channel so that it multiplies the layer's weight.

    Args:
        layer: A convolution (grouped, transposed) or linear layer.
        columns: One value per input channel, shape (in_channels,).

    Returns:
        A tensor that broadcasts against ``layer.weight``.
    """
    tail = (1,) * (-1 - channel_dimension(layer))
    if is_transposed(layer):  # weight is (in, out / groups, ...)
        return columns.reshape(-1, 1, *tail)
    groups = groups_of(layer)
    if groups == 1:
        return columns.reshape(1, -1, *tail)
    # Weight rows of group g read inputs g*c .. (g+1)*c - 1 only: repeat each group's columns for each of its rows.
    rows = layer_channels(layer)[1] // groups
    return columns.reshape(groups, 1, -1).expand(-1, rows, -1).reshape(groups * rows, -1, *tail)


def column_sums(layer: nn.Module, values: Tensor) -> Tensor:
    """Sum values over everything that reads the same input channel.

    Args:
        layer: A convolution (grouped, transposed) or linear layer.
        values: Of the weight's shape.

    Returns:
        Shape (in_channels,).
    """
    if is_transposed(layer):
        return values.flatten(1).sum(1)
    per_group = values.reshape(groups_of(layer), -1, values.shape[1], values[0, 0].numel())
    return per_group.sum((1, 3)).flatten()  # from (groups, out / groups, in / groups, kernel)


def read_channels(layer: nn.Module) -> Tensor:
    """Return which input channels of a convolution or linear layer have a non-zero weight, bool, (in_channels,)."""
    nonzero = read_weight(layer).detach() != 0
    if is_transposed(layer):
        return nonzero.flatten(1).any(1)
    per_group = nonzero.reshape(groups_of(layer), -1, nonzero.shape[1], nonzero[0, 0].numel())
    return per_group.any(3).any(1).flatten()  # from (groups, out / groups, in / groups, kernel)


def written_channels(layer: nn.Module) -> Tensor | None:
    """Return which output channels have a non-zero weight, bool, (out_channels,); None if no dimension tells."""
    dimension = output_dimension(layer)
    if dimension is None:
        return None
    nonzero = (read_weight(layer).detach() != 0).movedim(dimension, 0)
    return nonzero.reshape(len(nonzero), -1).any(1)
