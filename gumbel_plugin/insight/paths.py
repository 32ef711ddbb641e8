"""A network as paths: activations let everything through, norms only scale, biases are nothing.

What is left is linear. The influence of an input on an output is then a sum over all paths between them of the product
of the weights on each path, and a gradient computes it: one definition for every network that torch can run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gumbel_plugin.errors import GraphError

KERNEL_DIMENSIONS = {
    "linear": 0,
    "conv1d": 1,
    "conv2d": 2,
    "conv3d": 3,
    "conv_transpose1d": 1,
    "conv_transpose2d": 2,
    "conv_transpose3d": 3,
}
"""The functions that layers call, and how many trailing dimensions of their weight are a kernel's."""

_PASS_THROUGH = frozenset(
    (
        *("relu", "relu6", "leaky_relu", "rrelu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish"),
        *("hardswish", "hardtanh", "hardsigmoid", "softplus", "softsign", "logsigmoid", "log_sigmoid", "sigmoid"),
        *("tanh", "softmax", "log_softmax", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
        "feature_alpha_dropout",
    )
)
_SCALES = {"batch_norm": 3, "layer_norm": 2, "group_norm": 2, "instance_norm": 3}  # where the weight stands in a call
_POOLS = {
    f"{adaptive}max_pool{n}d": getattr(nn.functional, f"{adaptive}avg_pool{n}d")
    for adaptive in ("", "adaptive_")
    for n in (1, 2, 3)
}


class PathNetwork(TorchFunctionMode):
    """Runs a model as a network of paths.

    Activations, softmax and dropout are the identity. A batch norm multiplies by its scale in eval mode, other norms by
    their weight. Max pooling is average pooling: each input of a window wins equally often. Sums, concatenations and
    reshapes are themselves; a difference is a sum. `layer` handles layers.
    """

    signed = False
    """Whether differences and negative factors keep their signs."""

    def layer(self, func: Callable[..., Any], arguments: dict[str, Any]) -> Tensor:
        """Return what a convolution or linear layer gives: here, its absolute weights' paths.

        Args:
            func: The function of `torch.nn.functional`.
            arguments: Its arguments; ``bias`` is None.
        """
        output: Tensor = func(**{**arguments, "weight": arguments["weight"].abs()})
        return output

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").rstrip("_")
        if name in KERNEL_DIMENSIONS:
            return self.layer(func, _layer_arguments(name, args, kwargs))
        if name in _PASS_THROUGH:
            return args[0]
        if name in _SCALES:
            return _scaled(name, args, kwargs, self.signed)
        if name in _POOLS:
            return _averaged(name, args, kwargs)
        if not self.signed and name in _NEGATIVE:
            return _NEGATIVE[name](*args)
        return func(*args, **kwargs)


def _layer_arguments(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    last = ("output_padding", "groups", "dilation") if "transpose" in name else ("dilation", "groups")
    names = ("input", "weight", "bias", "stride", "padding", *last)
    return {**dict(zip(names, args, strict=False)), **kwargs, "bias": None}


def _sum(x: Any, y: Any) -> Any:
    return x + y if isinstance(x, Tensor) and isinstance(y, Tensor) else x if isinstance(x, Tensor) else y


# What makes values negative, as it is without the signs; how far a number is added does not matter to any path.
_NEGATIVE: dict[str, Callable[..., Any]] = {
    "neg": lambda x: x,
    "sub": _sum,
    "subtract": _sum,
    "rsub": _sum,
    "__rsub": _sum,
    "mul": lambda x, y: x * (y if isinstance(y, Tensor) else abs(y)),
    "div": lambda x, y: x / (y if isinstance(y, Tensor) else abs(y)),
}


def _scaled(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], signed: bool) -> Tensor:
    x: Tensor = args[0]
    weight = kwargs.get("weight", args[_SCALES[name]] if len(args) > _SCALES[name] else None)
    scale = torch.ones((), dtype=x.dtype) if weight is None else weight if signed else weight.abs()
    variance = kwargs.get("running_var", args[2] if name == "batch_norm" and len(args) > 2 else None)
    if name == "batch_norm" and isinstance(variance, Tensor):
        scale = scale / torch.sqrt(variance + kwargs.get("eps", 1e-5))
    if name == "layer_norm" or scale.dim() == 0:  # its weight has the shape of the last dimensions
        return x * scale
    return x * scale.reshape(-1, *(1,) * (x.dim() - 2))


def _averaged(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    names = ("input", "output_size") if "adaptive" in name else ("input", "kernel_size", "stride", "padding")
    known = {**dict(zip(names, args, strict=False)), **{key: kwargs[key] for key in names if key in kwargs}}
    if kwargs.get("dilation", 1) != 1:
        raise GraphError("paths through a dilated max pooling are not known")
    if "adaptive" not in name:
        known |= {"count_include_pad": False, "ceil_mode": kwargs.get("ceil_mode", False)}
        known["stride"] = known.get("stride") or known["kernel_size"]
    output: Tensor = _POOLS[name](**known)
    return output


def path_gradients(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """Return, for each output and input, the sum over all paths of the product of the absolute weights.

    Args:
        model: A plain network of one tensor input; it is left alone.
        input_shape: Shape of one input, without the batch.

    Returns:
        float64 of shape (outputs, *input_shape).

    Raises:
        GraphError: If the network multiplies what it computes (attention, gates): no product of weights describes what
            a path is worth there. Or if its forward fails, or returns something else than one tensor a sample.
    """
    network = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
    first, second = (
        _jacobian(network, torch.rand(input_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        for seed in (0, 1)
    )
    if not torch.allclose(first, second, rtol=1e-9, atol=0):
        raise GraphError(
            f"{type(model).__name__} multiplies what it computes (attention or gates), or does something else that no "
            "weights on paths can describe: its inputs have no path-weight importance"
        )
    return first


def _jacobian(network: nn.Module, inputs: Tensor) -> Tensor:
    batch = inputs.unsqueeze(0).requires_grad_()
    with torch.enable_grad():
        outputs = run_as_paths(network, batch, PathNetwork())
        rows = [
            torch.autograd.grad(output, batch, retain_graph=True, materialize_grads=True)[0][0]
            for output in outputs.flatten()
        ]
    return torch.stack(rows)


def run_as_paths(network: nn.Module, batch: Tensor, paths: PathNetwork) -> Tensor:
    """Run a network on a batch of one in a mode.

    Raises:
        GraphError: If that fails, or gives something else than one differentiable tensor.
    """
    try:
        with torch.random.fork_rng(devices=[]), paths:
            outputs = network(batch.clone())  # a clone: the network may work in place
    except GraphError:
        raise
    except Exception as error:
        raise GraphError(f"{type(network).__name__} does not run as a network of paths: {error}") from error
    if not isinstance(outputs, Tensor) or not outputs.requires_grad:
        raise GraphError(f"{type(network).__name__} must compute one tensor from its input to be read as paths")
    return outputs
