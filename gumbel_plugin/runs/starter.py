"""`gumbel-prune init` and `schema`: a commented configuration to start from, and what editors check it against."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python
from torch import nn

from gumbel_plugin.config_list import LayerRule
from gumbel_plugin.errors import ConfigError, DataError, nearest
from gumbel_plugin.masks import method_named
from gumbel_plugin.masks.weight_dependent import WeightDependent
from gumbel_plugin.runs.data import data_names, load_data
from gumbel_plugin.runs.models import build_model, model_options
from gumbel_plugin.runs.run_config import ModelConfig, RunConfig
from gumbel_plugin.storage.files import write_bytes

SCHEMA_FILE = "gumbel-prune.schema.json"
_WIDTH = 100


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a run's configuration, with the descriptions of its keys."""
    schema = RunConfig.model_json_schema()
    sections: dict[str, type[BaseModel]] = {"RunConfig": RunConfig, **_sections(RunConfig)}
    for name, definition in [("RunConfig", schema), *schema.get("$defs", {}).items()]:
        documented = _documented(sections[name]) if name in sections else {}
        for key, text in documented.items():
            if key in definition.get("properties", {}):
                definition["properties"][key]["description"] = text
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "gumbel-prune run"}


def schema_text() -> str:
    """Return `json_schema` as text."""
    return json.dumps(json_schema(), indent=2) + "\n"


def write_starter(file: Path, method: str, model: str, data: str, *, force: bool = False) -> None:
    """Write a commented configuration to start from, and the schema beside it.

    Args:
        file: The YAML file.
        method: A mask method.
        model: A network, as `build_model` knows it.
        data: A data set, as `load_data` knows it.
        force: Whether to replace an existing file.

    Raises:
        ConfigError: If a name is unknown, or the file exists or cannot be written.
    """
    if file.exists() and not force:
        raise ConfigError(f"{str(file)!r} exists; pass --force to replace it")
    text = starter_text(method, model, data)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file.parent / SCHEMA_FILE, schema_text().encode())
        write_bytes(file, text.encode())
    except OSError as error:
        raise ConfigError(f"{str(file)!r} cannot be written: {error}") from error


def starter_text(method: str, model: str, data: str) -> str:
    """Return a commented configuration: what was chosen stands there, every other key as a comment with its default.

    Raises:
        ConfigError: If a name is unknown.
    """
    if data not in data_names():
        raise ConfigError(f"unknown data set {data!r}{nearest(data, data_names())}")
    network: dict[str, Any] = {"name": model, **_fitting_sizes(model, data)}
    rule: dict[str, Any] = {"op_types": _layers_of(network), "sparse_ratio": 0.5}
    if issubclass(method_named(method), WeightDependent):
        rule["granularity"] = "element"
    chosen = {
        "pruning": {"method": method, "config_list": [rule], "phases": {"dense": 0.1, "fixed": 0.3}},
        "model": network,
        "data": {"name": data},
        "training": {"max_epochs": 20, **_fitting_loss(data), "dense_baseline": True},
        "seed": 0,
    }
    RunConfig.load(chosen)  # what is written is valid
    lines = [
        f"# yaml-language-server: $schema=./{SCHEMA_FILE}",
        f"# Masks by {method} on {model} with {data}: gumbel-prune check tries this file, gumbel-prune run runs it.",
        "# What is commented out shows the default.",
        *_lines(RunConfig, chosen),
    ]
    return "\n".join(lines) + "\n"


def _fitting_loss(data: str) -> dict[str, Any]:
    """Return the loss that fits a data set's targets, as far as the data is there and the default does not fit."""
    try:
        bundle = load_data(data)
    except DataError:
        return {}
    return {"loss": "mse"} if bundle.is_regression else {}


