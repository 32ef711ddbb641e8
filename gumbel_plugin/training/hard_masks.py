"""Masks in NNI's format: written from a plan's gates, and read back into decisions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import TargetError, nearest, shown
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.layers.geometry import output_dimension, rows_view
from gumbel_plugin.layers.weights import read_weight
from gumbel_plugin.storage.mask_format import Masks, check_format
from gumbel_plugin.training.plan import Plan


def masks_of(plan: Plan, modules: Mapping[str, nn.Module], hard: Mapping[str, Tensor]) -> Masks:
    """Return hard gates as NNI reports masks: element masks on weights, a channel group's on its producers' rows.

    Args:
        plan: What is gated.
        modules: The model's modules by name.
        hard: Hard gates by mask name, bool.
    """
    names = {id(mask): name for name, mask in plan.masks.items()}
    masks: Masks = {}
    for name, gated in plan.gated_layers.items():
        if gated.mask is not None:
            own = gated.mask.spread(hard[names[id(gated.mask)]].float(), gated.weight)
            masks[name] = {"weight": own.expand_as(gated.weight).clone()}
            if gated.block is not None and gated.bias is not None:
                masks[name]["bias"] = own.flatten()[:1].expand_as(gated.bias).clone()
    for name, group in plan.groups.items():
        for part in group.producers:
            rows = _rows(modules[part.module], part.positions, hard[name][part.units])
            for target, mask in rows.items():
                known = masks.setdefault(part.module, {})
                known[target] = known[target] * mask if target in known else mask
    return masks


def decisions_of(plan: Plan, modules: Mapping[str, nn.Module], masks: Masks) -> dict[int, Tensor]:
    """Return what masks in NNI's format say of a plan's gates: hard gates by the mask's id.

    Raises:
        TargetError: If a mask's module or tensor does not exist, its shape is wrong, it holds anything but 0 and 1, or
            producers of one group disagree.
    """
    check_format(masks)
    _check_names(modules, masks)
    decided: dict[int, Tensor] = {}
    for name, gated in plan.gated_layers.items():
        given = masks.get(name, {}).get("weight")
        if gated.mask is not None and given is not None:
            _check_shape(name, given, gated.weight)
            decided[id(gated.mask)] = gated.mask.sparsity_type.reduce(given.float())
    for name, group in plan.groups.items():
        rows = {
            part.module: _open_rows(part.module, modules[part.module], masks[part.module]["weight"])
            for part in group.producers
            if "weight" in masks.get(part.module, {})
        }
        if rows:
            decided[id(plan.masks[name])] = _open_units(name, group, rows)
    return decided


def _rows(module: nn.Module, positions: Tensor, hard: Tensor) -> dict[str, Tensor]:
    """Return row masks of a producer's weight and bias for the channels at these positions."""
    weight, dim = read_weight(module), output_dimension(module)
    assert dim is not None
    channels = torch.ones(weight.shape[dim], device=weight.device)
    channels[positions] = hard.to(channels)
    masks = {"weight": rows_view(module, channels).expand_as(weight).clone()}
    if isinstance(getattr(module, "bias", None), Tensor):
        masks["bias"] = channels.clone()
    return masks


def _check_names(modules: Mapping[str, nn.Module], masks: Masks) -> None:
    for name, targets in masks.items():
        if name not in modules:
            raise TargetError(f"mask for module {shown(name)}, which the model does not have{nearest(name, modules)}")
        for target in targets:
            if target != "bias" and not isinstance(getattr(modules[name], target, None), Tensor):
                raise TargetError(f"mask for {name}.{target}, which is no tensor of that module")


def _check_shape(name: str, mask: Tensor, weight: Tensor) -> None:
    if mask.shape != weight.shape:
        raise TargetError(f"{name}.weight: mask {tuple(mask.shape)}, weight {tuple(weight.shape)}")


def _open_rows(name: str, module: nn.Module, mask: Tensor) -> Tensor:
    """Return which output channels of a producer its weight's mask keeps anything of, bool."""
    _check_shape(name, mask, read_weight(module))
    dimension = output_dimension(module)
    assert dimension is not None
    return (mask != 0).cpu().transpose(0, dimension).flatten(1).any(1) if mask.dim() > 1 else (mask != 0).cpu()


def _open_units(name: str, group: ChannelGroup, rows: dict[str, Tensor]) -> Tensor:
    """Return which units of a group its producers' rows keep, bool; a producer may compute only some of the units."""
    is_open = torch.ones(group.size, dtype=torch.bool)
    known = torch.zeros(group.size, dtype=torch.bool)
    for part in group.producers:
        if part.module not in rows:
            continue
        own = torch.zeros(group.size, dtype=torch.bool)
        own[part.units[rows[part.module][part.positions]]] = True
        here = torch.zeros(group.size, dtype=torch.bool).index_fill(0, part.units, True)
        if bool((known & here & (own != is_open)).any()):
            raise TargetError(f"group {name}: its producers' masks close different units")
        is_open[here] = own[here]
        known |= here
    return is_open
