"""The attention layers that heads can leave: equal to torch's and torchvision's own, until one does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.graph.attention_heads import kind_of, remove_heads
from gumbel_plugin.layers.compact_attention import CompactMultiheadAttention, CompactWindowAttention


def _random(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def _masks(kind: str) -> dict[str, Tensor]:
    """Masks for batch 2, 4 heads, 5 queries and 6 keys; no row is closed altogether."""
    attention, padding = torch.rand(5, 6) < 0.3, torch.zeros(2, 6, dtype=torch.bool)
    attention[:, 0], padding[1, 4:] = False, True
    per_head = torch.rand(8, 5, 6) < 0.3
    per_head[:, :, 0] = False
    return {
        "none": {},
        "bool": {"attn_mask": attention},
        "float": {"attn_mask": torch.randn(5, 6)},
        "per_head": {"attn_mask": per_head},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": attention, "key_padding_mask": padding},
    }[kind]


@pytest.mark.parametrize("weights", ["none", "averaged", "per_head"])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "per_head", "padding", "both"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_compact_attention_equals_torchs_and_loses_heads(batch_first: bool, masks: str, weights: str) -> None:
    torch.manual_seed(1)
    options: dict[str, Any] = {"batch_first": batch_first, "kdim": 12, "vdim": 20, "bias": masks != "float"}
    original = _random(nn.MultiheadAttention(16, 4, **options)).eval()
    holder = nn.ModuleDict({"attention": CompactMultiheadAttention(copy.deepcopy(original))})  # type: ignore[arg-type]
    inputs = [torch.randn(2, length, width) for length, width in ((5, 16), (6, 12), (6, 20))]
    inputs = inputs if batch_first else [each.transpose(0, 1) for each in inputs]
    asked = {"need_weights": weights != "none", "average_attn_weights": weights == "averaged", **_masks(masks)}
    expected, expected_weights = original(*inputs, **asked)
    output, output_weights = holder["attention"](*inputs, **asked)
    torch.testing.assert_close(output, expected)
    assert (output_weights is None) == (expected_weights is None)
    if expected_weights is not None:
        torch.testing.assert_close(output_weights, expected_weights)
    assert kind_of(holder["attention"]) is not None

    remove_heads(holder, "attention", torch.tensor([0, 2]))
    original.out_proj.weight.data[:, [0, 1, 2, 3, 8, 9, 10, 11]] = 0  # type: ignore[union-attr, operator]
    torch.testing.assert_close(holder["attention"](*inputs, **asked)[0], original(*inputs, **asked)[0])
    if weights == "per_head":
        torch.testing.assert_close(holder["attention"](*inputs, **asked)[1], expected_weights[:, [1, 3]])


def test_compact_attention_takes_unbatched_inputs() -> None:
    torch.manual_seed(1)
    original = _random(nn.MultiheadAttention(16, 4)).eval()
    compact = CompactMultiheadAttention(copy.deepcopy(original))  # type: ignore[arg-type]
    x, padding = torch.randn(5, 16), torch.tensor([False, False, True, False, False])
    for asked in ({}, {"key_padding_mask": padding}, {"attn_mask": torch.randn(4, 5, 5)}):
        for ours, theirs in zip(compact(x, x, x, **asked), original(x, x, x, **asked), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_compact_attention_refuses_what_it_would_get_wrong() -> None:
    original, x = nn.MultiheadAttention(12, 3, batch_first=True), torch.randn(2, 5, 12)
    compact = CompactMultiheadAttention(original)
    with pytest.raises(ConfigError, match="is_causal"):
        compact(x, x, x, is_causal=True)
    nested = torch.nested.nested_tensor([x[0], x[1, :3]])
    with pytest.raises(ConfigError, match="nested"):
        compact(nested, nested, nested, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))


def test_compact_attention_drops_weights_only_in_train_mode() -> None:
    torch.manual_seed(1)
    original, x = nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=True), torch.randn(2, 5, 12)
    compact = CompactMultiheadAttention(original)
    for need_weights in (True, False):
        first, second = (compact(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.allclose(first, second)
    compact.eval()
    torch.testing.assert_close(compact(x, x, x, need_weights=True)[0], compact(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("shift", [[0, 0], [2, 2], [0, 1]])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (4, 4), (3, 10)])
@pytest.mark.parametrize("version", [1, 2])
def test_compact_windows_equal_torchvisions(version: int, size: tuple[int, int], shift: list[int]) -> None:
    from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

    torch.manual_seed(1)
    original = _random((ShiftedWindowAttention, ShiftedWindowAttentionV2)[version - 1](12, [4, 4], shift, 3)).double()
    compact = CompactWindowAttention(copy.deepcopy(original))
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    for table in (original, compact):
        for name, buffer in table.named_buffers():
            table.register_buffer(name, buffer.double() if buffer.is_floating_point() else buffer)
    torch.testing.assert_close(compact(x), original(x))
    assert set(compact.state_dict()) == set(original.state_dict())


@pytest.mark.parametrize("separate", [False, True])
def test_compact_attention_keeps_flags_and_draws_nothing(separate: bool) -> None:
    original = nn.MultiheadAttention(16, 4, kdim=12 if separate else None, dtype=torch.float64).eval()
    frozen = original.k_proj_weight if separate else original.in_proj_weight
    assert frozen is not None
    frozen.requires_grad_(False)
    random = torch.get_rng_state()
    compact = CompactMultiheadAttention(original)
    assert torch.equal(torch.get_rng_state(), random)
    assert {parameter.dtype for parameter in compact.parameters()} == {torch.float64}
    trainable = [linear.weight.requires_grad for linear in (compact.q_proj, compact.k_proj, compact.v_proj)]
    assert trainable == ([True, False, True] if separate else [False] * 3)
    assert compact.q_proj.bias.requires_grad
    assert not compact.training
    assert not any(parameter.is_meta for parameter in (*compact.parameters(), *compact.buffers()))


@torch.no_grad()
def test_compact_windows_stay_near_torchvisions_under_autocast() -> None:
    from torchvision.models.swin_transformer import ShiftedWindowAttentionV2

    torch.manual_seed(1)
    original = _random(ShiftedWindowAttentionV2(12, [4, 4], [2, 2], 3))
    compact = CompactWindowAttention(copy.deepcopy(original))
    x = torch.randn(2, 6, 6, 12)  # padded: there the keys are 0, and normalized
    expected = original(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = compact(x)
    assert float((output - expected).abs().max() / expected.abs().max()) < 0.05