def _fitting_sizes(model: str, data: str) -> dict[str, Any]:
    """Return the sizes that fit a network to a data set, as far as the data is there and the network takes them."""
    options = model_options(model)
    try:
        bundle = load_data(data)
    except DataError:
        return {}
    shape = bundle.input_shape
    sizes: dict[str, Any] = {"num_classes": bundle.num_classes} if "num_classes" in options else {}
    if "in_channels" in options and len(shape) == 3:
        sizes["in_channels"] = shape[0]
    more = {"in_features": prod(shape), "image_size": shape[-1]}
    fitting = {key: size for key, size in more.items() if key in options}
    return {**sizes, "options": fitting} if fitting else sizes


def _layers_of(network: Mapping[str, Any]) -> list[str]:
    config = ModelConfig.model_validate(network)
    model = build_model(config.name, config.num_classes, config.in_channels, **config.options)
    types = {type(layer).__name__ for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    found: list[str] = [name for name in ("Conv2d", "Linear") if name in types]
    if not found:
        raise ConfigError(f"model {config.name!r} has no convolution and no linear layer to prune")
    return found


def _lines(
    section: type[BaseModel], chosen: Mapping[str, Any], options: type[BaseModel] | None = None
) -> Iterator[str]:
    """Yield the lines of a section: what was chosen first, the rest as comments.

    Args:
        section: The section.
        chosen: The values that were chosen.
        options: The section of the method's own options, which stand in a plain mapping.
    """
    documented = _documented(section)
    for key in sorted(section.model_fields, key=lambda key: key not in chosen):
        yield from _comment(documented.get(key, ""))
        field = section.model_fields[key]
        inner = options if key == "options" and options else _section_of(field.annotation)
        if key == "config_list":
            yield from _rule_lines(chosen[key][0])
        elif key not in chosen:
            yield from (f"# {line}" for line in _default_lines(key, inner, _default(field)))
        elif inner is None or not isinstance(chosen[key], dict):
            yield f"{key}: {_value(chosen[key])}"
        else:
            yield f"{key}:"
            yield from (f"  {line}" for line in _lines(inner, chosen[key], _options_below(key, chosen[key])))


def _default_lines(key: str, section: type[BaseModel] | None, default: Any) -> Iterator[str]:
    """Yield the lines of a key with its default, those of a section one by one."""
    if section is None or default is None:
        yield f"{key}: {_value(default)}"
        return
    yield f"{key}:"
    documented = _documented(section)
    for name, field in section.model_fields.items():
        yield from (f"  {line}" for line in _comment(documented.get(name, "")))
        yield f"  {name}: {_value(getattr(default, name, _default(field)))}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text.replace("`", ""), _WIDTH)]


def _options_below(key: str, values: Mapping[str, Any]) -> type[BaseModel] | None:
    return method_named(values["method"]).Options if key == "pruning" else None


def _rule_lines(rule: Mapping[str, Any]) -> Iterator[str]:
    yield "config_list:"
    yield f"  - {_value(rule)}"
    others = [name for name in LayerRule.model_fields if name not in rule and "target" not in name]
    yield from (f"  # {line}" for line in textwrap.wrap("it may also have: " + ", ".join(others), _WIDTH))


def _documented(section: type[BaseModel]) -> dict[str, str]:
    """Return what the docstring of a section has on its keys."""
    text = inspect.getdoc(section) or ""
    _, _, attributes = text.partition("Attributes:\n")
    found: dict[str, str] = {}
    key = ""
    for line in attributes.split("\n"):
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            key, found[start[1]] = start[1], start[2]
        elif key and line.startswith("     "):
            found[key] += " " + line.strip()
    return found


def _sections(section: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found: dict[str, type[BaseModel]] = {}
    for field in section.model_fields.values():
        for candidate in (field.annotation, *get_args(field.annotation)):
            if inspect.isclass(candidate) and issubclass(candidate, BaseModel):
                found |= {candidate.__name__: candidate, **_sections(candidate)}
    return found


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if inspect.isclass(candidate) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _default(field: Any) -> Any:
    value = field.get_default(call_default_factory=True)
    return None if value is PydanticUndefined else value


def _value(value: Any) -> str:
    plain = to_jsonable_python(value)
    return yaml.safe_dump(plain, default_flow_style=True, width=1000, sort_keys=False).removesuffix("\n...\n").strip()
