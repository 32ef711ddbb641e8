"""Learning from a teacher beside the task: what enters the backward is what the formula says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin import Distillation, GumbelGroupPruner, MaskingSession, PruningConfig, save_pruned, shrink
from gumbel_plugin.config import DistillationConfig
from gumbel_plugin.errors import ConfigError, DataError, LifecycleError, TargetError
from gumbel_plugin.layers.weights import plain_copy
from gumbel_plugin.training.loop import MaskingLoop

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X[:, :4].argmax(1)
RULES = [{"op_names": ["first"], "sparse_ratio": 0.5}]


class Net(nn.Module):
    """Two layers, and a norm whose mode shows; the form of its output can be chosen."""

    def __init__(self, seed: int = 0, form: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.drop, self.head = (
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.3),
            nn.Linear(8, 4),
        )
        self.form = form
        self.double()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.drop(torch.tanh(self.norm(self.first(x)))))
        if self.form == "tuple":
            return logits, x
        if self.form == "dict":
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return {"loss": loss, "features": x, "logits": logits}
        return logits


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [each for each in found if each is not None]


def by_backward(loss: Tensor, model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def by_hand(student: Net, teacher: Net, alpha: float, beta: float, temperature: float, kind: str = "kl") -> Tensor:
    """Return the loss by its definition, from a forward that draws the same dropout."""
    torch.manual_seed(3)
    h = student.first(X)
    z = student.head(student.drop(torch.tanh(student.norm(h))))
    with torch.no_grad():
        h_t = teacher.first(X)
        z_t = teacher.head(torch.tanh(teacher.norm.eval()(h_t)))
    if kind == "kl":
        p, q = (torch.exp(each / temperature) for each in (z_t, z))
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        distance = temperature**2 * (p * torch.log(p / q)).sum(1).mean()
    elif kind == "mse":
        distance = ((z - z_t) ** 2).mean()
    else:
        distance = 1 - ((z * z_t).sum(1) / z.norm(dim=1) / z_t.norm(dim=1)).mean()
    hidden = ((h - h_t) ** 2).mean() / (h_t**2).mean()
    return (1 - alpha) * F.cross_entropy(z, Y) + alpha * distance + beta * hidden


def settings(alpha: float, beta: float, temperature: float = 2.0, kind: str = "kl") -> dict[str, Any]:
    layers = {"layers": ["first"], "hidden": beta} if beta else {}
    return {"logits": alpha, "temperature": temperature, "loss": kind, **layers}


@pytest.mark.parametrize("kind", ["kl", "mse", "cosine"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.0), (0.4, 1.5), (0.0, 2.0), (1.0, 0.0)])
def test_value_and_gradients_are_those_of_the_formula(alpha: float, beta: float, kind: str) -> None:
    student, teacher = Net(0), Net(1)
    expected = by_hand(student, teacher, alpha, beta, 3.0, kind)
    reference = gradients(expected, student)
    distillation = Distillation(teacher, settings(alpha, beta, 3.0, kind))
    distillation.attach(student)
    torch.manual_seed(3)
    loss = distillation.loss(F.cross_entropy(student(X), Y))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    close(by_backward(loss, student), reference)
    torch.manual_seed(3)  # without `loss` the gradients are the same
    close(by_backward(F.cross_entropy(student(X), Y), student), reference)
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    distillation.detach()
    torch.manual_seed(3)
    close(by_backward(F.cross_entropy(student(X), Y), student), gradients(by_hand(student, teacher, 0, 0, 1), student))


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_a_scaled_loss_scales_all_of_it(form: str) -> None:
    """As gradient scalers and accumulated batches do: what comes after `loss` counts for the distillation too."""
    student, teacher = Net(0, form), Net(1, form)
    reference = [65536.0 / 3 * each for each in gradients(by_hand(student, teacher, 0.6, 0.5, 2.0), student)]
    distillation = Distillation(teacher, settings(0.6, 0.5))
    distillation.attach(student)
    torch.manual_seed(3)
    output = student(X, Y)
    logits = output if form == "tensor" else output[0] if form == "tuple" else output["logits"]
    close(by_backward(distillation.loss(F.cross_entropy(logits, Y)) * 65536.0 / 3, student), reference)
    if form == "dict":  # a loss of the model's own needs no `loss`
        torch.manual_seed(3)
        close(by_backward(student(X, Y)["loss"] * 65536.0 / 3, student), reference)
    torch.manual_seed(3)
    distillation.loss_share = 65536.0 / 3
    output = student(X)
    logits = output if form == "tensor" else output[0] if form == "tuple" else output["logits"]
    close(by_backward(F.cross_entropy(logits, Y) * 65536.0 / 3, student), reference)


def test_several_forwards_of_one_loss() -> None:
    student, teacher = Net(0).eval(), Net(1)
    student.training = True  # the root says that it trains; no dropout, so that two forwards are alike
    distillation = Distillation(teacher, settings(0.6, 0.5))
    distillation.attach(student)
    once = by_backward(distillation.loss(F.cross_entropy(student(X), Y)), student)
    loss = distillation.loss(F.cross_entropy(student(X), Y) + F.cross_entropy(student(X), Y))
    close(by_backward(loss, student), [2 * each for each in once])
    loss = F.cross_entropy(student(X), Y)
    student.zero_grad()
    loss.backward(retain_graph=True)
    loss.backward()  # of a graph that is used twice the distillation enters once
    twice = [parameter.grad for parameter in student.parameters()]
    task = gradients(0.4 * F.cross_entropy(student(X), Y), student)
    distillation.detach()
    task = gradients(0.4 * F.cross_entropy(student(X), Y), student)
    close(twice, [a + b for a, b in zip(once, task, strict=True)])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    student, teacher = Net(0).float(), Net(1).float()
    x = X.float()
    distillation = Distillation(teacher, settings(0.5, 0.5))
    distillation.attach(student)
    torch.manual_seed(3)
    full = by_backward(F.cross_entropy(student(x), Y), student)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype):
        loss = distillation.loss(F.cross_entropy(student(x), Y)) * 4096
    for ours, theirs in zip(by_backward(loss, student), full, strict=True):
        torch.testing.assert_close(ours / 4096, theirs, rtol=0.1, atol=0.01)


# Sessions -------------------------------------------------------------------------------------------------------------


def session_of(model: nn.Module, pruning: dict[str, Any] | None = None, **more: Any) -> MaskingSession:
    config = {"pruning": {"config_list": RULES, **(pruning or {})}, "seed": 1}
    return MaskingSession(model, config, example_inputs=X, **more)


@pytest.fixture
def train(train_gates: Callable[..., list[float]]) -> Callable[[MaskingSession, int], None]:
    """Return the function that trains a session for so many steps, with dropout as it was the last time."""

    def train(session: MaskingSession, steps: int) -> None:
        torch.manual_seed(7)
        weights = torch.optim.SGD(session.weight_parameters(), 0.1)
        train_gates(session, lambda: F.cross_entropy(session.model(X), Y), steps, weights)

    return train


def test_the_dense_teacher_is_the_network_before_its_gates(train: Callable[..., None]) -> None:
    model = Net()
    session = session_of(model, {"weight_init": "kaiming_normal"}, distillation={"logits": 0.5})
    with torch.no_grad():
        model.head.weight.add_(1)  # weights that are loaded before the start count
    dense = copy.deepcopy(model)
    session.start(6)
    train(session, 6)
    teacher = session.distillation.teacher
    assert teacher is not None
    assert not teacher.training
    assert list(teacher.state_dict()) == list(dense.state_dict())
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
    assert not any(name.startswith("teacher") for name, _ in model.named_parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_after_dense_training_the_teacher_is_what_that_left(train: Callable[..., None]) -> None:
    model, alone = Net(), Net()
    session = session_of(model, {"phases": {"dense": 0.5}}, distillation={"logits": 0.5})
    plain = session_of(alone, {"phases": {"dense": 0.5}})
    for each in (session, plain):
        each.start(8)
        train(each, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    dense = plain_copy(model)
    train(session, 1)
    teacher = session.distillation.teacher
    assert teacher is not None
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
    assert not torch.equal(model.head.weight, dense.get_submodule("head").weight)


@pytest.mark.parametrize("dense", [0.0, 0.5])
@pytest.mark.parametrize("at", [2, 5])
def test_goes_on_from_a_state_of_another_process(dense: float, at: int) -> None:
    """The network there is another one by then: the teacher's weights are in the state."""
    pruning = {"phases": {"dense": dense}}
    whole = session_of(Net().eval(), pruning, distillation={"logits": 0.5})
    whole.start(8)
    for module in whole.model.modules():
        module.training = not isinstance(module, nn.Dropout)
    optimizer = torch.optim.SGD(whole.weight_parameters(), 0.1)  # keeps no state, and neither do the gates'
    state: Any = None

    def step(session: MaskingSession, optimizer: Any) -> None:
        session.guard(F.cross_entropy(session.model(X), Y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()

    for number in range(8):
        if number == at:
            state = copy.deepcopy((whole.model.state_dict(), whole.state_dict()))
        step(whole, optimizer)
    model = Net(5)
    other = session_of(model, pruning, distillation={"logits": 0.5})
    other.start(8)
    for module in model.modules():
        module.training = not isinstance(module, nn.Dropout)
    model.load_state_dict(state[0])
    other.load_state_dict(state[1])
    optimizer = torch.optim.SGD(other.weight_parameters(), 0.1)
    for _ in range(at, 8):
        step(other, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.model.parameters(), strict=True))


def test_states_of_other_teachers_are_refused() -> None:
    session = session_of(Net(), distillation={"logits": 0.5})
    session.start(4)
    state = session.state_dict()
    assert "teacher" not in session_of(Net()).distillation.state_dict()
    for damage in ({"head.weight": torch.zeros(1)}, {"other": torch.zeros(1)}):
        with pytest.raises(TargetError, match="teacher's weights"):
            session.load_state_dict({**state, "steps": 3, "teacher": {**state["teacher"], **damage}})
        assert session.steps == 0  # nothing was taken over
    with pytest.raises(TargetError, match="teacher's weights"):
        session.load_state_dict({**state, "teacher": {}})


@pytest.mark.parametrize("form", ["state_dict", "safetensors", "pruned"])
def test_teachers_from_files(form: str, tmp_path: Path, train: Callable[..., None]) -> None:
    from safetensors.torch import save_file

    path, other = tmp_path / form, Net(4).eval()
    if form == "state_dict":
        torch.save(other.state_dict(), path)
    elif form == "safetensors":
        save_file(other.state_dict(), path)
    else:
        mask = torch.ones(8, 6, dtype=torch.float64)
        mask[:3] = 0
        with torch.no_grad():
            other.head.weight[:, :3] = 0
        other = shrink(other, {"first": {"weight": mask}}, X)  # type: ignore[assignment]
        assert other.first.out_features == 5
        save_pruned(path, other)
    session = session_of(Net(), distillation={"teacher": str(path)})
    teacher = session.distillation.teacher
    assert teacher is not None
    torch.testing.assert_close(teacher(X), other(X))
    session.start(3)
    train(session, 3)
    torch.testing.assert_close(teacher(X), other(X))
    assert "teacher" not in session.state_dict()  # the file has it
    torch.save({"head.weight": torch.zeros(4, 8)}, tmp_path / "part")
    (tmp_path / "text").write_text("none")
    for name, reason in (
        ("part", "no weights for this network"),
        ("text", "cannot be read"),
        ("none", "does not exist"),
    ):
        with pytest.raises(DataError, match=reason) as error:
            session_of(Net(), distillation={"teacher": str(tmp_path / name)})
        assert name in str(error.value)


def test_a_module_teaches_in_every_form_of_the_argument(train: Callable[..., None]) -> None:
    teacher, found = Net(2), []
    for given in (teacher, {"teacher": teacher, "logits": 0.5}, Distillation(teacher)):
        model = Net()
        session = session_of(model, distillation=given)
        session.start(3)
        train(session, 3)
        assert session.distillation.teacher is teacher
        session.detach()
        found.append(model.head.weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_session_leaves_nothing_behind(train: Callable[..., None]) -> None:
    model = Net()
    session = session_of(model, distillation={"logits": 0.5, "hidden": 0.5, "layers": ["first"]})
    session.start(3)
    train(session, 2)
    copied = copy.deepcopy(model)
    assert not plain_copy(model)._forward_hooks
    with pytest.raises(RuntimeError):
        model(X[:, :3])  # leaves a forward half-way
    copy.deepcopy(model)
    train(session, 1)
    session.extract()
    session.detach()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(module._forward_hooks for module in model.modules())
    copied(X).sum().backward()  # a copy is taught too, as it is gated too


def test_pickles_lack_the_teacher() -> None:
    student, distillation = Net(0), Distillation(Net(1), {"logits": 0.5})
    distillation.attach(student)
    loaded = pickle.loads(pickle.dumps(student))
    torch.manual_seed(3)
    loss = F.cross_entropy(loaded(X), Y)
    torch.manual_seed(3)
    distillation.detach()
    close(by_backward(loss, loaded), by_backward(F.cross_entropy(student(X), Y), student))


# After the cut --------------------------------------------------------------------------------------------------------


def test_a_narrower_layer_is_compared_on_its_kept_channels() -> None:
    dense = Net(0).eval()
    mask = torch.ones(8, 6, dtype=torch.float64)
    mask[[0, 3, 4]] = 0
    kept = mask[:, 0].nonzero().flatten()
    with torch.no_grad():
        dense.head.weight[:, mask[:, 0] == 0] = 0
    small: Any = shrink(dense, {"first": {"weight": mask}}, X)
    with torch.no_grad():
        small.first.weight.add_(0.3)
    distillation = Distillation(dense, {"logits": 0, "hidden": 1.0, "layers": ["first", "norm"]})
    distillation.attach(small)
    small.training = True
    task = small(X).sum() * 0
    found = distillation.loss(task)
    with torch.no_grad():
        h, t = small.first(X), dense.first(X)[:, kept]
        n, u = small.norm(h), dense.norm(dense.first(X))[:, kept]
    expected = sum(((a - b) ** 2).mean() / (b**2).mean() for a, b in ((h, t), (n, u)))
    torch.testing.assert_close(found, expected)
    small._gumbel_removed = {}  # nobody knows which ones
    with pytest.raises(TargetError, match=r"'first' gives \(12, 5\) in the network and \(12, 8\) in the teacher"):
        small(X)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_group_pruner_goes_on_after_the_cut(steps: int) -> None:
    model = Net(0).eval()
    dense = copy.deepcopy(model)
    pruner = GumbelGroupPruner(
        model, X, pruning_ratio=0.5, ignored_layers=[model.head], iterative_steps=steps,
        distillation={"logits": 0.4, "hidden": 0.5, "layers": ["first", "head"]},
    )  # fmt: skip
    model.training = True
    for _ in range(steps):
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        pruner.regularize(model, loss)
        model.zero_grad()
        pruner.step()
    assert model.first.out_features == 4
    teacher = pruner.distillation.teacher
    assert teacher is not None
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), dense.parameters(), strict=True))
    (kept,) = {tuple(mask["weight"][:, 0].nonzero().flatten().tolist()) for mask in [pruner.masks()["first"]]}
    h, z = model.first(X), model.head(torch.tanh(model.norm(model.first(X))))
    h_t = dense.first(X)[:, kept].detach()
    z_t = dense(X).detach()
    kl = 4 * F.kl_div(F.log_softmax(z / 2, 1), F.softmax(z_t / 2, 1), reduction="batchmean")
    hidden = ((h - h_t) ** 2).mean() / (h_t**2).mean() + ((z - z_t) ** 2).mean() / (z_t**2).mean()
    reference = gradients(0.6 * F.cross_entropy(z, Y) + 0.4 * kl + 0.5 * hidden, model)
    # The head's output is compared twice: as an output, which weighs the task, and as a layer.
    close(by_backward(F.cross_entropy(model(X), Y), model), reference)
    state = pruner.state_dict()
    other: Any = Net(9)
    again = GumbelGroupPruner(
        other, X, pruning_ratio=0.5, ignored_layers=[other.head], iterative_steps=steps, distillation={"logits": 0.4}
    )
    again.load_state_dict(state)
    teacher = again.distillation.teacher
    assert teacher is not None
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), dense.parameters(), strict=True))
    pruner.distillation.detach()
    assert not model._forward_hooks


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logits": 1.5}, "distillation.logits = 1.5"),
        ({"hidden": -1}, "distillation.hidden = -1"),
        ({"temperature": 0}, "distillation.temperature = 0"),
        ({"loss": "ce"}, "distillation.loss = 'ce'"),
        ({"hidden": 1}, "names no layers"),
        ({"layers": ["first"]}, "its weight, hidden, is 0"),
        ({"hidden": 1, "layers": ["["]}, "no regular expression"),
        ({"logit": 1}, "did you mean 'logits'"),
    ],
)
def test_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PruningConfig.load({"pruning": {}, "distillation": wrong})
    assert message in str(error.value)
    with pytest.raises(ConfigError) as error:
        Distillation(Net(), wrong)
    assert message in str(error.value)


