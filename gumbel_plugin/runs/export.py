"""`gumbel-prune export`: a run's small network in a format that other tools read, compared before it counts."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, DataError, EquivalenceError, MissingExtraError, nearest
from gumbel_plugin.runs.folder import CONFIG, SMALL, RunFolder
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.shrinking.inputs import observing
from gumbel_plugin.shrinking.pruned_file import load_pruned, save_pruned

_BATCHES = (1, 2, 5)
TOLERANCE = 1e-5
"""Largest accepted difference to the small network, relative to the output's scale, in float32."""

Runner = Callable[[Tensor], Tensor]


def export_run(path: Path, kind: str, output: Path | None = None) -> tuple[Path, float]:
    """Export the small network of a finished run.

    The file is written under a temporary name, loaded again by what will read it, and compared with the small network
    on random inputs of several batch sizes; only then it gets its name.

    Args:
        path: The run's folder.
        kind: One of `FORMATS`.
        output: The file; by default ``small.<kind>`` in the run's folder.

    Returns:
        The file, and the largest difference relative to the output's scale.

    Raises:
        ConfigError: If the format is unknown or the file cannot be written.
        DataError: If the run is not finished, or a file of it is damaged.
        EquivalenceError: If what was exported does not compute the same.
        MissingExtraError: If the format needs packages that are not installed.
    """
    if kind not in FORMATS:
        raise ConfigError(f"format {kind!r} is unknown{nearest(kind, FORMATS)}")
    model, shape = read_small(path)
    target = path / f"small.{kind}" if output is None else output
    if target.is_dir() or not target.parent.is_dir():
        problem = "it is a folder" if target.is_dir() else "its folder does not exist"
        raise ConfigError(f"{str(target)!r} cannot be written: {problem}")
    temporary = target.with_name(f"{target.stem}.partial.{kind}")
    try:
        run = FORMATS[kind](model, torch.randn(2, *shape), temporary)
        error = _compare(model, run, shape)
        if not error <= TOLERANCE:
            raise EquivalenceError(f"{target} was not written: it would differ from the small network by {error:.1e}")
        os.replace(temporary, target)
    except OSError as problem:
        raise ConfigError(f"{str(target)!r} cannot be written: {problem}") from problem
    finally:
        temporary.unlink(missing_ok=True)
    return target, error


def read_small(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the small network of a finished run, in eval mode, and the shape of one input.

    Raises:
        DataError: If the run is not finished, or a file of it is damaged.
    """
    folder = RunFolder.read(path)
    folder.require(SMALL, CONFIG)
    config, header = folder.contents[CONFIG].model, folder.contents[SMALL]
    if config is None or "input_shape" not in header:
        raise DataError(f"{path / SMALL} does not say what inputs its network reads; was it written by a run?")
    model = load_pruned(
        path / SMALL, lambda: build_model(config.name, config.num_classes, config.in_channels, **config.options)
    )
    return model.eval(), tuple(header["input_shape"])


def _to_onnx(model: nn.Module, example: Tensor, file: Path) -> Runner:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (the exporter needs it, and says so in a longer way)
    except ImportError as error:
        raise MissingExtraError("onnxruntime or onnxscript", "export") from error
    with _quietly():
        program: Any = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        program.save(str(file))
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


def _to_pt2(model: nn.Module, example: Tensor, file: Path) -> Runner:
    with _quietly():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, file)
        loaded: Runner = torch.export.load(file).module()
    return loaded


def _to_safetensors(model: nn.Module, example: Tensor, file: Path) -> Runner:
    save_pruned(file, model, input_shape=list(example.shape[1:]))
    return load_pruned(file, lambda: copy.deepcopy(model)).eval()  # whose shapes fit already; read_small proved more


FORMATS: dict[str, Callable[[nn.Module, Tensor, Path], Runner]] = {
    "onnx": _to_onnx,
    "pt2": _to_pt2,
    "safetensors": _to_safetensors,
}
"""What writes a model to a file and returns what runs the file, by format."""


def _compare(model: nn.Module, run: Runner, shape: tuple[int, ...]) -> float:
    """Return the largest difference, relative to the output's scale; NaN if there is one."""
    generator = torch.Generator().manual_seed(0)
    worst = torch.zeros(())
    with observing(model):
        for batch in _BATCHES:
            inputs = torch.randn(batch, *shape, generator=generator)
            expected, found = model(inputs), run(inputs)
            if expected.shape != found.shape:
                raise EquivalenceError(
                    f"the exported network returns {tuple(found.shape)} for a batch of {batch}, the small one "
                    f"{tuple(expected.shape)}"
                )
            worst = torch.maximum(worst, (expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))
    return float(worst)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporters' progress and deprecations out of the output."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
