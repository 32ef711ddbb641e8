"""Attention layers as people write them, each in its smallest form: input and output have 12 channels, 6 heads of 4."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS, SIZE, WIDTH = 6, 4, 12


class Packed(nn.Module):
    """timm's: (three, heads, size), with fields for heads, size and both together."""

    parts = 3

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = HEADS, SIZE, HEADS * SIZE
        self.qkv, self.proj = nn.Linear(WIDTH, self.parts * HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.reshape(*packed.shape[:2], 3, self.num_heads, SIZE).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.split(self.qkv(x)))
        return self.proj(y.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))


class ByIndex(Packed):
    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        three = torch.stack(super().split(packed))
        return three[0], three[1], three[2]


class TensorSplit(Packed):
    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        parts = torch.tensor_split(packed, 3, dim=-1)
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)


class Interleaved(Packed):
    """GPT-NeoX's: (heads, three * size)."""

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.unflatten(-1, (-1, 3 * SIZE)).transpose(1, 2).chunk(3, dim=-1)


class BetweenHeads(Packed):
    """BLOOM's: (heads, three, size)."""

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.view(*packed.shape[:2], self.num_heads, 3, SIZE).permute(3, 0, 2, 1, 4).unbind(0)


class SizeFirst(Packed):
    """(size, three, heads): the channels of a head lie apart."""

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.view(*packed.shape[:2], SIZE, 3, self.num_heads).permute(3, 0, 4, 1, 2).unbind(0)


class MultiQuery(Packed):
    """Falcon's: keys and values are all heads' own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2) * SIZE)

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        heads = packed.view(*packed.shape[:2], self.num_heads + 2, SIZE).transpose(1, 2)
        return heads[:, :-2], heads[:, [-2]].expand_as(heads[:, :-2]), heads[:, [-1]].expand_as(heads[:, :-2])


class Grouped(nn.Module):
    """Two heads share keys and values; counts are fields."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.n_kv, self.inner_dim = HEADS, HEADS // 2, HEADS * SIZE
        self.wq, self.wo = nn.Linear(WIDTH, HEADS * SIZE, bias=False), nn.Linear(HEADS * SIZE, WIDTH)
        self.wkv = nn.Linear(WIDTH, HEADS * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q = self.wq(x).view(*x.shape[:2], self.n_heads, SIZE).transpose(1, 2)
        k, v = self.wkv(x).view(*x.shape[:2], 2, self.n_kv, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = (each.repeat_interleave(self.n_heads // self.n_kv, dim=1) for each in (k, v))
        y = (q @ k.mT * SIZE**-0.5).softmax(-1) @ v
        return self.wo(y.transpose(1, 2).reshape(*x.shape[:2], self.inner_dim))


class Einsum(nn.Module):
    """Separate projections, einsum, and a size that is computed from two fields."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.h = HEADS * SIZE, HEADS
        self.q_lin, self.k_lin, self.v_lin = (nn.Linear(WIDTH, self.dim) for _ in range(3))
        self.out_lin = nn.Linear(self.dim, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        size = self.dim // self.h
        q, k, v = (f(x).view(*x.shape[:2], self.h, size) for f in (self.q_lin, self.k_lin, self.v_lin))
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5, dim=-1)
        return self.out_lin(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class RelativeBias(Packed):
    """A table of position biases, a temperature per head, norms over each head; a tuple notes the table's form."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, HEADS))
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.q_norm, self.form = nn.LayerNorm(SIZE), (5, 5, HEADS)
        self.register_buffer("places", torch.arange(5)[:, None] - torch.arange(5) + 4, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        bias = self.table[self.places.flatten()].view(self.form).permute(2, 0, 1)
        weights = (self.q_norm(q) @ k.mT * self.temperature + bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class OwnBiases(Packed):
    """DeBERTa's: biases of queries and values are parameters of the layer; timm's BEiT uses the weight by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * SIZE, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(HEADS * SIZE)) for _ in range(2))
        self.register_buffer("k_bias", torch.zeros(HEADS * SIZE))

    def forward(self, x: Tensor) -> Tensor:
        packed = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        y = F.scaled_dot_product_attention(*self.split(packed))
        return self.proj(y.transpose(1, 2).flatten(2))


class Convolved(nn.Module):
    """1x1 convolutions on a map, a batch norm and a depthwise convolution over all heads' channels."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.num_heads = HEADS
        self.qkv, self.norm = nn.Conv1d(WIDTH, 3 * width, 1), nn.BatchNorm1d(3 * width)
        self.local, self.proj = nn.Conv1d(width, width, 3, padding=1, groups=width), nn.Conv1d(width, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.norm(self.qkv(x.mT))
        q, k, v = packed.view(len(x), 3, self.num_heads, SIZE, -1).unbind(1)
        y = v @ (q.mT @ k).softmax(-1).mT
        return self.proj(self.local(y.flatten(1, 2))).mT


class MixedHeads(Packed):
    """Talking heads: maps of attention are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        weights = self.mix((q @ k.mT).softmax(-1).movedim(1, -1)).movedim(-1, 1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class NormedTogether(Packed):
    """A norm over all heads before the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HEADS * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.split(self.qkv(x)))
        return self.proj(self.norm(y.transpose(1, 2).flatten(2)))


class FixedForm(Packed):
    """What the heads compute is given a size that is written into the code."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.split(self.qkv(x)))
        return self.proj(y.transpose(1, 2).reshape(*x.shape[:2], 24))


class Slopes(Packed):
    """Position biases by head come from outside (BLOOM)."""

    def forward(self, x: Tensor, slopes: Tensor | None = None) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        weights = (q @ k.mT if slopes is None else q @ k.mT + slopes).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class SharedBias(Packed):
    """T5's: the first layer computes position biases, all use them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, HEADS)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(self.qkv(x))
        if bias is None:
            bias = self.table(torch.arange(5)[:, None] - torch.arange(5) + 4).permute(2, 0, 1)[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).flatten(2)), bias


WORKING = [
    Packed, ByIndex, TensorSplit, Interleaved, BetweenHeads, SizeFirst, MultiQuery, Grouped, Einsum, RelativeBias,
    OwnBiases, Convolved,
]  # fmt: skip
REFUSED = {
    MixedHeads: "not work with fewer heads",
    NormedTogether: "normalized together",
    FixedForm: "not work with fewer",
}


class Transformer(nn.Module):
    """Two attention layers and MLPs, in a residual stream."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attentions = nn.ModuleList(kind() for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for place, mlp in enumerate(self.mlps):
            x = x + self.attend(place, self.norms[2 * place](x))
            x = x + mlp(self.norms[2 * place + 1](x))
        return self.head(x.mean(1))

    def attend(self, place: int, x: Tensor) -> Tensor:
        return self.attentions[place](x)


class WithSharedBias(Transformer):
    """Its second attention layer uses the biases of the first."""

    def __init__(self) -> None:
        super().__init__(SharedBias)

    def attend(self, place: int, x: Tensor) -> Tensor:
        y, bias = self.attentions[place](x, self.bias if place else None)
        self.bias = bias if place == 0 else None
        return y


class WithSlopes(Transformer):
    """Biases by head are computed beside the attention layers."""

    def __init__(self) -> None:
        super().__init__(Slopes)

    def attend(self, place: int, x: Tensor) -> Tensor:
        return self.attentions[place](x, torch.arange(float(HEADS)).view(-1, 1, 1) * torch.arange(5.0))
