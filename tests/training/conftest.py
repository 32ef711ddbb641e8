"""Shorthands for sessions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.config import PruningConfig, PruningSection
from gumbel_plugin.training.session import MaskingSession


@pytest.fixture
def pruning() -> Callable[..., PruningSection]:
    """Return the function that makes a section of these entries of a config list."""

    def configure(*entries: dict[str, Any], **keys: Any) -> PruningSection:
        return PruningConfig.load({"pruning": {"config_list": list(entries), **keys}}).pruning

    return configure


@pytest.fixture
def mlp() -> Callable[..., nn.Sequential]:
    """Return the function that makes a network of linear layers with these widths."""

    def make(*sizes: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return make


@pytest.fixture
def element_session(pruning: Callable[..., PruningSection]) -> Callable[..., MaskingSession]:
    """Return the function that starts a session with one gate for every weight of the linear layers."""

    def start(model: nn.Module, total: int | None = None, **keys: Any) -> MaskingSession:
        entry = {"op_types": ["Linear"], "granularity": "element", "sparse_ratio": keys.pop("sparse_ratio", None)}
        session = MaskingSession(model, pruning(entry, **keys))
        session.start(total)
        return session

    return start


@pytest.fixture
def train_gates() -> Callable[..., list[float]]:
    """Return the function that trains a started session's model and its gates; it returns the task's losses.

    It is the loop of docs/training_loops.md: one loss, one backward, all optimizers, the session's step.
    """

    def train(
        session: MaskingSession, task: Callable[[], Tensor], steps: int, weights: torch.optim.Optimizer | None = None
    ) -> list[float]:
        optimizers = [*([weights] if weights is not None else []), *session.optimizers()]
        losses = []
        for _ in range(steps):
            loss = session.guard(task())
            losses.append(loss.item())
            for optimizer in optimizers:
                optimizer.zero_grad()
            (loss + session.loss()).backward()
            for optimizer in optimizers:
                optimizer.step()
            session.step()
        return losses

    return train


@pytest.fixture
def group_session(section: Callable[..., PruningSection], randomize_logits: Any) -> Callable[..., MaskingSession]:
    """Return the function that starts a session on all groups of a network, with random logits."""

    def start(network: Any, seed: int = 0, **keys: Any) -> MaskingSession:
        config = section(network.model, **keys)
        session = MaskingSession(network.model, config, list(network.groups().values()), seed)
        session.start()
        randomize_logits(session)
        return session

    return start


@pytest.fixture
def randomize_logits() -> Callable[..., None]:
    """Return the function that leaves about half of a session's gates closed, never all of one mask."""

    @torch.no_grad()
    def randomize(session: MaskingSession, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for mask in session.plan.masks.values():
            nn.init.normal_(mask.logit, generator=generator)
            mask.logit.view(-1)[0] = 1.0
            mask.logit.view(-1)[-1] = -1.0

    return randomize
