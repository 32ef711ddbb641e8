"""Attention layers whose heads need not fill the width of the stream: what torch's and torchvision's own cannot be.

`nn.MultiheadAttention` and torchvision's shifted windows derive the size of a head from the width and the number of
heads, so a layer that lost a head cannot be one of them. The layers here compute the same, the size of a head given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError

_LARGEST_LOGIT_SCALE = math.log(100.0)  # Liu et al. 2022 (Swin V2), section 3.2
_OTHER_REGION = -100.0  # what torchvision adds between pixels that are no neighbors before the cyclic shift


class CompactMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` with any number of heads; forward takes and returns the same.

    Attributes:
        num_heads: Heads left.
        head_dim: Channels of a head.
        mask_heads: For every head its place in a per-head ``attn_mask``, which keeps the number of heads that it had.
        total_heads: How many heads a per-head ``attn_mask`` has.
    """

    mask_heads: Tensor
    # torch's encoder layer asks for this before it takes its fused path, which knows packed weights only.
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """Take over the heads and weights of a torch layer, all heads of it.

        Args:
            attention: The layer; its output projection becomes part of this one.
        """
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = attention.embed_dim, attention.num_heads, attention.head_dim
        self.dropout, self.batch_first, self.total_heads = attention.dropout, attention.batch_first, self.num_heads
        packed, packed_bias = attention.in_proj_weight, attention.in_proj_bias
        separate = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        weights = separate if packed is None else _thirds(packed)
        biases = (None, None, None) if packed_bias is None else _thirds(packed_bias)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = attention.out_proj
        self.register_buffer("mask_heads", torch.arange(self.num_heads, device=self.out_proj.weight.device))
        self.train(attention.training)

    @property
    def in_proj_weight(self) -> Tensor:
        """The packed projections that torch's encoder looks at before it chooses a path."""
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The packed biases, None without."""
        if self.q_proj.bias is None:
            return None
        return torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see `nn.MultiheadAttention` for arguments and shapes.

        Returns:
            The output, and the weights: averaged over the heads that are left, or of each of them.

        Raises:
            ConfigError: If ``is_causal`` comes without the ``attn_mask`` that it is a hint about, or a nested tensor
                with a mask.
        """
        if is_causal and attn_mask is None:
            raise ConfigError("is_causal=True is a hint about attn_mask, which is None: pass the causal mask too")
        if isinstance(query, Tensor) and query.is_nested:
            if attn_mask is not None or key_padding_mask is not None:
                raise ConfigError("a nested tensor has no padding to mask: attn_mask and key_padding_mask must be None")
            samples = zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
            return torch.nested.as_nested_tensor([self.forward(*each, need_weights=False)[0] for each in samples]), None
        q = _split_heads(self.q_proj(query), self.num_heads, self.batch_first)
        k = _split_heads(self.k_proj(key), self.num_heads, self.batch_first)
        v = _split_heads(self.v_proj(value), self.num_heads, self.batch_first)
        bias = None
        if attn_mask is not None:
            bias = _attention_bias(attn_mask, q, self.mask_heads, self.total_heads)
        if key_padding_mask is not None:
            padding = _padding_bias(key_padding_mask, q)
            bias = padding if bias is None else bias + padding
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            context = F.scaled_dot_product_attention(q, k, v, bias, dropout)
            return self.out_proj(_merge_heads(context, query, self.batch_first)), None
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = F.dropout(F.softmax(scores if bias is None else scores + bias, dim=-1), dropout)
        output = self.out_proj(_merge_heads(weights @ v, query, self.batch_first))
        return output, _reported(weights, query, average_attn_weights)

    def extra_repr(self) -> str:
        """Say what the children do not show."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, batch_first={self.batch_first}"


def part_of(parameter: Tensor, dimension: int, kept: Tensor) -> nn.Parameter:
    """Return a parameter that has some entries of another along a dimension, those of its gradient included."""
    kept = kept.to(parameter.device)
    part = nn.Parameter(parameter.detach().index_select(dimension, kept), parameter.requires_grad)
    if parameter.grad is not None:
        part.grad = parameter.grad.index_select(dimension, kept)
    return part


def _thirds(packed: Tensor) -> list[nn.Parameter]:
    """Return the parts of a packed parameter that belong to queries, keys and values."""
    return [part_of(packed, 0, rows) for rows in torch.arange(len(packed)).chunk(3)]


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    with torch.device("meta"):  # fresh weights would draw from the global generator, for nothing
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear


@torch.fx.wrap
def _split_heads(projected: Tensor, heads: int, batch_first: bool) -> Tensor:
    """(N, L, heads * d), (L, N, heads * d) or (L, heads * d) to (N, heads, L, d)."""
    if projected.dim() == 2:
        projected = projected.unsqueeze(0)
    elif not batch_first:
        projected = projected.transpose(0, 1)
    return torch.unflatten(projected, -1, (heads, -1)).transpose(1, 2)


@torch.fx.wrap
def _merge_heads(context: Tensor, query: Tensor, batch_first: bool) -> Tensor:
    """(N, heads, L, d) back to the layout of the query."""
    merged = context.transpose(1, 2).flatten(2)
    if query.dim() == 2:
        return merged.squeeze(0)
    return merged if batch_first else merged.transpose(0, 1)


@torch.fx.wrap
def _attention_bias(mask: Tensor, q: Tensor, heads: Tensor, total: int) -> Tensor:
    """(L, S) or (N * total, L, S) to something that is added to scores (N, heads, L, S)."""
    bias = _additive(mask, q)
    return bias if bias.dim() == 2 else torch.unflatten(bias, 0, (-1, total))[:, heads]


@torch.fx.wrap
def _padding_bias(mask: Tensor, q: Tensor) -> Tensor:
    """(N, S) or (S,) to something that is added to scores (N, heads, L, S)."""
    return _additive(mask, q).reshape(-1, 1, 1, mask.shape[-1])


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)


@torch.fx.wrap
def _reported(weights: Tensor, query: Tensor, average: bool) -> Tensor:
    if average:
        weights = weights.mean(dim=1)
    return weights.squeeze(0) if query.dim() == 2 else weights


class CompactWindowAttention(nn.Module):
    """torchvision's `ShiftedWindowAttention` (V2 too) with any number of heads; parameters have the same names.

    Attributes:
        num_heads: Heads left.
        head_dim: Channels of a head.
        logit_scale: Per-head temperature of cosine attention (V2), None for scaled dot products (V1).
    """

    relative_position_index: Tensor

    def __init__(self, attention: Any) -> None:
        """Take over the parts of a torchvision layer, all heads of it.

        Args:
            attention: A `ShiftedWindowAttention` or `ShiftedWindowAttentionV2`; its parts become parts of this one.
        """
        super().__init__()
        self.window_size, self.shift_size = list(attention.window_size), list(attention.shift_size)
        self.attention_dropout, self.dropout = attention.attention_dropout, attention.dropout
        self.num_heads = int(attention.num_heads)
        self.head_dim = attention.proj.in_features // self.num_heads
        self.qkv: nn.Linear = attention.qkv
        self.proj: nn.Linear = attention.proj
        self.register_buffer("relative_position_index", attention.relative_position_index)
        self.logit_scale: nn.Parameter | None = getattr(attention, "logit_scale", None)
        if self.logit_scale is None:
            self.relative_position_bias_table: nn.Parameter = attention.relative_position_bias_table
        else:
            self.cpb_mlp: nn.Sequential = attention.cpb_mlp
            self.register_buffer("relative_coords_table", attention.relative_coords_table)
        self.train(attention.training)

    def relative_bias(self) -> Tensor:
        """Return what is added to the scores for the distance of two pixels, shape (1, heads, pixels, pixels)."""
        pixels = self.window_size[0] * self.window_size[1]
        if self.logit_scale is None:
            table = self.relative_position_bias_table
        else:
            table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        bias = table[self.relative_position_index].view(1, pixels, pixels, -1).permute(0, 3, 1, 2)
        return bias if self.logit_scale is None else 16 * bias.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows.

        Args:
            x: Shape (batch, height, width, channels); so is the output.
        """
        windows = _to_windows(x, self.window_size, self.shift_size)
        q, k, v = _split_packed(F.linear(windows, self.qkv.weight, self._used_bias()), self.head_dim)
        scale = None
        if self.logit_scale is not None:
            q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=_LARGEST_LOGIT_SCALE).exp()
            k, scale = F.normalize(k, dim=-1), 1.0
        bias = _window_bias(self.relative_bias(), x, self.window_size, self.shift_size)
        dropout = self.attention_dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
        output = self.proj(context.transpose(1, 2).flatten(2))
        output = F.dropout(output, self.dropout, self.training)
        return _from_windows(output, x, self.window_size, self.shift_size)

    def _used_bias(self) -> Tensor | None:
        """Return the bias of queries, keys and values; V2 has one for the keys and never uses it."""
        if self.logit_scale is None or self.qkv.bias is None:
            return self.qkv.bias
        q, k, v = self.qkv.bias.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])

    def extra_repr(self) -> str:
        """Say what the children do not show."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"window_size={self.window_size}, shift_size={self.shift_size}"
        )


COMPACT: dict[str, Callable[[Any], nn.Module]] = {
    kind.__name__: kind for kind in (CompactMultiheadAttention, CompactWindowAttention)
}
"""What takes an attention layer's place, by its name in files; each is made of the layer."""


