"""All repairs, in the order in which they are made."""

from __future__ import annotations

from collections.abc import Callable

from gumbel_nni.compat import (
    compressors,
    evaluator_repairs,
    messages,
    speedup,
    trace_repairs,
    training_length,
    transposed,
)

REPAIRS: tuple[Callable[[], bool], ...] = (
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
    training_length.length_of_a_fused_training,
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
