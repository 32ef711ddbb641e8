"""Whole heads of attention layers: found, gated while training, removed, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gumbel_plugin import shrink, verify_equivalence
from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import TargetError
from gumbel_plugin.graph.attention_heads import find_heads, kind_of, opaque_attention, remove_heads
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.dependency_groups import DependencyGroups, find_groups
from gumbel_plugin.layers.example_inputs import call_model
from gumbel_plugin.training.session import MaskingSession

# Networks ---------------------------------------------------------------------------------------------------------


def _vit() -> tuple[nn.Module, Any]:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=5
    )
    return model, torch.randn(2, 3, 32, 32)


def _swin(version: int) -> tuple[nn.Module, Any]:
    from torchvision.models import swin_transformer as swin

    blocks = (swin.SwinTransformerBlock, swin.PatchMerging), (swin.SwinTransformerBlockV2, swin.PatchMergingV2)
    block, merging = blocks[version - 1]
    model = swin.SwinTransformer(
        patch_size=[2, 2],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        mlp_ratio=2.0,
        num_classes=5,
        block=block,
        downsample_layer=merging,
    )
    return model, torch.randn(2, 3, 24, 24)


def _bert(attention: str) -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        attn_implementation=attention,
    )
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return transformers.BertModel(config), {"input_ids": torch.randint(0, 30, (2, 7)), "attention_mask": mask}


def _llama(attention: str, kv_heads: int) -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        intermediate_size=48,
        max_position_embeddings=16,
        attn_implementation=attention,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 30, (2, 7))}


def _clip_text() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        attn_implementation="sdpa",
        eos_token_id=2,
    )
    return transformers.CLIPTextModel(config), {"input_ids": torch.randint(0, 30, (2, 7))}


class _Encoder(nn.Module):
    """torch's own encoder, which has fused kernels of its own in eval mode, and a head of its own."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, 0.1, F.gelu, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.encoder(x, src_key_padding_mask=padding))
        return out


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "vit": _vit,
    "swin_v1": lambda: _swin(1),
    "swin_v2": lambda: _swin(2),
    "bert_eager": lambda: _bert("eager"),
    "bert_sdpa": lambda: _bert("sdpa"),
    "llama_eager_grouped": lambda: _llama("eager", 2),
    "llama_sdpa_grouped": lambda: _llama("sdpa", 2),
    "llama_sdpa": lambda: _llama("sdpa", 4),
    "clip_text": _clip_text,
    "encoder": lambda: (_Encoder(), torch.randn(2, 6, 32)),
    "encoder_norm_first": lambda: (_Encoder(norm_first=True), torch.randn(2, 6, 32)),
}
SWINS, GROUPED = ("swin_v1", "swin_v2"), ("llama_eager_grouped", "llama_sdpa_grouped")
HEADS = {case: [2, 2, 4, 4] if case in SWINS else [2, 2] if case in GROUPED else [4, 4] for case in CASES}


def _build(case: str) -> tuple[nn.Module, Any]:
    """Return a model in eval mode in which no parameter is at a special value, and inputs for it."""
    torch.manual_seed(0)
    model, inputs = CASES[case]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), inputs


def _session(model: nn.Module, groups: list[ChannelGroup], **settings: Any) -> MaskingSession:
    types = {"Linear", "MultiheadAttention"} & {type(module).__name__ for module in model.modules()}
    rule = {"op_types": sorted(types), "sparse_ratio": 0.5, **settings}
    return MaskingSession(model, PruningSection(config_list=[rule]), groups)


def _half(size: int) -> Tensor:
    """Return random gates, about half of them closed, at least one open and one closed."""
    gates = torch.rand(size) < 0.5
    gates[:2] = torch.tensor([True, False])
    return gates[torch.randperm(size)]


