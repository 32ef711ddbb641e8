"""Each repair is undone first, so that its test shows the breakage, and then shows it repaired."""

from __future__ import annotations

import copy
import dis
import inspect
import pickle
import re
import subprocess
import sys
import warnings
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nni.common.concrete_trace_utils import concrete_proxy, concrete_trace, concrete_tracer
from nni.compression.speedup import ModelSpeedup, container, mask_updater, model_speedup, utils
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import gumbel_nni
from gumbel_nni import compat
from gumbel_nni.compat import speedup as repairs
from gumbel_nni.compat import trace_repairs as tracing
from gumbel_plugin.errors import MissingExtraError
from gumbel_plugin.shrinking.mask_file import save_masks
from tests.gumbel_nni.helpers import without

ALL_REPAIRS = (
    "two_pruners_on_one_layer",
    "total_sparsity_of_old_lists",
    "masks_of_unknown_modules",
    "slim_factors_in_weights",
    "biases_of_norms",
    "norm_pruners_in_fusion",
    "layers_survive_unwrapping",
    "wrapped_layers_in_fused_kernels",
    "gradients_of_quantized_values",
    "settable_max_steps",
    "steps_after_backward",
    "steps_of_trainer",
    "loss_with_item_count",
    "default_optimizer_of_trainer",
    "config_errors_with_index",
    "untraced_optimizers",
    "optimizers_of_another_model",
    "layer_types_by_name",
    "derived_layer_types",
    "values_last_used_by_size",
    "pytree_nodes_of_fx",
    "size_is_a_leaf",
    "masks_by_path",
    "modes_and_statistics",
    "tensor_methods_in_tracer",
    "python_functions_in_tracer",
    "type_in_tracer",
    "bytecode_caches_in_proxy",
    "generic_classes_in_tracer",
    "impure_with_two_arguments",
    "classes_after_tracing",
    "length_of_a_fused_training",
    "channels_of_transposed_convolutions",
)
NOT_NEEDED = {
    "type_in_tracer": isinstance(getattr(type, "__type_params__", ()), tuple),
    "impure_with_two_arguments": "impure_random" not in inspect.signature(torch.fx.Node.is_impure).parameters,
    "bytecode_caches_in_proxy": sys.version_info < (3, 11),
}


class Branches(nn.Module):
    """What makes a proxy look at the bytecode of its caller: truth, unpacking, starred arguments, loops."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if c > 1 and not torch.is_tensor(h):
            x = x.reshape(n, c * h, w)
        for i in range(2):
            x = x + i
        while x.dim() > 2:
            x = x.sum(-1)
        first, *rest = torch.unbind(x, 1)
        return torch.stack([first, *rest], dim=1) if first.shape[0] > 1 else first


class Reshaping(nn.Module):
    """A network that handles a torch.Size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()
        y = torch.relu(self.first(x.view(size[0], size[1:].numel())))
        return self.second(y.view(size[0], y.shape[1]))


class ScaleByDefault(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float = 3.0) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: SimpleNamespace, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: SimpleNamespace, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_apply_is_idempotent_and_names_what_is_in_force() -> None:
    assert compat.apply() == tuple(name for name in ALL_REPAIRS if not NOT_NEEDED.get(name))
    before = model_speedup.tree_map_zip, concrete_tracer.node_is_impure_wrapper, concrete_tracer.ConcreteTracer.trace
    assert compat.apply() == tuple(name for name in ALL_REPAIRS if not NOT_NEEDED.get(name))
    after = model_speedup.tree_map_zip, concrete_tracer.node_is_impure_wrapper, concrete_tracer.ConcreteTracer.trace
    assert before == after
    assert gumbel_nni.compat is compat


def test_without_nni_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "nni"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"nni is not installed; .*gumbel-plugin\[nni\]"):
        compat.apply()


def test_tracer_knows_tensor_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    table = concrete_tracer.ConcreteTracer.default_autowrap_leaf_function
    with monkeypatch.context() as undo:
        undo.setitem(table, torch._C.TensorBase._make_subclass, ([], False, None))
        with pytest.raises(AttributeError, match="startswith"):
            concrete_trace(two_layers(), (torch.ones(2, 4),))
    table[torch._C.TensorBase._make_subclass] = ([], False, None)
    table[torch.Tensor.add] = ([], False, None)
    assert tracing.tensor_methods_in_tracer()
    assert torch._C.TensorBase._make_subclass not in table
    assert table[torch.Tensor.add][0] == [(torch.Tensor, "add")]
    assert torch.Tensor.split in table  # the Python override, not TensorBase's
    assert torch._C.TensorBase.split not in table
    concrete_trace(two_layers(), (torch.ones(2, 4),))


