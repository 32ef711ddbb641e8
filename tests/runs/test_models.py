from __future__ import annotations

import copy
import inspect
import io
import sys
import textwrap

import pytest
import torch
from torch import nn

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.runs import models
from gumbel_plugin.runs.models import build_model, model_names, model_options, register_model

# name, input shape, outputs
OWN = [
    ("lenet300", (1, 28, 28), 10),
    ("lenet5", (1, 28, 28), 10),
    ("digits_cnn", (1, 8, 8), 10),
    ("toy_mlp", (4,), 2),
    ("conv2", (3, 32, 32), 10),
    ("conv4", (3, 32, 32), 10),
    ("conv6", (3, 32, 32), 10),
    ("resnet20", (3, 32, 32), 10),
    ("resnet56", (3, 32, 32), 10),
]


def prunable_weights(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_registered_model_is_in_the_table() -> None:
    own = model_names()[: len(OWN)]
    assert sorted(own) == sorted(name for name, _, _ in OWN)
    assert "resnet18" in model_names()


@pytest.mark.parametrize(("name", "shape", "outputs"), OWN)
def test_output_shape(name: str, shape: tuple[int, ...], outputs: int) -> None:
    torch.manual_seed(0)
    model = build_model(name)
    assert model.training
    assert model(torch.randn(2, *shape)).shape == (2, outputs)
    assert build_model(name, num_classes=7)(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "outputs"), OWN)
def test_models_can_be_traced_copied_and_saved(name: str, shape: tuple[int, ...], outputs: int) -> None:
    torch.manual_seed(0)
    model = build_model(name).eval()
    x = torch.randn(2, *shape)
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called)), "a module is used twice"
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (traced, copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("conv2", 4_300_992),
        ("conv4", 2_425_024),
        ("conv6", 2_261_184),
        ("lenet300", 266_200),
        ("lenet5", 430_500),
        ("toy_mlp", 160),
    ],
)
def test_prunable_weights_are_the_papers(name: str, weights: int) -> None:
    assert prunable_weights(build_model(name)) == weights


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet56", 9)])
def test_resnet_parameters(name: str, blocks: int) -> None:
    # He et al. 2015, table 6: 0.27 M and 0.85 M with option A; option B adds two 1x1 convolutions and their norms.
    padded = parameters(build_model(name, shortcut="pad"))
    assert padded == pytest.approx({3: 0.27e6, 9: 0.85e6}[blocks], abs=0.005e6)
    assert parameters(build_model(name)) == padded + 16 * 32 + 32 * 64 + 2 * (32 + 64)
    convolutions = [m for m in build_model(name).modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 6 * blocks + 2


def test_padded_shortcut_keeps_every_second_pixel_and_pads_channels_with_zeros() -> None:
    x = torch.randn(2, 16, 8, 8)
    out = build_model("resnet20", shortcut="pad").stage2[0].shortcut(x)
    assert out.shape == (2, 32, 4, 4)
    torch.testing.assert_close(out[:, 8:24], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_residual_block_adds_its_shortcut() -> None:
    torch.manual_seed(0)
    block = build_model("resnet20").eval().stage2[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut(x).relu(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["conv2", "resnet20"])
def test_weights_of_the_papers_networks_are_kaiming_normal(name: str) -> None:
    torch.manual_seed(0)
    layers = {n: m for n, m in build_model(name).named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for layer in layers.values():
        fan_in = layer.weight[0].numel()
        n = layer.weight.numel()
        # The standard error of a standard deviation is std / sqrt(2n); five of them is a wide bar.
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=5 / (2 * n) ** 0.5)


def test_conv_nets_keep_nonzero_biases() -> None:
    torch.manual_seed(0)
    assert all(m.bias.any() for m in build_model("conv4").modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


@pytest.mark.parametrize("name", ["lenet5", "conv2", "conv4", "conv6"])
@pytest.mark.parametrize("size", [16, 17, 28, 33])
def test_other_image_sizes_and_channels(name: str, size: int) -> None:
    model = build_model(name, in_channels=2, image_size=size)
    assert model(torch.randn(2, 2, size, size)).shape == (2, 10)


def test_in_features() -> None:
    assert build_model("lenet300", in_features=12)(torch.randn(2, 3, 4)).shape == (2, 10)


def test_seed_repeats_the_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build_model("lenet300").fc1.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'lenet30'; did you mean 'lenet300'\?"):
        build_model("lenet30")
    with pytest.raises(ConfigError, match=r"unknown model 'mobilnet_v2'; did you mean 'mobilenet_v2'\?"):
        build_model("mobilnet_v2")
    with pytest.raises(ConfigError, match="unknown model"):
        model_options("lenet30")


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert sorted(model_names()) == sorted(name for name, _, _ in OWN)
    build_model("lenet300")
    with pytest.raises(ConfigError, match=r"did you mean 'lenet300'\?.*pip install 'gumbel-plugin\[data\]'"):
        build_model("lenet30")


@pytest.mark.parametrize("name", ["lenet5", "conv4"])
def test_wrong_options_name_the_valid_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"'imagesize'.*options are: num_classes, in_channels, image_size"):
        build_model(name, imagesize=32)
    assert model_options(name) == ["num_classes", "in_channels", "image_size"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet300", {"num_classes": 0}, "num_classes is 0"),
        ("lenet300", {"num_classes": "10"}, "num_classes is '10'"),
        ("lenet300", {"in_channels": True}, "in_channels is True"),
        ("lenet300", {"in_channels": 1}, "'in_channels'.*options are: num_classes, in_features"),
        ("lenet300", {"in_features": -1}, "in_features is -1"),
        ("lenet5", {"image_size": 15}, "image_size of model 'lenet5' is 15; it must be at least 16"),
        ("conv6", {"image_size": 7}, "image_size is 7; 3 poolings need at least 8"),
        ("resnet20", {"shortcut": "A"}, "shortcut is 'A'; it must be 'conv' or 'pad'"),
        ("resnet18", {"widht": 2}, "'widht'.*options are: .*num_classes.*width_per_group"),
        ("resnet18", {"in_channels": 1}, "in_channels of model 'resnet18' must be 3"),
    ],
)
def test_wrong_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("squeezenet1_1", 64), ("resnet18", 32), ("googlenet", 64), ("inception_v3", 96)]
)
def test_torchvision_models(name: str, size: int) -> None:
    model = build_model(name, num_classes=5, in_channels=3)
    out = model(torch.randn(2, 3, size, size))
    assert isinstance(out, torch.Tensor), "an auxiliary head answers while training"
    assert out.shape == (2, 5)


