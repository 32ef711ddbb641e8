"""`gumbel-prune export`: a run's small network in a format that other tools read, compared before it counts."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import (
    ConfigError,
    DataError,
    EquivalenceError,
    GraphError,
    MissingExtraError,
    nearest,
    shorten,
    shown,
)
from gumbel_plugin.layers.example_inputs import observing
from gumbel_plugin.runs.folder import CONFIG, SMALL, RunFolder, check_output
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.shrinking.pruned_file import load_pruned, save_pruned
from gumbel_plugin.storage.files import write_bytes

_BATCHES = (1, 2, 5)
_MOST_NUMBERS = 2**28
"""No single input is larger; a header with a larger one is damaged."""
TOLERANCE = 1e-5
"""Largest accepted difference to the small network, relative to the output's scale, in float32."""

Runner = Callable[[Tensor], Tensor]


def export_run(path: Path, kind: str, output: Path | None = None) -> tuple[Path, float]:
    """Export the small network of a finished run.

    What will be written is loaded by what will read it, and compared with the small network on random inputs of several
    batch sizes; only then the file appears. No file of the run itself is replaced: in the format ``safetensors`` the
    run's own ``small.safetensors`` is the export, unless another file is named.

    Args:
        path: The run's folder.
        kind: One of `FORMATS`.
        output: The file; by default ``small.<kind>`` in the run's folder.

    Returns:
        The file, and the largest difference relative to the output's scale.

    Raises:
        ConfigError: If the format is unknown, the file cannot be written, or it is a file of the run itself.
        DataError: If the run is not finished, or a file of it is damaged.
        EquivalenceError: If what was exported does not compute the same.
        MissingExtraError: If the format needs packages that are not installed.
    """
    if kind not in FORMATS:
        raise ConfigError(f"format {kind!r} is unknown{nearest(kind, FORMATS)}")
    own = path / SMALL  # which is what the format safetensors would write
    target = output or (own if kind == "safetensors" else path / f"small.{kind}")
    if output is not None:
        check_output(output)
    model, shape = read_small(path)
    content, run = FORMATS[kind](model, torch.randn(2, *shape))
    error = _compare(model, run, shape)
    if not error <= TOLERANCE:
        raise EquivalenceError(f"{target} was not written: it would differ from the small network by {error:.1e}")
    if target != own:
        write_bytes(target, content)
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
        raise DataError(f"{path / SMALL} does not record what inputs its network reads; was it written by a run?")
    model = load_pruned(
        path / SMALL, lambda: build_model(config.name, config.num_classes, config.in_channels, **config.options)
    ).eval()
    shape = tuple(header["input_shape"])
    try:
        if prod(shape) > _MOST_NUMBERS:
            raise ValueError(f"it has more than {_MOST_NUMBERS:,} numbers")
        with observing(model):
            model(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path / SMALL} cannot read inputs of the shape {shown(shape)} it names: {reason}") from error
    return model, shape


def _to_onnx(model: nn.Module, example: Tensor) -> tuple[bytes, Runner]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (the exporter needs it, and its own message is longer)
    except ImportError as error:
        raise MissingExtraError("onnxruntime or onnxscript", "export") from error
    with _quietly():
        try:
            program: Any = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise GraphError(
                f"torch's ONNX exporter cannot export the network: {shorten(str(error), 400)}; torch 2.6 fails on "
                f"batch norms beside today's onnxscript (here: torch {torch.__version__}). --format pt2 needs neither"
            ) from error
        content: bytes = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda inputs: torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


def _to_pt2(model: nn.Module, example: Tensor) -> tuple[bytes, Runner]:
    buffer = io.BytesIO()  # torch's own writer of files ends the process where a disk is full
    with _quietly():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, buffer)
        loaded: Runner = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), loaded


def _to_safetensors(model: nn.Module, example: Tensor) -> tuple[bytes, Runner]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / SMALL
        save_pruned(file, model, input_shape=list(example.shape[1:]))
        loaded = load_pruned(file, lambda: copy.deepcopy(model))  # whose shapes fit already; read_small proved more
        return file.read_bytes(), loaded.eval()


FORMATS: dict[str, Callable[[nn.Module, Tensor], tuple[bytes, Runner]]] = {
    "onnx": _to_onnx,
    "pt2": _to_pt2,
    "safetensors": _to_safetensors,
}
"""What returns a model as a file's content, and what runs that content, by format."""


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