def test_tracing_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = concrete_tracer.ConcreteTracer
    classes = (torch.Tensor, nn.Module, torch.autograd.Function)
    before = {cls: dict(vars(cls)) for cls in classes}
    with monkeypatch.context() as undo, tracing._class_attributes_kept(*classes):
        undo.setattr(tracer, "trace", tracer.trace.__wrapped__)
        concrete_trace(two_layers(), (torch.ones(2, 4),))
        assert "apply" not in vars(torch.autograd.Function)  # costs defaults and torch.func, until about torch 2.13
    concrete_trace(two_layers(), (torch.ones(2, 4),))
    assert ScaleByDefault.apply(torch.ones(1)).item() == 3.0
    for cls, attributes in before.items():
        assert dict(vars(cls)) == attributes


def test_new_class_attributes_go_again() -> None:
    class Parent:
        def method(self) -> int:
            return 1

    class Child(Parent):
        own = 1

    with tracing._class_attributes_kept(Child):
        Child.method = Child.method  # what the fx patcher leaves
        Child.new = 2
        del Child.own
    assert "method" not in vars(Child)
    assert (Child.own, Child.new) == (1, 2)


@pytest.mark.skipif(NOT_NEEDED["impure_with_two_arguments"], reason="this torch passes one argument")
def test_dead_code_elimination_may_pass_two_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    repaired = concrete_tracer.node_is_impure_wrapper
    monkeypatch.setattr(concrete_tracer, "node_is_impure_wrapper", repaired.__wrapped__)
    with pytest.raises(TypeError, match="positional argument"):
        concrete_trace(two_layers(), (torch.ones(2, 4),))
    compat.apply()
    assert concrete_tracer.node_is_impure_wrapper is not repaired.__wrapped__
    concrete_trace(two_layers(), (torch.ones(2, 4),))


@pytest.mark.slow
@pytest.mark.skipif(NOT_NEEDED["bytecode_caches_in_proxy"], reason="this Python has no inline caches")
def test_proxies_find_their_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = concrete_proxy.ConcreteProxy
    x = torch.randn(2, 3, 4, 4)
    old_names = [name for name in proxy.jump_opnames if name in dis.opmap]
    monkeypatch.setattr(concrete_proxy, "dis", dis)
    monkeypatch.setattr(proxy, "jump_opcodes", tuple(dis.opmap[name] for name in old_names))
    with pytest.raises((TypeError, IndexError)):
        concrete_trace(Branches(), (x,))
    assert tracing.bytecode_caches_in_proxy()
    traced = concrete_trace(Branches(), (x,))
    other = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(traced(other), Branches()(other), rtol=0, atol=0)


