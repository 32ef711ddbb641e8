"""Entries of an NNI config list: which layers, and how much of them is pruned, in nested and older forms too."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gumbel_plugin.config_values import Section
from gumbel_plugin.errors import nearest, shown
from gumbel_plugin.sparsity.types import granularity_of

_DEFAULTS_OF_A_BIAS = {
    "apply_method": "mul",
    "align": {"module_name": None, "target_name": "weight", "dims": [0]},
}
# A granularity with its padding, as NNI spells it out; the words are ours.
_SPELLED_OUT = {
    ((1,), "back", -1): "out_channel",
    ((-1, 1), "back", -1): "in_channel",
    ((1, 1), "back", -1): "kernel",
}
_RATIOS_OF_NNI_2 = ("sparsity", "sparsity_per_layer", "total_sparsity")
_KEYS_OF_NNI_2 = (*_RATIOS_OF_NNI_2, "max_sparsity_per_layer", "op_partial_names", "exclude")
_KEYS_OF_QUANTIZERS = ("quant_types", "quant_bits", "quant_dtype", "quant_scheme")


def checked_patterns(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Return patterns as they are.

    Raises:
        ValueError: If one is no regular expression.
    """
    for pattern in patterns:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # "[[a]" will mean something else one day
                re.compile(pattern)
        except (re.error, OverflowError, RecursionError, Warning) as error:
            raise ValueError(f"{shown(pattern)} is no regular expression: {error}") from error
    return patterns