def test_a_whole_configuration_is_read() -> None:
    config = {"pruning": {"config_list": RULES}, "distillation": {"logits": 0.25}}
    loaded = PruningConfig.load(config)
    assert loaded.distillation == DistillationConfig(logits=0.25)
    assert PruningConfig.load(loaded.model_dump(exclude_none=True)) == loaded
    assert MaskingSession(Net(), config, example_inputs=X).distillation.settings.logits == 0.25
    for given, expected in (({"logits": 1}, 1), ({}, 0.5), (Net(1), 0.25)):  # a teacher alone goes with the section
        session = MaskingSession(Net(), config, example_inputs=X, distillation=given)
        assert session.distillation.settings.logits == expected
    assert not session_of(Net()).distillation.settings.active


def test_what_cannot_be_compared() -> None:
    model = Net()
    with pytest.raises(ConfigError, match="the teacher is the model itself"):
        session_of(model, distillation=model)
    assert model.training
    with pytest.raises(ConfigError, match="it must be a mapping of settings"):
        session_of(model, distillation=3)
    with pytest.raises(TargetError, match=r"'frist' matches no module .*did you mean 'first'"):
        session_of(model, distillation={"hidden": 1, "layers": ["frist"]})
    with pytest.raises(LifecycleError, match="no teacher"):
        Distillation().attach(model)
    wide, one = nn.Linear(6, 5).double(), nn.Linear(6, 1).double()
    for student, teacher, message in (
        (model, wide, r"\(12, 4\), the teacher's \(12, 5\)"),
        (one, copy.deepcopy(one), "use 'mse'"),
    ):
        distillation = Distillation(teacher)
        distillation.attach(student)
        with pytest.raises((ConfigError, TargetError), match=message):
            student(X)
        distillation.detach()


def test_layers_that_are_called_by_their_parts() -> None:
    class Skipping(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.head(F.linear(x, self.first.weight) if self.training else self.first(x))

    student, distillation = Skipping(), Distillation(Skipping(1), {"hidden": 1, "layers": ["first"]})
    distillation.attach(student)
    with pytest.raises(TargetError, match="'first' was called 0 times in a forward of the network and 1 times"):
        student(X)


def test_parts_of_a_network_that_are_called_by_themselves() -> None:
    model = Net()
    loop = MaskingLoop(session_of(model, distillation={"logits": 0.5}))
    loop.start(3)
    with pytest.raises(LifecycleError, match="call the network itself"):
        loop.guard(model.head(torch.tanh(model.first(X))).sum())