def test_no_torchvision_model_would_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was asked for")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert "weights_backbone" in model_options("lraspp_mobilenet_v3_large")
    build_model("lraspp_mobilenet_v3_large", num_classes=3)


def test_torchvision_options_reach_the_class() -> None:
    assert build_model("squeezenet1_1", dropout=0.25).classifier[0].p == 0.25
    assert "dropout" in model_options("squeezenet1_1")


@pytest.fixture
def user_module(tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "nets_of_a_user"
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            class Net(nn.Sequential):
                def __init__(self, num_classes, width=3):
                    super().__init__(nn.Linear(4, width), nn.Linear(width, num_classes))

            def broken():
                return 7

            anything = lambda **options: nn.Linear(options["a"], 1)
            """
        )
    )
    (tmp_path / "net_that_needs_more.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield name
    sys.modules.pop(name, None)


def test_users_factory(user_module: str) -> None:
    model = build_model(f"{user_module}:Net", num_classes=2, width=5)
    assert model[0].out_features == 5
    assert model[1].out_features == 2
    assert model_options(f"{user_module}:Net") == ["num_classes", "width"]
    assert build_model(f"{user_module}:anything", a=6).in_features == 6


@pytest.mark.parametrize(
    ("suffix", "options", "message"),
    [
        (":Net", {}, "missing .*required .*argument: 'num_classes'.*options are: num_classes, width"),
        (":Net", {"num_classes": 2, "depth": 1}, "'depth'.*options are: num_classes, width"),
        (":Nett", {}, r"has no callable 'Nett'; did you mean 'Net'\?"),
        (":broken", {}, "returned a int; it must return a torch.nn.Module"),
        (".deeper:Net", {}, "there is no module"),
        (":", {}, "is not of the form package.module:factory"),
    ],
)
def test_users_factory_errors(user_module: str, suffix: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(user_module + suffix, **options)  # type: ignore[arg-type]


def test_users_module_whose_own_import_fails_keeps_its_own_error(user_module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        build_model("net_that_needs_more:Net")


def test_register_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_REGISTRY", dict(models._REGISTRY))

    @register_model("tiny")
    def tiny(num_classes: int = 3) -> nn.Module:
        return nn.Linear(4, num_classes)

    assert build_model("tiny").out_features == 3
    assert "tiny" in model_names()
    for name in ("tiny", "a:b"):
        with pytest.raises(ConfigError, match="cannot register"):
            register_model(name)


def test_every_registered_model_can_be_built_without_options() -> None:
    for name, _, _ in OWN:
        for parameter in inspect.signature(models._REGISTRY[name]).parameters.values():
            assert parameter.default is not parameter.empty, f"{name} cannot be built without {parameter.name}"