class LayerRule(Section):
    """One entry of an NNI config list: which layers, and how much of them may go.

    Attributes:
        sparse_ratio: The fraction to remove; None leaves it to the gates themselves.
        sparse_threshold: Without a ratio: keep a unit while P(keep) is at least this (default ½).
        granularity: NNI's words, and ``element``, ``kernel`` and ``n:m``, as in ``"2:4"``: n of every m consecutive
            weights along the input dimension stay. ``default`` is out_channel, as in NNI.
        global_group_id: Rules with the same id share one budget.
        dependency_group_id: Layers with the same id share their gates, beyond what the graph ties anyway.
        max_sparse_ratio: No layer loses more than this fraction.
        min_sparse_ratio: No layer loses less than this fraction.
        internal_metric_block: NNI's number of blocks that lose equally many channels. Where whole channels go, the
            traced network decides which are removed together; else it has no meaning here (`without_effect`).
        apply_method: NNI's; learned gates multiply the weight in any case (`without_effect`).
    """

    op_types: tuple[str, ...] | None = None
    op_names: tuple[str, ...] | None = None
    op_names_re: tuple[str, ...] | None = None
    exclude_op_types: tuple[str, ...] = ()
    exclude_op_names: tuple[str, ...] = ()
    exclude_op_names_re: tuple[str, ...] = ()
    target_names: tuple[str, ...] | None = None
    target_settings: dict[str, dict[str, Any]] | None = None
    sparse_ratio: float | None = Field(default=None, ge=0, lt=1)
    sparse_threshold: float | None = Field(default=None, gt=0, lt=1)
    max_sparse_ratio: float | None = Field(default=None, gt=0, le=1)
    min_sparse_ratio: float | None = Field(default=None, ge=0, lt=1)
    granularity: str | tuple[int, ...] = "default"
    global_group_id: int | str | None = None
    dependency_group_id: int | str | None = None
    internal_metric_block: int | None = Field(default=None, ge=1)
    apply_method: Literal["bypass", "mul", "add"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _merge_weight_settings(cls, values: Any) -> Any:
        """Read NNI's nested settings (ours has one maskable target, the weight), and the ratio that n:m implies."""
        if not isinstance(values, Mapping):
            return values
        entry = _flattened(values)
        word = entry.get("granularity")
        density = granularity_of(word).density if isinstance(word, str) and ":" in word else None
        if density is not None and (entry.get("sparse_ratio"), entry.get("sparse_threshold")) == (None, None):
            entry["sparse_ratio"] = 1 - density
        return entry

    @field_validator("target_names")
    @classmethod
    def _only_weights(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and not (set(names) <= {"weight", "bias"} and "weight" in names):
            raise ValueError(f"target_names {shown(list(names))}: learned masks cover 'weight' and follow on 'bias'")
        return names

    @field_validator("op_names_re", "exclude_op_names_re")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return patterns if patterns is None else checked_patterns(patterns)

    @field_validator("granularity")
    @classmethod
    def _known(cls, word: str | tuple[int, ...]) -> str | tuple[int, ...]:
        granularity_of(word)
        return word

    @model_validator(mode="after")
    def _keys_fit_together(self) -> LayerRule:
        if not (self.op_types or self.op_names or self.op_names_re):
            raise ValueError("an entry names its layers by op_types, op_names or op_names_re; it has none of them")
        if self.sparse_ratio is not None and self.sparse_threshold is not None:
            raise ValueError("sparse_ratio and sparse_threshold exclude each other")
        low, high = self.min_sparse_ratio, self.max_sparse_ratio
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_sparse_ratio {low} is above max_sparse_ratio {high}")
        return self

    @model_validator(mode="after")
    def _leave_n_of_m(self) -> LayerRule:
        density = granularity_of(self.granularity).density
        if density is None:
            return self
        given = [key for key in ("sparse_threshold", "min_sparse_ratio", "max_sparse_ratio") if getattr(self, key)]
        if self.sparse_ratio is None or abs(self.sparse_ratio - (1 - density)) > 1e-6:
            given.append(f"sparse_ratio {self.sparse_ratio}")
        if given:
            raise ValueError(
                f"{given[0]}: granularity {self.granularity!r} removes {1 - density:.6g} of every layer; leave it out"
            )
        return self

    @property
    def structured(self) -> bool:
        """Whether whole output channels go, so that the dependency graph decides what goes with them."""
        return self.granularity in ("default", "out_channel")

    def without_effect(self) -> list[str]:
        """Return why settings of this entry that NNI's pruners take mean nothing here, one sentence each."""
        found = []
        if (self.internal_metric_block or 1) > 1 and not self.structured:
            found.append("internal_metric_block has no meaning here: gates inside of a weight are ranked as one block")
        if (self.apply_method or "mul") != "mul":
            found.append(f"apply_method {self.apply_method!r} has no meaning here: gates multiply the weight ('mul')")
        for key, value in ((self.target_settings or {}).get("bias") or {}).items():
            if value is not None and value != _DEFAULTS_OF_A_BIAS.get(key):
                found.append(f"target_settings.bias.{key} has no meaning here: a bias follows its weight's mask")
        return found


def _flattened(entry: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return an entry with the settings of its weight, which NNI allows in ``target_settings``, at its top."""
    _refuse_other_formats(entry)
    settings = entry.get("target_settings")
    if isinstance(settings, Mapping):
        _check_targets(settings)
        entry = {**entry, **(settings.get("weight") or {})}
    if entry.get("align") is not None:
        raise ValueError(
            "align: this entry learns nothing, its mask follows another module's; such entries are for the list that "
            "GumbelPruner takes, not for a configuration"
        )
    return {key: _granularity(value) if key == "granularity" else value for key, value in entry.items()}


def _refuse_other_formats(entry: Mapping[Any, Any]) -> None:
    quantizers = [key for key in _KEYS_OF_QUANTIZERS if key in entry]
    if quantizers:
        raise ValueError(f"{quantizers[0]} is a quantizer's: give this entry to one of nni.compression.quantization")
    old = [key for key in _KEYS_OF_NNI_2 if key in entry]
    if not old:
        return
    if entry.get("exclude"):
        names = {f"exclude_{key}": value for key, value in _selection(entry).items()}
        raise ValueError(f"exclude is NNI 2's: leave this entry out, and add to every other one: {json.dumps(names)}")
    raise ValueError(f"{old[0]} is NNI 2's: write instead {json.dumps(_translated(entry))}")


def _translated(entry: Mapping[Any, Any]) -> dict[str, Any]:
    """Return an entry of NNI 2 in today's keys."""
    kept = {key: value for key, value in entry.items() if key not in _KEYS_OF_NNI_2 and not str(key).startswith("op_")}
    new: dict[str, Any] = {**_selection(entry), **kept}
    for key in _RATIOS_OF_NNI_2:
        if key in entry:
            new["sparse_ratio"] = entry[key]
    if "total_sparsity" in entry:
        new["global_group_id"] = 0
    if "max_sparsity_per_layer" in entry:
        new["max_sparse_ratio"] = entry["max_sparsity_per_layer"]
    return new


def _selection(entry: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the keys that select modules, parts of names as patterns."""
    found = {key: entry[key] for key in ("op_types", "op_names", "op_names_re") if entry.get(key)}
    parts = entry.get("op_partial_names")
    if isinstance(parts, Sequence) and not isinstance(parts, str):
        found["op_names_re"] = [*found.get("op_names_re", ()), *(f".*{re.escape(str(part))}" for part in parts)]
    return found


def _check_targets(settings: Mapping[Any, Any]) -> None:
    """Refuse settings of anything but a weight and its bias, and a bias's keys that NNI does not have either."""
    unknown = [target for target in settings if target not in ("weight", "bias")]
    if unknown:
        raise ValueError(f"target_settings {shown(unknown)} cannot be learned; masks cover 'weight' (and its bias)")
    for target, own in settings.items():
        if own is not None and not isinstance(own, Mapping):
            raise ValueError(f"target_settings.{target} = {shown(own)}: it must be a mapping of settings")
    valid = {key for key in LayerRule.model_fields if not key.startswith(("op_", "exclude_", "target_"))} | {"align"}
    for key in settings.get("bias") or ():
        if key not in valid:
            raise ValueError(f"target_settings.bias.{shown(key)}: unknown key{nearest(str(key), valid)}")


def _granularity(value: Any) -> Any:
    """Return a granularity as a word or as sizes where NNI's form nests it: ``[sizes, padding, fill]``."""
    if isinstance(value, int):
        raise ValueError(f'granularity {value} is a number, as YAML reads n:m without quotes; write it like "2:4"')
    if value == "per_channel":
        raise ValueError("granularity 'per_channel' is for inputs and outputs; for a weight write 'out_channel'")
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], list | tuple):
        return value
    sizes, padding, fill = (*value, *("front", 1)[len(value) - 1 :])[:3]
    if (padding, fill) == ("front", 1):
        return sizes
    word = _SPELLED_OUT.get((tuple(sizes), padding, fill)) if len(value) <= 3 else None
    if word is None:
        valid = ", ".join(f"{[list(steps), *rest]} ({word})" for (steps, *rest), word in _SPELLED_OUT.items())
        raise ValueError(f"granularity {shown(value)}: of the sizes that are padded, only {valid} can be learned")
    return word