def test_there_is_one_instruction_a_code_unit() -> None:
    code = Branches.forward.__code__
    units = list(tracing._one_instruction_a_unit(code))
    for instruction in dis.get_instructions(code):
        assert units[instruction.offset // 2] == instruction
    assert len(units) <= len(code.co_code) // 2


@pytest.mark.slow
def test_size_is_one_leaf_in_every_module_of_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    original = utils.tree_map_zip.__wrapped__
    with pytest.raises(AssertionError, match="Inconsistent tree nodes length"):
        original(lambda size, mask: mask, torch.Size([2, 3]), None)
    assert utils.tree_map_zip(lambda size, mask: (size, mask), torch.Size([2, 3]), None) == (torch.Size([2, 3]), None)
    masks = {"first": {"weight": torch.ones(8, 6)}}
    masks["first"]["weight"][::2] = 0
    with monkeypatch.context() as undo:
        for module in (utils, mask_updater, model_speedup):
            undo.setattr(module, "tree_map_zip", original)
        with pytest.raises(AttributeError, match="numel"):
            ModelSpeedup(Reshaping(), torch.ones(2, 3, 2), copy.deepcopy(masks)).speedup_model()
        compat.apply()
        assert model_speedup.tree_map_zip is mask_updater.tree_map_zip is utils.tree_map_zip
        small = ModelSpeedup(Reshaping(), torch.ones(2, 3, 2), copy.deepcopy(masks)).speedup_model()
        assert small.first.weight.shape == (4, 6)


def test_size_repair_maps_several_trees() -> None:
    trees = ({"a": (1, torch.Size([2]))}, {"a": (10, None)})
    assert utils.tree_map_zip(lambda a, b: (a, b), *trees) == {"a": ((1, 10), (torch.Size([2]), None))}
    assert utils.tree_map_zip(lambda a: a * 2, [1, 2]) == [2, 4]
    with pytest.raises(ValueError, match="shorter"):
        utils.tree_map_zip(lambda a, b: a, [1, 2], [1])


def test_fx_collections_keep_their_key_paths() -> None:
    tree = immutable_list([1, immutable_dict(a=2)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils._register_pytree_node(immutable_list, utils._ilist_flatten, utils._ilist_unflatten)
        utils._register_pytree_node(immutable_dict, utils._idict_flatten, utils._idict_unflatten)
    with pytest.raises(ValueError, match="flatten_with_keys_fn"):
        pytree.tree_flatten_with_path(tree)
    assert repairs.pytree_nodes_of_fx()
    paths, spec = pytree.tree_flatten_with_path(tree)
    assert [pytree.keystr(path) for path, _ in paths] == ["[0]", "[1]['a']"]
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    assert type(pytree.tree_map(lambda leaf: leaf, tree)) is immutable_list


def test_masks_of_a_pruner_load_from_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    masks["first"]["weight"] = torch.ones(8, 6)
    masks["first"]["weight"][::2] = 0
    path, ours = tmp_path / "masks.pth", tmp_path / "masks.safetensors"
    torch.save(masks, path)
    save_masks(ours, masks)
    with monkeypatch.context() as undo:
        without(undo, ModelSpeedup, "__init__")
        with pytest.raises(pickle.UnpicklingError, match="defaultdict"):
            ModelSpeedup(two_layers(), torch.ones(2, 4), str(path))
    for file in (path, str(path), ours):
        with pytest.warns(UserWarning, match="save_masks") if file != ours else nullcontext():
            loaded = ModelSpeedup(two_layers(), torch.ones(2, 4), file, batch_size=4)
        assert torch.equal(loaded.masks["first"]["weight"], masks["first"]["weight"])
        assert loaded.batch_size == 4
    with pytest.raises(pickle.UnpicklingError, match="defaultdict"):
        torch.load(path)  # nothing was allowed for good


def test_python_functions_run_inside_leaves() -> None:
    class Normalized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ij,kj->ik", F.normalize(x), x).norm(p=2.0, dim=1)

    table = concrete_tracer.ConcreteTracer.default_autowrap_leaf_function
    x = torch.randn(3, 4)
    table[torch._C._VariableFunctions.norm] = ([], False, torch.norm)
    with pytest.raises(TypeError, match="norm"):
        concrete_trace(Normalized(), (x,))
    assert tracing.python_functions_in_tracer()
    traced = concrete_trace(Normalized(), (x,))
    torch.testing.assert_close(traced(2 * x), Normalized()(2 * x), rtol=0, atol=0)


def test_traced_code_may_name_generic_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kernel = list[int]((int.from_bytes(b"\x02", "big"), 2))
            return F.max_pool2d(F.relu(x), kernel).mean((2, 3))

    x = torch.randn(2, 3, 4, 4)
    with monkeypatch.context() as undo:
        without(undo, concrete_tracer, "_create_wrapped_leaf_class", "_create_wrapped_leaf_iterable_class")
        with pytest.raises(TypeError, match="not subscriptable"):
            concrete_trace(Pooled(), (x,))
    traced = concrete_trace(Pooled(), (x,))
    torch.testing.assert_close(traced(2 * x), Pooled()(2 * x), rtol=0, atol=0)


def test_a_value_may_be_used_last_for_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y.relu() / y.size(0)

    def shrunk() -> nn.Module:
        return ModelSpeedup(Sized(), torch.ones(2, 4), {"layer": {"weight": torch.ones(6, 4)}}).speedup_model()

    with monkeypatch.context() as undo:
        undo.delattr(container.NodeInfo, "_output_randomize")
        with pytest.raises(AttributeError, match="_output_randomize"):
            shrunk()
    assert shrunk().layer.out_features == 6


@pytest.mark.slow
def test_speedup_leaves_modes_and_statistics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def shrunk() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
        model[3].eval()
        masks = {"0": {"weight": torch.ones(6, 4), "bias": torch.ones(6)}}
        masks["0"]["weight"][::2] = masks["0"]["bias"][::2] = 0
        return ModelSpeedup(model, torch.randn(3, 4) + 5, masks).speedup_model()

    with monkeypatch.context() as undo:
        without(undo, ModelSpeedup, "__init__", "speedup_model")
        model = shrunk()
        assert bool(model[1].running_mean.any())
        assert model[3].training
    model = shrunk()
    assert not bool(model[1].running_mean.any())
    assert [module.training for module in model] == [True, True, True, False]
    assert (model.training, model[0].out_features) == (True, 3)


@pytest.mark.slow
def test_an_nni_that_does_not_work_here_is_one_error_and_costs_nothing_else(tmp_path: Path) -> None:
    """NNI imports typeguard; where that is not to be had, nothing but the adapter is lost."""
    program = """
import sys
sys.modules["typeguard"] = None  # as if it could not be imported
import gumbel_plugin, gumbel_torch_pruning
try:
    gumbel_plugin.GumbelPruner
except ImportError as error:
    print(type(error).__name__, error)
import torch
from torch import nn
print(len(gumbel_torch_pruning.find_groups(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), torch.ones(1, 2))))
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    message, groups = ended.stdout.splitlines()
    assert re.match(r"IncompatibleLibraryError NNI 3\.0 does not work with Python .* and torch .*typeguard", message)
    assert message.endswith("the rest of gumbel_plugin does without it")
    assert int(groups) > 0
