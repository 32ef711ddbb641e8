"""Gates that are functions of the weights."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from gumbel_plugin.errors import ConfigError, TargetError
from gumbel_plugin.masks.base import LearnedMask, MaskOptions
from gumbel_plugin.masks.functional import at_least_float32
from gumbel_plugin.sparsity.types import CHANNEL


class WeightDependent(LearnedMask):
    """Gates that are functions of the one weight that they multiply, so they cannot be whole channels."""

    Options: ClassVar[type[MaskOptions]] = MaskOptions
    needs_trained_weights: ClassVar[bool] = True

    @override
    def check_units(self) -> None:
        if self.sparsity_type == CHANNEL:
            raise ConfigError(
                "granularity 'out_channel' (NNI's 'default') removes channels across layers, but the gates of a "
                f"{type(self).__name__} are functions of one layer's weight; use 'element', or as far as the method "
                "has them 'kernel', or [1, -1, -1, -1] for the filters of each layer alone"
            )

    @override
    def create_latents(self) -> None:
        """Register nothing: by default, only the weights are learned."""

    def read(self, weight: Tensor | None) -> Tensor:
        """Return the weight that the gates are functions of, in float32 or float64."""
        if weight is None:
            raise TargetError(f"the gates of a {type(self).__name__} are functions of a weight; none was given")
        return at_least_float32(weight)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over each unit of values of the weight's shape."""
        return self.sparsity_type.reduce(values) / self.sparsity_type.unit_size(values.shape)