def _geometry(x: Tensor, window: list[int], shift: list[int]) -> tuple[list[int], list[int]]:
    """Return height and width padded to whole windows, and the shift: none where one window covers everything."""
    padded = [math.ceil(size / step) * step for size, step in zip(x.shape[1:3], window, strict=True)]
    return padded, [0 if step >= size else by for step, size, by in zip(window, padded, shift, strict=True)]


@torch.fx.wrap
def _to_windows(x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """(batch, height, width, channels) to (batch * windows, pixels, channels)."""
    (height, width), (down, right) = _geometry(x, window, shift)
    x = F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    x = torch.roll(x, (-down, -right), dims=(1, 2))
    # (batch, rows, window height, columns, window width, channels)
    tiles = x.reshape(-1, height // window[0], window[0], width // window[1], window[1], x.shape[-1])
    return tiles.transpose(2, 3).flatten(3, 4).flatten(0, 2)


@torch.fx.wrap
def _from_windows(windows: Tensor, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """(batch * windows, pixels, channels) back to the layout of x."""
    (height, width), (down, right) = _geometry(x, window, shift)
    tiles = windows.reshape(-1, height // window[0], width // window[1], window[0], window[1], windows.shape[-1])
    whole = tiles.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])
    whole = torch.roll(whole, (down, right), dims=(1, 2))
    return whole[:, : x.shape[1], : x.shape[2]].contiguous()


@torch.fx.wrap
def _split_packed(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(windows, pixels, 3 * heads * d) to three of (windows, heads, pixels, d)."""
    q, k, v = torch.unflatten(qkv, -1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
    return q, k, v


@torch.fx.wrap
def _window_bias(relative: Tensor, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """Add what keeps pixels apart that the shift made neighbors; (1 or batch * windows, heads, pixels, pixels)."""
    padded, shift = _geometry(x, window, shift)
    if not any(shift):
        return relative
    # Along each side: 0 away from the edge, 1 in the last window, 2 in the part of it that came from the other edge.
    sides = [torch.arange(size, device=x.device) for size in padded]
    rows, columns = (
        (place >= size - step).long() + (place >= size - by).long() if by else torch.zeros_like(place)
        for place, size, step, by in zip(sides, padded, window, shift, strict=True)
    )
    region = (3 * rows.unsqueeze(1) + columns).view(1, *padded, 1)
    region = _to_windows(region, window, [0, 0]).squeeze(-1)  # (windows, pixels)
    apart = (region.unsqueeze(1) != region.unsqueeze(2)).to(relative.dtype) * _OTHER_REGION
    return (relative + apart.unsqueeze(1)).repeat(x.shape[0], 1, 1, 1)
