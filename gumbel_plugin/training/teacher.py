"""A teacher beside a student: its weights, its layers' outputs, and what of them a narrower student has kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gumbel_plugin.errors import DataError, TargetError, nearest, shown_path
from gumbel_plugin.graph.record import kept_of
from gumbel_plugin.layers.example_inputs import named_tensors
from gumbel_plugin.layers.geometry import output_dimension
from gumbel_plugin.layers.weights import Attached, plain_copy, read_tensor
from gumbel_plugin.shrinking.pruned_file import HINT, load_pruned
from gumbel_plugin.storage.files import check_readable
from gumbel_plugin.storage.tensor_file import read_tensors, torch_content

_KIND = "teacher file"


@dataclass(frozen=True)
class Held:
    """A teacher, which copies share, pickles lack, and a change that is taken back leaves alone."""

    module: nn.Module | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return self

    def __reduce__(self) -> tuple[type[Held], tuple[None]]:
        return type(self), (None,)


class Outputs:
    """The outputs of some layers in one forward, by the layer's name, in the order of their calls."""

    def __init__(self) -> None:
        self._found: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self.watching = False

    def watch(self, model: nn.Module, names: Sequence[str]) -> None:
        """Hook the layers of these names until `take` or `clear`."""
        self._found = {name: [] for name in names}
        self.watching = True
        for name in names:
            keep = _Keep(name, self._found[name]).keep
            self._handles.append(model.get_submodule(name).register_forward_hook(keep))

    def take(self) -> dict[str, list[Tensor]]:
        """Return what was found, and leave the layers."""
        found = self._found
        self.clear()
        return found

    def clear(self) -> None:
        """Leave the layers, and forget what was found."""
        for handle in self._handles:
            handle.remove()
        self._found, self._handles, self.watching = {}, [], False

    def __deepcopy__(self, memo: dict[int, Any]) -> Outputs:
        return Outputs()  # tensors of an interrupted forward cannot be copied

    def __reduce__(self) -> tuple[type[Outputs], tuple[()]]:
        return type(self), ()


@dataclass
class _Keep(Attached):
    name: str
    found: list[Tensor]

    def keep(self, layer: nn.Module, args: Any, output: Any) -> None:
        tensor = compared(output)
        if tensor is None:
            raise TargetError(f"distillation.layers: {self.name!r} returns no floating point tensor to compare")
        self.found.append(tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Keep:
        return _Keep(self.name, [])


def compared(output: Any) -> Tensor | None:
    """Return the tensor of an output that is compared: its ``logits``, or the first that is no single number."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    tensors = (tensor for _, tensor in named_tensors(output))
    return next((tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() > 0), None)


def matching(patterns: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return the modules, of those that student and teacher both have, that names or patterns mean, in their order.

    Raises:
        TargetError: If one means none.
    """
    found: set[str] = set()
    for pattern in patterns:
        own = {pattern} if pattern in modules else {name for name in modules if re.fullmatch(pattern, name)}
        if not own:
            raise TargetError(
                f"distillation.layers: {pattern!r} matches no module that network and teacher both have"
                f"{nearest(pattern, modules)}"
            )
        found |= own
    return [name for name in modules if name in found]


def on_kept_channels(student: nn.Module, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """Return of a teacher's layer the channels that the student's layer has kept.

    Raises:
        TargetError: If the widths differ, and it is not known which channels were kept.
    """
    if ours.shape == theirs.shape:
        return theirs
    layer = student.get_submodule(name)
    dims = kept_of(student).get(f"{name}.weight")
    dim = output_dimension(layer) if dims else None
    kept = None if dims is None or dim is None else dims[dim]
    differing = [d for d, (a, b) in enumerate(zip(ours.shape, theirs.shape, strict=False)) if a != b]
    if ours.dim() == theirs.dim() and len(differing) == 1 and kept is not None:
        (along,) = differing
        if len(kept) == ours.shape[along] and int(kept.max()) < theirs.shape[along]:
            return theirs.index_select(along, kept.to(theirs.device))
    raise TargetError(
        f"distillation.layers: {name!r} gives {tuple(ours.shape)} in the network and {tuple(theirs.shape)} in the "
        "teacher, and nothing says which of its channels were kept; name layers that keep their width (what follows an "
        "addition), or convolutions and linear layers themselves"
    )


def read_teacher(model: nn.Module, path: str | Path | None) -> nn.Module:
    """Return a network of the model's kind, without gradients: a copy of it, or one with the weights of a file.

    Args:
        model: The plain dense network, which is left alone.
        path: What `save_pruned` wrote, other safetensors, or a state dict that ``torch.save`` wrote; None copies.

    Raises:
        DataError: If the file is missing, damaged or of another network.
    """
    copied = plain_copy(model)
    teacher = copied if path is None else _loaded(copied, Path(path))
    return teacher.requires_grad_(False).eval()


def _loaded(network: nn.Module, path: Path) -> nn.Module:
    check_readable(path, _KIND)
    content = path.read_bytes()
    if content.startswith(b"PK"):  # an archive, as torch.save writes it
        state = torch_content(content, path, _KIND)
    else:
        state, _ = read_tensors(path, _KIND)
        if HINT in state:
            return load_pruned(path, lambda: network)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{_KIND} {shown_path(path)} has no weights for this network: {reason}") from error
    return network


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers between networks of one kind; gates and wrappers on the source do not count."""
    modules = dict(source.named_modules(remove_duplicate=False))
    for name, module in target.named_modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                found = read_tensor(modules[name], key)
                if tensor is not None and found is not None:
                    tensor.data = found.detach().to(tensor.dtype, copy=True)
