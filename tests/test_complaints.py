"""What people file against pruning tools, each as a test: docs/troubleshooting.md answers them one by one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin import MaskingSession, load_pruned, save_pruned, shrink
from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import ConfigError, TargetError
from gumbel_plugin.layers.weights import plain_copy
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.sparsity.counting import count_macs, count_parameters
from gumbel_torch_pruning import find_groups

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
CHANNELS: dict[str, Any] = {"op_names": ["0", "3"], "sparse_ratio": 0.5}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 32), nn.BatchNorm1d(32), nn.SiLU(), nn.Linear(32, 16), nn.SiLU(), nn.Linear(16, 3)
    )  # fmt: skip


def started(steps: int = 20, rule: dict[str, Any] | None = None, **pruning: Any) -> tuple[nn.Module, MaskingSession]:
    model = build()
    section = PruningSection.model_validate({"config_list": [rule or CHANNELS], **pruning})
    session = MaskingSession(model, section, find_groups(model, X), seed=1)
    session.start(steps)
    return model, session


def train(model: nn.Module, session: MaskingSession, steps: int, inputs: Tensor = X) -> None:
    optimizers = [torch.optim.SGD(session.weight_parameters(), 0.05), *session.optimizers()]
    model.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(inputs), X[:, :3].argmax(1)) + session.loss()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        session.step()


def outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(X)
    model.train()
    return found


@pytest.fixture
def pruned() -> tuple[nn.Module, nn.Module]:
    """A masked network and the small one."""
    model, session = started()
    train(model, session, 20)
    masks = session.extract()
    session.detach()
    return model, shrink(model, masks, X)


def test_the_file_is_not_smaller(pruned: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    model, small = pruned
    for name, network in (("dense", model), ("small", small)):
        torch.save(network.state_dict(), tmp_path / name)
        save_pruned(tmp_path / f"{name}.safetensors", network)
    assert count_parameters(small) < 0.5 * count_parameters(model)
    assert all((tmp_path / f"small{end}").stat().st_size < (tmp_path / f"dense{end}").stat().st_size
               for end in ("", ".safetensors"))  # fmt: skip


def test_it_is_not_faster(pruned: tuple[nn.Module, nn.Module]) -> None:
    """Less arithmetic, dense layers only; for where that does not help, see `tests/insight/test_report.py`."""
    model, small = pruned
    assert count_macs(small, X) == 6 * 16 + 16 * 8 + 8 * 3 < 0.5 * count_macs(model, X)
    assert [type(layer) for layer in small] == [type(layer) for layer in model]
    assert not any(small._forward_pre_hooks or layer._forward_pre_hooks for layer in small.modules())


def test_the_pruned_model_cannot_be_loaded(pruned: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    _, small = pruned
    save_pruned(tmp_path / "small", small)
    assert torch.equal(outputs(load_pruned(tmp_path / "small", build)), outputs(small))


class TestMasksAreLostInACheckpoint:
    @pytest.mark.parametrize("steps", [0, 3, 10, 20])
    def test_the_models_own_state_dict_has_them(self, steps: int, tmp_path: Path) -> None:
        """Before the learning, in it and after it: plain `state_dict`, plain `torch.load`."""
        phases = {"dense": 0.1, "fixed": 0.4}
        model, session = started(phases=phases)
        train(model, session, steps)
        torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
        other, its_session = started(phases=phases)
        other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
        assert its_session.phase is session.phase
        assert torch.equal(outputs(other), outputs(model))

    def test_a_training_goes_on(self) -> None:
        whole, session = started(phases={"fixed": 0.3})
        train(whole, session, 8)
        state = copy.deepcopy((whole.state_dict(), session.state_dict()))
        resumed, its_session = started(phases={"fixed": 0.3})
        resumed.load_state_dict(state[0])
        its_session.load_state_dict(state[1])
        for model, own in ((whole, session), (resumed, its_session)):
            train(model, own, 12)  # with fresh optimizers, both of them
        assert torch.equal(outputs(whole), outputs(resumed))


class TestDeepcopyFails:
    @pytest.mark.parametrize("steps", [0, 5, 20])
    def test_in_every_phase_and_after_a_forward(self, steps: int) -> None:
        model, session = started(phases={"dense": 0.1, "fixed": 0.4})
        train(model, session, steps)
        model(X)
        assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))
        assert torch.equal(outputs(plain_copy(copy.deepcopy(model))), outputs(plain_copy(model)))

    def test_a_copy_is_nobody_elses(self) -> None:
        model, session = started()
        copied, before = copy.deepcopy(model), outputs(model)
        train(model, session, 20)
        assert torch.equal(outputs(copied), before)


class TestMovingAverage:
    def average_of(self, model: nn.Module) -> Any:
        return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))

    def test_follows_the_gates_through_all_phases(self) -> None:
        """Made before the gates act, the average still ends with decided ones."""
        model, session = started(phases={"dense": 0.2, "fixed": 0.3})
        average = self.average_of(model)
        for _ in range(20):
            train(model, session, 1)
            average.update_parameters(model)
        assert session.phase is Phase.FIXED
        masks = [module for module in average.module.modules() if hasattr(module, "hard")]
        assert {mask.phase for mask in masks} == {Phase.FIXED}
        assert sum(int(mask.hard.sum()) for mask in masks) == 16 + 8

    def test_can_be_shrunk(self) -> None:
        model, session = started(phases={"fixed": 0.3})
        average = self.average_of(model)
        for _ in range(20):
            train(model, session, 1)
            average.update_parameters(model)
        expected = outputs(average.module)
        assert not torch.equal(expected, outputs(model))
        model.load_state_dict(average.module.state_dict())
        masks = session.extract()
        session.detach()
        assert torch.allclose(outputs(shrink(model, masks, X)), expected, atol=1e-6)


def test_accuracy_collapses_because_a_whole_layer_went() -> None:
    everything = {"op_names": ["0", "3"], "sparse_ratio": 0.99, "global_group_id": 1}
    model, session = started(rule=everything)
    train(model, session, 20)
    masks = session.extract()
    assert all(bool(targets["weight"].any()) for targets in masks.values())
    session.detach()
    assert outputs(shrink(model, masks, X)).std(0).min() > 0


class TestSampledAndHardMasksDisagree:
    def test_the_gap_is_told_all_along(self) -> None:
        model, session = started()
        gaps = []
        for _ in range(20):
            train(model, session, 1)
            status = session.status()
            gaps.append(abs(status.sparsity - status.soft_sparsity))
        assert max(gaps) > 0

    def test_what_was_evaluated_is_what_comes_out(self) -> None:
        """Eval mode uses the masks that would be decided now; after the decision train mode does too."""
        model, session = started(phases={"fixed": 0.4})
        train(model, session, 20)
        evaluated = outputs(model)
        for module in model.modules():
            module.training = not isinstance(module, nn.BatchNorm1d)
        assert torch.equal(model(X), evaluated)
        masks = session.extract()
        session.detach()
        assert torch.allclose(outputs(shrink(model, masks, X)), evaluated, atol=1e-6)


def test_ranks_disagree() -> None:
    """A sample depends on the seed and the step only: not on data, or on torch's generator of a process."""
    samples = []
    for rank in range(2):
        model, session = started()
        torch.manual_seed(rank)
        model.train()
        model(X[rank::2])
        samples.append([mask.gates() for mask in session.plan.masks.values()])
    assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))


