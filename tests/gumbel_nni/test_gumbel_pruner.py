"""`GumbelPruner` used as any NNI pruner is: config lists, evaluators, masks, speedup."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging

import pytest
import torch
from torch import nn

from gumbel_plugin import GumbelPruner, shrink, verify_equivalence
from gumbel_plugin.config import PruningConfig
from gumbel_plugin.errors import ConfigError, DataError, GraphError, LifecycleError, NonFiniteLossError, TargetError
from gumbel_plugin.layers.weights import GATES
from gumbel_plugin.shrinking.mask_file import save_masks

import nni  # isort: skip  (importable once gumbel_plugin is)
from nni.compression import TorchEvaluator  # isort: skip
from nni.compression.pruning import L1NormPruner  # isort: skip
from nni.compression.speedup import ModelSpeedup  # isort: skip


class Mlp(nn.Module):
    """The network of NNI's QuickStart, smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(20, 32)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(32, 16)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc3(self.relu2(self.fc2(self.relu1(self.fc1(x)))))


class ResidualNet(nn.Module):
    """conv-BN-ReLU with a residual connection: conv1 and conv3 share their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(x))))))
        return self.fc(x.mean((2, 3)))


NETWORKS = {"mlp": (Mlp, (20,)), "residual": (ResidualNet, (3, 8, 8))}
STRUCTURED = {
    "mlp": [{"op_types": ["Linear"], "exclude_op_names": ["fc3"], "sparse_ratio": 0.5}],
    "residual": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
}


def data(shape, samples=128):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, *shape, generator=generator)
    return inputs, inputs.flatten(1)[:, :4].argmax(1)


def evaluator_for(model, shape, learning_rate=1e-2, dummy=True):
    inputs, targets = data(shape)

    def training_step(batch, model):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def training(model, optimizer, step, schedulers=None, max_steps=None, max_epochs=None):
        model.train()
        batches = itertools.cycle(zip(inputs.split(32), targets.split(32), strict=True))
        for _ in range(max_steps if max_steps is not None else max_epochs * 4):
            optimizer.zero_grad()
            step(next(batches), model).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.Adam)(model.parameters(), lr=learning_rate)
    return TorchEvaluator(training, optimizer, training_step, dummy_input=inputs[:2] if dummy else None)


def compressed(name, config=None, steps=60, **settings):
    torch.manual_seed(0)
    factory, shape = NETWORKS[name]
    model = factory()
    pruner = GumbelPruner(model, config or STRUCTURED[name], evaluator_for(model, shape, **settings))
    pruner.compress(max_steps=steps)
    return pruner, torch.randn(2, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_masks_are_nnis(name):
    pruner, _ = compressed(name)
    for targets in pruner.get_masks().values():
        rows = targets["weight"].flatten(1)
        assert set(rows.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(rows[:, 0], targets["bias"]), "the bias follows the weight's rows"
        assert torch.equal(rows.amin(1), rows.amax(1)), "whole rows"
        assert rows.mean() == 0.5, "the ratio is met exactly"


@pytest.mark.slow
def test_group_members_share_masks_and_readers_stay_hidden():
    pruner, _ = compressed("residual")
    masks = pruner.get_masks()
    assert set(masks) == {"conv1", "conv2", "conv3"}, "fc was wrapped by the pruner itself and is not reported"
    assert torch.equal(masks["conv1"]["bias"], masks["conv3"]["bias"])
    assert "fc" in pruner._module_wrappers


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch_pruning", "nni"])
@pytest.mark.parametrize("name", NETWORKS)
def test_speedup_is_exact_and_leaves_the_model_alone(name, backend):
    pruner, inputs = compressed(name)
    model = pruner.bound_model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    small = pruner.speedup(inputs, backend=backend)
    model.eval()
    small.eval()
    torch.testing.assert_close(small(inputs), model(inputs), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    model.train()
    assert flags == [module.training for module in model.modules()]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(before[key], value) for key, value in parameters.items())


@pytest.mark.slow
def test_both_backends_give_the_same_network():
    pruner, inputs = compressed("residual")
    shapes = [
        {key: tuple(value.shape) for key, value in pruner.speedup(inputs, backend=backend).state_dict().items()}
        for backend in ("torch_pruning", "nni")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_quickstart_with_nnis_own_speedup(name):
    pruner, inputs = compressed(name)
    masks = pruner.get_masks()
    model = pruner.bound_model.eval()
    expected = model(inputs)
    pruner.unwrap_model()
    dense = sum(p.numel() for p in model.parameters())
    ModelSpeedup(model, inputs, masks).speedup_model()
    model.eval()
    torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * dense


@pytest.mark.slow
def test_unwrapped_model_is_plain_and_equals_the_wrapped_one():
    pruner, inputs = compressed("residual")
    model = pruner.bound_model.eval()
    expected = model(inputs)
    pruner.unwrap_model()
    assert set(model.state_dict()) == set(ResidualNet().state_dict())
    assert not any(hasattr(module, GATES) for module in model.modules())
    torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-6)
    small = shrink(model, pruner.get_masks(), inputs)
    assert verify_equivalence(model, small, inputs).passed


def test_element_masks_meet_a_global_ratio_exactly():
    config = [{"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.9, "global_group_id": 0}]
    pruner, inputs = compressed("mlp", config)
    weights = torch.cat([targets["weight"].flatten() for targets in pruner.get_masks().values()])
    assert int((weights == 0).sum()) == int(0.9 * weights.numel())
    assert verify_equivalence(pruner_copy(pruner), pruner.speedup(inputs), inputs).passed


def test_aligned_entries_follow_what_is_learned():
    torch.manual_seed(0)
    model = ResidualNet()
    follower = {"op_names": ["bn2"], "target_settings": {"weight": {"align": {
        "module_name": "conv2", "target_name": "weight", "dims": [0],
    }}}}  # fmt: skip
    pruner = GumbelPruner(model, [*STRUCTURED["residual"], follower], evaluator_for(model, (3, 8, 8)))
    _, masks = pruner.compress(max_steps=10)
    assert torch.equal(masks["bn2"]["weight"], masks["conv2"]["bias"])
    assert torch.equal(masks["bn2"]["bias"], masks["conv2"]["bias"]), "by default a bias follows its weight"
    assert pruner.speedup().conv2.out_channels == 6
    follower["target_settings"]["weight"]["align"]["module_name"] = "conv9"
    with pytest.raises(TargetError, match=r"bn2\.weight is aligned with 'conv9', which .* not prune; did you"):
        GumbelPruner(ResidualNet(), [*STRUCTURED["residual"], follower], example_inputs=torch.randn(2, 3, 8, 8))


def pruner_copy(pruner):
    from gumbel_nni import unwrapped_copy

    return unwrapped_copy(pruner.bound_model)


def test_frozen_weights_learn_masks_and_a_scale_only():
    torch.manual_seed(0)
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    config = {
        "pruning": {
            "config_list": [{"op_types": ["Linear"], "granularity": "element"}],
            "weights": "frozen",
            "rescale": "learned",
        }
    }
    pruner = GumbelPruner(model, config, evaluator_for(model, (20,)))
    pruner.compress(max_steps=60)
    masks = pruner.get_masks()
    scales = {name: float(gated.scale.detach()) for name, gated in pruner.session.plan.gated_layers.items()}
    pruner.unwrap_model()
    for name, targets in masks.items():
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(weight, before[f"{name}.weight"] * targets["weight"] * scales[name])
        assert 0 < targets["weight"].mean() < 1
        assert scales[name] != 1.0
        assert torch.equal(model.get_submodule(name).bias, before[f"{name}.bias"])


@pytest.mark.slow
def test_compress_trains_from_the_configuration_alone():
    from gumbel_plugin.runs.models import build_model

    config = PruningConfig.load(
        {
            "data": {"name": "digits"},
            "training": {"max_epochs": 1},
            "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]},
        }
    )
    model, masks = GumbelPruner(build_model("digits_cnn"), config).compress()
    assert all(targets["weight"].mean() == 0.5 for targets in masks.values())
    assert not model.training


@pytest.mark.slow
def test_masks_round_trip_through_a_fresh_pruner():
    pruner, inputs = compressed("residual")
    masks = pruner.get_masks()
    torch.manual_seed(0)
    model = ResidualNet()
    fresh = GumbelPruner(model, STRUCTURED["residual"], example_inputs=inputs)
    fresh.update_masks(masks)
    for name, targets in fresh.get_masks().items():
        assert all(torch.equal(mask, masks[name][target]) for target, mask in targets.items())
    assert verify_equivalence(pruner_copy(fresh), fresh.speedup(), inputs).passed


def test_masks_are_read_from_a_file(tmp_path):
    pruner, inputs = compressed("residual")
    masks = pruner.get_masks()
    save_masks(tmp_path / "masks.safetensors", masks, "residual")
    torch.save(masks, tmp_path / "old.pth")
    for name in ("masks.safetensors", "old.pth"):
        torch.manual_seed(0)
        fresh = GumbelPruner(ResidualNet(), STRUCTURED["residual"], example_inputs=inputs)
        with pytest.warns(UserWarning, match="save_masks") if name == "old.pth" else contextlib.nullcontext():
            fresh.update_masks(tmp_path / name)
        for layer, targets in fresh.get_masks().items():
            assert all(torch.equal(mask, masks[layer][target]) for target, mask in targets.items())
    with pytest.raises(DataError, match="nowhere"):
        fresh.update_masks("nowhere.safetensors")


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"conv9": {"weight": torch.ones(1)}}, "'conv9'.*did you mean 'conv"),
        ({"conv1": {"wieght": torch.ones(1)}}, "conv1.wieght.*did you mean 'weight'"),
        ({"conv1": {"weight": torch.ones(2, 2)}}, r"\(2, 2\).*\(8, 3, 3, 3\)"),
    ],
)
def test_update_masks_rejects_what_does_not_fit(masks, message):
    pruner = GumbelPruner(ResidualNet(), STRUCTURED["residual"], example_inputs=torch.randn(1, 3, 8, 8))
    with pytest.raises(TargetError, match=message):
        pruner.update_masks(masks)


def test_inherits_another_pruners_wrappers():
    torch.manual_seed(0)
    model, inputs = ResidualNet(), torch.randn(2, 3, 8, 8)
    evaluator = evaluator_for(model, (3, 8, 8))
    first = L1NormPruner(model, [{"op_names": ["conv2"], "sparse_ratio": 0.25}])
    first.compress()
    pruner = GumbelPruner.from_compressor(
        first,
        [{"op_names": ["conv1", "conv3"], "sparse_ratio": 0.5}],
        evaluator=evaluator,
        example_inputs=inputs,
    )
    pruner.compress(max_steps=20)
    masks = pruner.get_masks()
    assert masks["conv2"]["bias"].mean() == 0.75, "the first pruner's masks are kept"
    assert masks["conv1"]["bias"].mean() == 0.5


def test_a_group_that_reaches_the_output_is_logged_and_not_gated(caplog):
    with caplog.at_level(logging.INFO):
        pruner = GumbelPruner(Mlp(), [{"op_types": ["Linear"], "sparse_ratio": 0.5}], example_inputs=torch.randn(1, 20))
    lines = [record.getMessage() for record in caplog.records if "fc3" in record.getMessage()]
    assert len(lines) == 1
    assert "output" in lines[0]
    assert set(pruner.session.plan.groups) == {"fc1", "fc2"}


def test_nothing_to_train_with():
    pruner = GumbelPruner(Mlp(), STRUCTURED["mlp"], example_inputs=torch.randn(1, 20))
    with pytest.raises(ConfigError, match="evaluator="):
        pruner.compress(max_steps=1)


def test_nothing_to_trace_with_names_all_four_places():
    model = Mlp()
    with pytest.raises(ConfigError, match=r"example_inputs=.*example_shape.*dummy_input.*data") as caught:
        GumbelPruner(model, STRUCTURED["mlp"], evaluator_for(model, (20,), dummy=False))
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == list(Mlp().state_dict()), "nothing was wrapped"


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ([{"op_types": ["Linear"], "sparse_ratio": 1.0}], ConfigError, "sparse_ratio = 1.0.*less than 1"),
        ([{"op_types": ["Linear"], "sparsity_ratio": 0.5}], ConfigError, "did you mean 'sparse_ratio'"),
        ([{"op_names": ["fcl"], "sparse_ratio": 0.5}], TargetError, "'fcl'.*did you mean 'fc"),
        ([{"op_types": ["ReLU"], "sparse_ratio": 0.5}], TargetError, "'relu1' is a ReLU, which has no weight"),
    ],
)
def test_bad_configs_are_refused_before_anything_happens(config, error, message):
    model = Mlp()
    with pytest.raises(error, match=message):
        GumbelPruner(model, config, example_inputs=torch.randn(1, 20))
    assert list(model.state_dict()) == list(Mlp().state_dict())


def test_a_model_that_rejects_the_example_inputs():
    with pytest.raises(GraphError, match="forward fails on the example inputs"):
        GumbelPruner(Mlp(), STRUCTURED["mlp"], example_inputs=torch.randn(1, 7))


def test_masks_are_learned_once():
    pruner, _ = compressed("mlp", steps=4)
    with pytest.raises(LifecycleError, match="decided already"):
        pruner.compress(max_steps=1)


def test_speedup_before_compress():
    pruner = GumbelPruner(Mlp(), STRUCTURED["mlp"], example_inputs=torch.randn(1, 20))
    with pytest.raises(LifecycleError, match="compress"):
        pruner.speedup()


def test_an_infinite_loss_stops_the_training_and_says_where():
    torch.manual_seed(0)
    model = Mlp()
    pruner = GumbelPruner(model, STRUCTURED["mlp"], evaluator_for(model, (20,), learning_rate=1e30))
    with pytest.raises(NonFiniteLossError, match="at step"):
        pruner.compress(max_steps=50)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_masks():
    masks = [compressed("residual", steps=20)[0].get_masks() for _ in range(2)]
    for name, targets in masks[0].items():
        assert all(torch.equal(mask, masks[1][name][target]) for target, mask in targets.items())


def test_attention_heads_are_gated_and_removed_exactly():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(16, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=4)
    nn.init.normal_(model.heads.head.weight)
    inputs = torch.randn(2, 3, 16, 16)
    config = [{"op_types": ["MultiheadAttention", "Linear"], "exclude_op_names": ["heads.head"], "sparse_ratio": 0.5}]
    pruner = GumbelPruner(model, config, evaluator_for(model, (3, 16, 16)), example_inputs=inputs)
    pruner.compress(max_steps=8)
    model.eval()
    small = pruner.speedup(inputs)
    torch.testing.assert_close(small(inputs), model(inputs), rtol=0, atol=1e-5)
    heads = [layer.self_attention.num_heads for layer in small.encoder.layers]
    assert heads == [2, 2]
