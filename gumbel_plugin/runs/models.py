"""Networks by name: this project's small ones, torchvision's, and the user's own.

A name in a run file becomes a network through `build_model`. Three kinds of names are understood:

* a name registered with `register_model`; here are the networks of the papers, built for small images;
* any name of ``torchvision.models``, without pretrained weights;
* ``package.module:factory``, a callable of the user's own that returns a module.

Everything here is made of modules of ``torch.nn`` in a plain order of calls, without in-place operations and without a
module used twice, so that torch.fx, NNI and Torch-Pruning can trace it, and pickle and deepcopy can copy it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, MissingExtraError, nearest, shorten, shown
from gumbel_plugin.runs.factories import import_factory

ModelFactory = Callable[..., nn.Module]
_Factory = TypeVar("_Factory", bound=ModelFactory)
_REGISTRY: dict[str, ModelFactory] = {}


def register_model(name: str) -> Callable[[_Factory], _Factory]:
    """Make a factory (a class or a function) available to `build_model` under a name.

    Its keyword parameters are the model's options. Call them ``num_classes`` and ``in_channels`` where it has those.

    Example:
        >>> @register_model("tiny")
        ... def tiny(num_classes: int = 10, in_features: int = 784) -> nn.Module:
        ...     return nn.Sequential(nn.Flatten(), nn.Linear(in_features, num_classes))

    Raises:
        ConfigError: The name is taken, or contains ``:``, which is kept for ``package.module:factory``.
    """
    if name in _REGISTRY or ":" in name:
        raise ConfigError(f"cannot register a model as {name!r}: the name is taken or contains ':'")

    def register(factory: _Factory) -> _Factory:
        _REGISTRY[name] = factory
        return factory

    return register


def model_names() -> list[str]:
    """Return every name that `build_model` knows: this project's first, then torchvision's where it is installed."""
    others = importlib.import_module("torchvision.models").list_models() if _has_torchvision() else []
    return [*sorted(_REGISTRY), *others]


def model_options(name: str) -> list[str]:
    """Return the names of the options that a model takes (``num_classes``, ``in_channels`` or neither among them).

    Raises:
        ConfigError: The model is unknown.
    """
    return _options(_factory(name))


def build_model(name: str, num_classes: int | None = None, in_channels: int | None = None, **options: Any) -> nn.Module:
    """Build a network by name, with freshly drawn weights (seed torch first to repeat them).

    Args:
        name: A registered name, a name of ``torchvision.models``, or ``package.module:factory``.
        num_classes: Number of outputs; None leaves it to the model.
        in_channels: Number of input channels; None leaves it to the model. torchvision's networks read 3 and no other.
        **options: Further options of the model, see `model_options`. For a torchvision model they go to its builder,
            with ``weights=None`` unless given, and without the auxiliary heads of GoogLeNet and Inception v3 (they
            would turn the output into a tuple while training).

    Returns:
        The network, in train mode.

    Raises:
        ConfigError: The name is unknown, an option is unknown or wrong, or the factory did not return a module.
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    given: dict[str, Any] = {option: size for option, size in sizes.items() if size is not None}
    _check_sizes(**given)
    given |= options
    factory = _factory(name)
    if ":" not in name and name not in _REGISTRY:
        return _call_torchvision(name, factory, given)
    model = _call(name, factory, given)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name!r} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _factory(name: str) -> ModelFactory:
    if ":" in name:
        return import_factory(name, "model")
    if name in _REGISTRY:
        return _REGISTRY[name]
    known = model_names()
    if name in known:
        return importlib.import_module("torchvision.models").get_model_builder(name)  # type: ignore[no-any-return]
    missing = "" if _has_torchvision() else f" (if it is torchvision's: {MissingExtraError('torchvision', 'data')})"
    raise ConfigError(f"unknown model {shown(name)}{nearest(name, known)}{missing}")


def _has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def _call_torchvision(name: str, builder: ModelFactory, given: dict[str, Any]) -> nn.Module:
    if given.pop("in_channels", 3) != 3:
        raise ConfigError(f"in_channels of model {name!r} must be 3: torchvision's networks read no other number")
    defaults: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        defaults["weights_backbone"] = None  # or the detection and segmentation networks would download one
    if given.get("weights") is None and name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        defaults |= {"aux_logits": False, "init_weights": True}  # without the second they warn, and then assume it
    return _call(name, builder, {**defaults, **given})