@pytest.mark.slow
def test_the_onnx_file_is_the_dense_one(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from gumbel_plugin.runs.export import export_run

    config = {
        "model": {"name": "lenet300", "options": {"in_features": 64}},
        "data": {"name": "digits", "batch_size": 256},
        "training": {"max_epochs": 1, "accelerator": "cpu"},
        "pruning": {"config_list": [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.5}]},
        "report": {"html": False, "tensorboard": False, "latency_batches": []},
    }
    result = run(RunConfig.load(config), tmp_path / "run")
    file, error = export_run(tmp_path / "run", "onnx")
    sizes = [tuple(tensor.dims) for tensor in onnx.load(file).graph.initializer if len(tensor.dims) == 2]
    assert sorted(map(sorted, sizes)) == sorted(map(sorted, [(64, 150), (150, 50), (50, 10)]))
    assert count_parameters(result.small) < file.stat().st_size / 4 < 1.2 * count_parameters(result.small)
    assert error < 1e-5


def test_a_misspelt_layer_name_is_ignored() -> None:
    with pytest.raises(TargetError, match=r"'conv1' matches no module"):
        started(rule={"op_names": ["conv1"], "sparse_ratio": 0.5})
    with pytest.raises(ConfigError, match="did you mean 'op_names'"):
        RunConfig.load([{"op_name": ["0"], "sparse_ratio": 0.5}])
