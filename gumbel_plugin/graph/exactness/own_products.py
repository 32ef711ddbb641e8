"""Layers with a forward of their own: whether their weight acts as in torch's layers, by the operations that they do.

Many only pad or cast before they call `F.conv2d` or `F.linear`. Such a layer is exact like any other if

- its weight itself is what multiplies, or what becomes zero where it is zero (cast, scaled), and
- zeros that it reads are zeros where the weight acts on them, so that gates may act on either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from gumbel_plugin.layers.geometry import groups_of, is_transposed, output_dimension

_COPIES = ("detach", "alias", "_to_copy", "clone", "contiguous", "lift_fresh")
_VIEWS = ("view", "_unsafe_view", "reshape")

# By aten name: the places of the tensor that is read and of the weight, and whether the weight is (in, out) there.
_PRODUCTS: dict[str, tuple[int, int, bool]] = {
    "mm": (0, 1, True),
    "addmm": (1, 2, True),
    "linear": (0, 1, False),
    "mv": (1, 0, False),
    "addmv": (2, 1, False),
    "convolution": (0, 1, False),
}


class OwnProducts:
    """Watches one call of a layer, operation by operation.

    Attributes:
        layer: The layer.
        fault: Why it is not exact, empty as long as it is.
        acted: Whether its weight has acted.
    """

    def __init__(
        self, name: str, layer: nn.Module, read: Sequence[Tensor], act: Callable[[Tensor, Tensor], None]
    ) -> None:
        """Start before the forward.

        Args:
            name: The layer's name.
            layer: The layer.
            read: What it gets; gates may act there.
            act: Called with what the weight multiplies, and the product.
        """
        self.fault = ""
        self._name, self.layer, self._act = name, layer, act
        self.acted = False
        self._own = {id(parameter) for parameter in layer.parameters(recurse=False)}
        self._weights = WeakTensorKeyDictionary()  # what is the weight, and whether it is transposed
        self._parts = WeakTensorKeyDictionary()  # what is a view of it
        self._images = WeakTensorKeyDictionary()  # what is zero where that is which the layer reads
        self._weights[layer.weight] = False
        for tensor in read:
            self._images[tensor] = True

    def owns(self, tensor: Tensor) -> bool:
        """Whether a parameter is the layer's own."""
        return id(tensor) in self._own

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> bool:
        """Look at an operation that was done; return whether nobody else needs to: the weight acted, or is to blame."""
        with _disable_current_modes():
            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            if any(leaf in self._weights or leaf in self._parts for leaf in leaves):
                return self._use(func, args, kwargs, leaves, outputs)
            if any(leaf in self._images for leaf in leaves) and self._keeps_zeros(func, args, kwargs, self._images):
                for output in outputs:
                    self._images[output] = True
        return False

    def end(self) -> None:
        """Look back after the forward."""
        if not self.acted:
            self._blame(f"{self._name} does not use its weight as a {_kind(self.layer)} does")

    def _use(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        leaves: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> bool:
        name = str(func._schema.name).removeprefix("aten::")
        if name in _PRODUCTS and self._is_product(name, args):
            x = args[_PRODUCTS[name][0]]
            if x not in self._images:
                self._blame(f"{self._name} makes something else of the zeros that it reads before its weight acts")
            self.acted = True
            self._act(x, outputs[0])
            return True
        form = self._form_after(func, name, args, kwargs, leaves)
        if form is not None:
            self._weights[outputs[0]] = form
        elif func._schema.returns[0].alias_info is not None and not func._schema.is_mutable:
            self._parts.update(dict.fromkeys(outputs, True))
        elif any(leaf in self._images for leaf in leaves):
            self._blame(f"{self._name} uses its weight in {func._schema.name}, not as a {_kind(self.layer)} does")
        else:
            self._blame(f"{self._name} computes another weight from its own ({func._schema.name})")
        return bool(self.fault)

    def _is_product(self, name: str, args: tuple[Any, ...]) -> bool:
        read, weight, swapped = _PRODUCTS[name]
        if args[weight] not in self._weights or args[read] in self._weights:
            return False
        if name == "convolution":
            return bool(args[6] == is_transposed(self.layer) and args[8] == groups_of(self.layer))
        stored_swapped = output_dimension(self.layer) == 1
        return bool((self._weights[args[weight]] != stored_swapped) == swapped)

    def _form_after(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: Sequence[Tensor]
    ) -> bool | None:
        """Return whether the result is the weight transposed; None if it is the weight no more."""
        weight = args[0] if args and isinstance(args[0], Tensor) else None
        form: bool | None = self._weights[weight] if weight is not None and weight in self._weights else None
        if weight is not None and form is not None:
            if name in _COPIES or (name in _VIEWS and tuple(args[1]) == tuple(weight.shape)):
                return form
            flips = name == "t" or (name == "transpose" and {dim % 2 for dim in args[1:]} == {0, 1})
            if weight.dim() == 2 and (flips or (name == "permute" and [dim % 2 for dim in args[1]] == [1, 0])):
                return not form
        forms = {bool(self._weights[leaf]) for leaf in leaves if leaf in self._weights}
        others = [leaf for leaf in leaves if leaf not in self._weights]
        alone = len(forms) == 1 and all(other.numel() == 1 and other not in self._images for other in others)
        pointwise = torch.Tag.pointwise in func.tags and not func._schema.is_mutable
        if alone and pointwise and self._keeps_zeros(func, args, kwargs, self._weights):
            return forms.pop()
        return None

    def _keeps_zeros(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], zeros: Any) -> bool:
        """Whether an operation makes zeros of zeros in place of some tensors."""

        def emptied(leaf: Any) -> Any:
            return torch.zeros_like(leaf) if isinstance(leaf, Tensor) and leaf in zeros else leaf

        with torch.no_grad():
            result = func(*tree_map(emptied, args), **tree_map(emptied, dict(kwargs)))
        return all(not leaf.any() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))

    def _blame(self, fault: str) -> None:
        self.fault = self.fault or fault


def _kind(layer: nn.Module) -> str:
    """Return the class of torch's layers that a layer is derived from."""
    kinds = (each.__name__ for each in type(layer).__mro__ if each.__module__.startswith("torch.nn."))
    return next(kinds, type(layer).__name__)
