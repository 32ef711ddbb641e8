"""Attention whose heads cannot leave, or not exactly: it is found out, and the reason is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gumbel_plugin.graph.dependency_groups import find_groups


class _Block(nn.Module):
    """One attention layer of the user's; `weights` also returns what it attends to."""

    def __init__(self, attention: nn.Module, weights: bool = False) -> None:
        super().__init__()
        self.attention, self.weights = attention, weights
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        output, weights = self.attention(x, x, x)
        return (self.head(output), weights) if self.weights else self.head(output)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (lambda: nn.MultiheadAttention(16, 4, add_bias_kv=True), "add_bias_kv"),
        (lambda: nn.MultiheadAttention(16, 4, add_zero_attn=True), "add_zero_attn"),
        (lambda: type("Special", (nn.MultiheadAttention,), {})(16, 4), "Special"),
        (lambda: nn.MultiheadAttention(16, 1), "one head"),
    ],
)
def test_unsupported_attention_says_why(attention: Callable[[], nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    groups = {group.name: group for group in find_groups(_Block(attention()), torch.randn(2, 5, 16))}
    assert groups["attention"].safety == "unsupported"
    assert reason in groups["attention"].reason


def test_heads_whose_weights_are_returned_are_not_exact() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 5, 16)
    for weights, safety in ((True, "inexact"), (False, "exact")):
        model = _Block(nn.MultiheadAttention(16, 4, batch_first=True), weights)
        (heads,) = [group for group in find_groups(model, inputs) if group.name == "attention"]
        assert heads.safety == safety


class _NormedQueries(nn.Module):
    """Like Hugging Face's Llama, but queries are normalized: over each head, or over all of them."""

    def __init__(self, over_heads: bool) -> None:
        super().__init__()
        self.head_dim = 4
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))
        self.q_norm = nn.LayerNorm(16 if over_heads else 4, elementwise_affine=False)
        self.over_heads = over_heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.over_heads:
            q = F.layer_norm(q, q.shape[-1:])
        q, k, v = (each.unflatten(-1, (-1, 4)).transpose(1, 2) for each in (q, k, v))
        if not self.over_heads:
            q = self.q_norm(q)
        out: Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def test_a_lookalike_whose_heads_depend_on_each_other_is_not_exact() -> None:
    torch.manual_seed(0)
    for over_heads, safety in ((True, "inexact"), (False, "exact")):
        model = nn.Sequential(nn.Linear(16, 16), _NormedQueries(over_heads), nn.Linear(16, 3))
        (heads,) = [group for group in find_groups(model, torch.randn(2, 5, 16)) if group.name == "1"]
        assert (heads.size, heads.safety) == (4, safety)
