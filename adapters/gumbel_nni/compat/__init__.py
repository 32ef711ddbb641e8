"""NNI 3.0 on today's torch, Python, Lightning and Transformers, repaired from outside.

NNI's last release dates from 2023; on torch 2.13 its QuickStart fails at ``ModelSpeedup`` (microsoft/nni#5768). Each
function below repairs one breakage. It looks for the breakage first, does nothing where there is none, may be called
again, and returns whether its repair is in force. Replaced functions carry NNI's own as ``__wrapped__``.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch

from gumbel_nni.compat import compressors, evaluator_repairs, messages, speedup, trace_repairs, transposed
from gumbel_plugin.errors import IncompatibleLibraryError, MissingExtraError
from gumbel_plugin.torchvision_import import make_torchvision_importable

_REPAIRS: tuple[Callable[[], bool], ...] = (
    trace_repairs.tensor_methods_in_tracer,
    trace_repairs.python_functions_in_tracer,
    trace_repairs.generic_classes_in_tracer,
    trace_repairs.type_in_tracer,
    trace_repairs.classes_after_tracing,
    trace_repairs.impure_with_two_arguments,
    trace_repairs.bytecode_caches_in_proxy,
    speedup.size_is_a_leaf,
    speedup.values_last_used_by_size,
    speedup.pytree_nodes_of_fx,
    speedup.masks_by_path,
    speedup.modes_and_statistics,
    compressors.two_pruners_on_one_layer,
    compressors.total_sparsity_of_old_lists,
    compressors.masks_of_unknown_modules,
    compressors.slim_factors_in_weights,
    compressors.biases_of_norms,
    transposed.channels_of_transposed_convolutions,
    compressors.norm_pruners_in_fusion,
    compressors.layers_survive_unwrapping,
    compressors.wrapped_layers_in_fused_kernels,
    compressors.length_of_a_fused_training,
    compressors.gradients_of_quantized_values,
    evaluator_repairs.settable_max_steps,
    evaluator_repairs.loss_with_item_count,
    evaluator_repairs.default_optimizer_of_trainer,
    evaluator_repairs.steps_after_backward,
    evaluator_repairs.steps_of_trainer,
    messages.config_errors_with_index,
    messages.untraced_optimizers,
    messages.optimizers_of_another_model,
    messages.layer_types_by_name,
)


def apply() -> tuple[str, ...]:
    """Make NNI work here; call it before NNI is imported, or at any time after. Idempotent.

    Returns:
        The names of the repairs that are in force.

    Raises:
        MissingExtraError: If NNI is not installed.
        IncompatibleLibraryError: If NNI cannot be imported on this Python, or with these libraries.
    """
    make_torchvision_importable()  # nni.compression imports it, and catches ImportError only
    _import_nni()
    return tuple(repair.__name__ for repair in _REPAIRS if repair())


def _import_nni() -> None:
    """Import NNI without the warnings of its own import: they are errors under ``-W error``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import nni.common.concrete_trace_utils
            import nni.compression.pruning
            import nni.compression.speedup  # noqa: F401
        except Exception as error:  # what NNI raises where a library or a Python is not the one that it was made for
            if isinstance(error, ImportError) and (error.name or "").split(".")[0] == "nni":
                raise MissingExtraError("nni", "nni") from error
            raise IncompatibleLibraryError(
                f"NNI {version('nni')} does not work with Python {platform.python_version()} and torch "
                f"{torch.__version__} here ({type(error).__name__}: {error}); the rest of gumbel_plugin does without it"
            ) from error