def _call(name: str, factory: ModelFactory, given: dict[str, Any]) -> nn.Module:
    try:
        return factory(**given)
    except ConfigError:
        raise
    except Exception as error:  # whatever a factory raises at options that it cannot use
        problem, options = shorten(str(error) or repr(error), 800), ", ".join(_options(factory)) or "none"
        raise ConfigError(f"model {shown(name)}: {problem}; its options are: {options}") from error


def _options(factory: ModelFactory) -> list[str]:
    """Return a factory's keyword parameters; torchvision's pass ``**kwargs`` on to the class that they return."""
    signature = inspect.signature(factory)
    options = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if open_ended and inspect.isclass(signature.return_annotation):
        passed_on = inspect.signature(signature.return_annotation).parameters.values()
        options += [p.name for p in passed_on if p.default is not p.empty and p.name not in options]
    return options


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name} is {shown(size)}; it must be a whole number of at least 1")


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _mlp(widths: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    _check_sizes(in_features=widths[0])
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for number, (wide, narrow) in enumerate(pairwise(widths), start=1):
        layers[f"fc{number}"] = nn.Linear(wide, narrow)
        layers[f"act{number}"] = activation()
    layers.popitem()  # the outputs are linear
    return _named(**layers)


def _draw_kaiming(model: nn.Module) -> None:
    """Draw weights as in He et al. 2015 (normal, fan-in, ReLU); biases keep torch's uniform draw."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")


@register_model("lenet300")
def lenet300(num_classes: int = 10, in_features: int = 784) -> nn.Sequential:
    """Build LeNet-300-100 (LeCun et al. 1998): 266,200 weights on 28×28 images.

    Shapes: any input with ``in_features`` values a sample, to (batch, num_classes).
    """
    return _mlp((in_features, 300, 100, num_classes), nn.ReLU)


@register_model("lenet5")
def lenet5(num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> nn.Sequential:
    """Build the LeNet-5 of Caffe that the pruning literature uses: 430,500 weights on 28×28×1.

    20 and 50 filters of 5×5 and a hidden layer of 500, with a ReLU after every hidden layer as in Louizos et al. 2018
    (Caffe's own has one after the hidden linear layer only).

    Shapes: (batch, in_channels, image_size, image_size) to (batch, num_classes).
    """
    _check_sizes(image_size=image_size)
    side = ((image_size - 4) // 2 - 4) // 2  # 28 -> conv 24 -> pool 12 -> conv 8 -> pool 4
    if side < 1:
        raise ConfigError(f"image_size of model 'lenet5' is {image_size}; it must be at least 16")
    return _named(
        conv1=nn.Conv2d(in_channels, 20, 5),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(20, 50, 5),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(50 * side * side, 500),
        relu3=nn.ReLU(),
        fc2=nn.Linear(500, num_classes),
    )


@register_model("digits_cnn")
def digits_cnn(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Build the demo's network: three 3×3 convolutions (32, 64, 64) with batch norm, for 8×8 images.

    Shapes: (batch, in_channels, height, width), both at least 2, to (batch, num_classes).
    """
    return _named(
        conv1=nn.Conv2d(in_channels, 32, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(32),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(32, 64, 3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(64),
        relu2=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        conv3=nn.Conv2d(64, 64, 3, padding=1, bias=False),
        bn3=nn.BatchNorm2d(64),
        relu3=nn.ReLU(),
        average=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(64, num_classes),
    )


@register_model("toy_mlp")
def toy_mlp(num_classes: int = 2, in_features: int = 4) -> nn.Sequential:
    """Build the 4-10-10-2 SiLU network of the toy check (Zhang et al., arXiv 2311.12526): 160 weights.

    Shapes: (batch, in_features) to (batch, num_classes), the outputs of a regression.
    """
    return _mlp((in_features, 10, 10, num_classes), nn.SiLU)


def _conv_net(widths: Sequence[int], num_classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    _check_sizes(image_size=image_size)
    side = image_size // 2 ** len(widths)
    if side < 1:
        raise ConfigError(f"image_size is {image_size}; {len(widths)} poolings need at least {2 ** len(widths)}")
    layers: dict[str, nn.Module] = {}
    channels = in_channels
    for stage, width in enumerate(widths, start=1):
        for number in (2 * stage - 1, 2 * stage):
            layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"relu{number}"] = nn.ReLU()
            channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    model = _named(
        **layers,
        flatten=nn.Flatten(),
        fc1=nn.Linear(channels * side * side, 256),
        fc1_relu=nn.ReLU(),
        fc2=nn.Linear(256, 256),
        fc2_relu=nn.ReLU(),
        fc3=nn.Linear(256, num_classes),
    )
    _draw_kaiming(model)  # the weights that ASLP freezes
    return model


@register_model("conv2")
def conv2(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> nn.Sequential:
    """Build Conv2 of ASLP (arXiv 2202.12986): convolutions 64, 64, pool, linear 256, 256; 4,300,992 weights on 32×32×3.

    Shapes: (batch, in_channels, image_size, image_size) to (batch, num_classes).
    """
    return _conv_net((64,), num_classes, in_channels, image_size)


@register_model("conv4")
def conv4(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> nn.Sequential:
    """Build Conv4 of ASLP: Conv2 with 128, 128, pool before the linear layers; 2,425,024 weights on 32×32×3."""
    return _conv_net((64, 128), num_classes, in_channels, image_size)


@register_model("conv6")
def conv6(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> nn.Sequential:
    """Build Conv6 of ASLP: Conv4 with 256, 256, pool before the linear layers; 2,261,184 weights on 32×32×3."""
    return _conv_net((64, 128, 256), num_classes, in_channels, image_size)


class PaddedShortcut(nn.Module):
    """He's shortcut A: every second pixel, and zero channels around. It has no weights, and ties its channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, h, w) to (batch, out_channels, ⌈h/stride⌉, ⌈w/stride⌉)."""
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, added to a shortcut (He et al. 2015, figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, h, w) to (batch, out_channels, ⌈h/stride⌉, ⌈w/stride⌉)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """The ResNet for 32×32 images of He et al. 2015 (arXiv 1512.03385, section 4.2): stages of 16, 32, 64 channels.

    Args:
        blocks: Blocks per stage; the depth is 6·blocks + 2.
        num_classes: Number of outputs.
        in_channels: Number of input channels.
        shortcut: Where the shape changes, ``"conv"`` (option B: a 1×1 convolution and a batch norm) or ``"pad"``
            (option A, the paper's choice on CIFAR: zero channels, no weights). The channels around a padded shortcut
            cannot be pruned: each stage's are pinned to fixed places in the next.
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3, shortcut: str = "conv") -> None:
        super().__init__()
        _check_sizes(blocks=blocks)
        if shortcut not in ("conv", "pad"):
            raise ConfigError(f"shortcut is {shortcut!r}; it must be 'conv' or 'pad'")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.stage1 = _stage(blocks, 16, 16, shortcut)
        self.stage2 = _stage(blocks, 16, 32, shortcut)
        self.stage3 = _stage(blocks, 32, 64, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, num_classes)
        _draw_kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, height, width) to (batch, num_classes)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.stage3(self.stage2(self.stage1(out)))
        return self.fc(self.flatten(self.pool(out)))  # type: ignore[no-any-return]


def _stage(blocks: int, in_channels: int, out_channels: int, kind: str) -> nn.Sequential:
    """Chain blocks; the first halves the image where it widens the channels."""
    stride = 1 if in_channels == out_channels else 2
    first: nn.Module = nn.Identity()
    if stride == 2 and kind == "pad":
        first = PaddedShortcut(in_channels, out_channels, stride)
    elif stride == 2:
        convolution = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        first = _named(conv=convolution, bn=nn.BatchNorm2d(out_channels))
    rest = [ResidualBlock(out_channels, out_channels, 1, nn.Identity()) for _ in range(blocks - 1)]
    return nn.Sequential(ResidualBlock(in_channels, out_channels, stride, first), *rest)


@register_model("resnet20")
def resnet20(num_classes: int = 10, in_channels: int = 3, shortcut: str = "conv") -> CifarResNet:
    """Build ResNet-20 for small images, see `CifarResNet`."""
    return CifarResNet(3, num_classes, in_channels, shortcut)


@register_model("resnet56")
def resnet56(num_classes: int = 10, in_channels: int = 3, shortcut: str = "conv") -> CifarResNet:
    """Build ResNet-56 for small images, see `CifarResNet`."""
    return CifarResNet(9, num_classes, in_channels, shortcut)