def _output(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        result = call_model(model, inputs)
    return result if isinstance(result, Tensor) else result[0]


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# The whole way -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_heads_and_widths_are_exact_and_no_channel_is_gated_twice(case: str) -> None:
    model, inputs = _build(case)
    exact = [group for group in find_groups(model, inputs) if group.safety == "exact"]
    heads = [group.name for group in find_heads(model)]
    assert [group.size for group in exact if group.name in heads] == HEADS[case]
    assert len(exact) == 2 * len(heads)  # every block has one MLP width
    for side in ("producers", "consumers"):
        places = [(p.module, int(c)) for group in exact for p in getattr(group, side) for c in p.positions]
        assert len(places) == len(set(places))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_closed_heads_and_widths_leave_the_network_without_a_trace(case: str) -> None:
    model, inputs = _build(case)
    dense, before = _output(model, inputs), _parameters(model)
    session = _session(model, find_groups(model, inputs))
    session.start()
    for name, mask in session.plan.masks.items():
        mask.fix(_half(session.plan.groups[name].size))
    gated = _output(model, inputs)
    assert not torch.allclose(gated, dense, atol=1e-2)
    masks = session.extract()
    session.detach()
    torch.testing.assert_close(_output(model, inputs), gated, atol=1e-5, rtol=1e-4)

    small = shrink(model, masks, inputs, verify=False)
    report = verify_equivalence(model, small, inputs)
    assert report.passed, report
    assert set(report.errors) == {"float32", "float64"}
    assert _parameters(small) < before == _parameters(model)
    left = {group.name: group.size for group in find_heads(small)}
    for name, size in left.items():
        assert size == int(session.plan.masks[name].hard.sum())


@pytest.mark.parametrize("case", CASES)
def test_the_small_network_trains_on_is_copied_and_restored(case: str) -> None:
    model, inputs = _build(case)
    first, *_ = heads = find_heads(model)
    model.get_submodule(first.name).requires_grad_(False)
    for group in heads:
        remove_heads(model, group.name, torch.arange(group.size // 2))
    parameters = dict(model.named_parameters())
    assert all(p.requires_grad != name.startswith(f"{first.name}.") for name, p in parameters.items())
    duplicate = copy.deepcopy(model)
    torch.testing.assert_close(_output(duplicate, inputs), _output(model, inputs))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    outputs = call_model(model.train(), inputs)
    (outputs if isinstance(outputs, Tensor) else outputs[0]).square().mean().backward()
    unused = {"pooler.dense.weight", "pooler.dense.bias"}  # BERT's, which this output does not depend on
    assert {n for n, p in parameters.items() if p.requires_grad and p.grad is None} <= unused
    optimizer.step()
    model.eval()
    assert not torch.allclose(_output(duplicate, inputs), _output(model, inputs))
    duplicate.load_state_dict(model.state_dict())
    torch.testing.assert_close(_output(duplicate, inputs), _output(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_head_gates_are_learnt(case: str) -> None:
    model, inputs = _build(case)
    session = _session(model, find_groups(model, inputs))
    session.start()
    outputs = call_model(model.train(), inputs)
    (outputs if isinstance(outputs, Tensor) else outputs[0]).square().mean().backward()
    for group in find_heads(model):
        (logits,) = session.plan.masks[group.name].parameters()
        assert logits.grad is not None
        assert (logits.grad != 0).all(), group.name


@pytest.mark.slow
def test_heads_are_removed_from_what_was_removed_from_before() -> None:
    for case in ("vit", "swin_v1", "swin_v2", "bert_sdpa", "llama_sdpa"):
        model, inputs = _build(case)
        group = find_heads(model)[-1]
        whole = copy.deepcopy(model)
        remove_heads(model, group.name, torch.tensor([1]))
        remove_heads(model, group.name, torch.tensor([0, 2]))  # heads 0 and 3 of what there was
        (consumer,) = group.consumers
        columns = consumer.positions[consumer.units != 2]
        weight = whole.get_submodule(consumer.module).weight
        assert isinstance(weight, Tensor)
        weight.data[:, columns] = 0
        report = verify_equivalence(whole, model, inputs)
        assert report.passed, (case, report)


def test_dependency_groups_remove_heads_and_keep_everything_else() -> None:
    model, inputs = _build("bert_sdpa")
    dependency = DependencyGroups(model.double(), inputs)
    random = torch.get_rng_state()
    dependency.remove("encoder.layer.0.attention.self", torch.tensor([0, 3]))
    assert torch.equal(torch.get_rng_state(), random)
    layer = model.encoder.layer[0].attention  # type: ignore[union-attr, index]
    assert (layer.self.num_attention_heads, layer.self.all_head_size) == (2, 16)
    assert layer.self.query.weight.shape == (16, 32)
    assert layer.output.dense.weight.shape == (32, 16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert not model.training


@pytest.mark.parametrize("case", ["vit", "swin_v1", "swin_v2"])
def test_compact_layers_are_traced_by_fx(case: str) -> None:
    model, inputs = _build(case)
    for group in find_heads(model):
        remove_heads(model, group.name, torch.tensor([0]))
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(_output(traced, inputs), _output(model, inputs))


# Gating ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", ["vit", "encoder", "encoder_norm_first"])
def test_gates_act_in_torchs_fused_eval_path(case: str, fast: bool) -> None:
    model, inputs = _build(case)
    session = _session(model, find_groups(model, inputs))
    session.start()
    for name, mask in session.plan.masks.items():
        mask.fix(_half(session.plan.groups[name].size))
    reference = copy.deepcopy(model)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        gated = _output(model, inputs)
        session.extract()
        session.detach()
        torch.testing.assert_close(_output(model, inputs), gated, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(_output(reference, inputs), gated, atol=1e-5, rtol=1e-4)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_batches_go_through_as_nested_tensors() -> None:
    model, x = _build("encoder")
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    session = _session(model, find_groups(model, (x, padding)))
    session.start()
    for name, mask in session.plan.masks.items():
        mask.fix(_half(session.plan.groups[name].size))
    gated = _output(model, (x, padding))
    assert (gated[0, 4] == gated[0, 5]).all()  # torch zeroes what is padding: it did go that way
    masks = session.extract()
    session.detach()
    torch.testing.assert_close(_output(model, (x, padding)), gated, atol=1e-5, rtol=1e-4)
    small = shrink(model, masks, (x, padding))
    torch.testing.assert_close(_output(small, (x, padding)), gated, atol=1e-5, rtol=1e-4)
    assert _output(small.train(), (x, padding)).isfinite().all()


def test_element_masks_act_on_weights_that_the_parent_reads() -> None:
    model, inputs = _build("swin_v1")
    session = _session(model, [], op_names=["features.1.0.attn.qkv", "features.1.0.attn.proj"], granularity="element")
    session.start()
    dense = _output(model, inputs)
    for mask in session.plan.masks.values():
        mask.fix(torch.rand(mask.shape) < 0.5)
    gated = _output(model, inputs)
    assert not torch.allclose(gated, dense, atol=1e-2)
    session.extract()
    session.detach()
    torch.testing.assert_close(_output(model, inputs), gated)


def test_an_attention_layer_is_selected_by_its_own_name_or_type() -> None:
    model, inputs = _build("vit")
    groups = find_groups(model, inputs)
    name = "encoder.layers.encoder_layer_1.self_attention"
    plan = _session(model, groups, op_types=["MultiheadAttention"]).plan
    assert list(plan.masks) == ["encoder.layers.encoder_layer_0.self_attention", name]
    (term,) = plan.budgets[-1].terms
    assert term.cost == 3 * 32 * 32 / 4  # rows of the packed projections, a head's quarter
    only = _session(model, groups, op_types=None, op_names=[name]).plan
    assert list(only.masks) == [name]
    with pytest.raises(TargetError, match=r"self_attention.*no weight to mask"):
        _session(model, groups, op_types=None, op_names=[name], granularity="element")


# Tracing -----------------------------------------------------------------------------------------------------------


def test_layers_are_opaque_while_tracing_only() -> None:
    for case in ("vit", "swin_v2", "llama_sdpa_grouped"):
        model, inputs = _build(case)
        expected, attributes = _output(model, inputs), [set(vars(module)) for module in model.modules()]
        with opaque_attention(model):
            outputs = call_model(model, inputs)
        traced = outputs if isinstance(outputs, Tensor) else outputs[0]
        torch.testing.assert_close(traced.detach(), expected, atol=1e-5, rtol=1e-4)
        assert [set(vars(module)) for module in model.modules()] == attributes
        attention = {id(p) for g in find_heads(model) for p in model.get_submodule(g.name).parameters()}
        assert not attention & _leaves(traced)


def _leaves(output: Tensor) -> set[int]:
    """Return the parameters that autograd knows the output to depend on."""
    found, stack, seen = set(), [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [source for source, _ in node.next_functions]
    return found


def test_other_modules_are_no_attention() -> None:
    model, _ = _build("bert_sdpa")
    found = [name for name, module in model.named_modules() if kind_of(module) is not None]
    assert found == [f"encoder.layer.{number}.attention.self" for number in (0, 1)]
    assert remove_heads(model, "encoder.layer.0.output.dense", torch.tensor([0])) is False
