"""Language models that return a cache for their next call: what is compared is what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.layers.example_inputs import named_tensors
from gumbel_torch_pruning import find_groups
from tests.graph.exact_steps import exact_step

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"vocab_size": 50, "max_position_embeddings": 64}
LLAMA: dict[str, Any] = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BART = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
}
OPT: dict[str, Any] = {**SIZES, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # Torch-Pruning's

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "grouped queries": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), ("model.layers.0.self_attn",)),
    "tuples": (lambda: hf.LlamaModel(hf.LlamaConfig(**LLAMA, return_dict=False)), ("layers.1.self_attn",)),
    "without a head": (lambda: hf.MistralModel(hf.MistralConfig(**LLAMA)), ("layers.0.self_attn",)),
    "biases": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)), ("model.layers.0.self_attn",)),
    "OPT": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, num_attention_heads=4)),
        ("model.decoder.layers.0.self_attn",),
    ),
    "encoder and decoder": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SIZES, **BART, d_model=32)),
        ("model.encoder.layers.0.self_attn", "model.decoder.layers.0.self_attn", "model.decoder.layers.0.encoder_attn"),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_heads_leave_exactly(kind: str) -> None:
    torch.manual_seed(0)
    make, heads = MODELS[kind]
    model, inputs = make().eval(), {"input_ids": IDS}
    found = {group.name: group.reason for group in find_groups(model, inputs)}
    assert [found[name] for name in heads] == [""] * len(heads)
    pruner = GumbelGroupPruner(model, inputs, pruning_ratio=0.0, prune_num_heads=True, head_pruning_ratio=0.5)
    exact_step(pruner, inputs)


def test_a_small_model_goes_on_with_its_own_cache() -> None:
    torch.manual_seed(0)
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).eval()
    inputs = {"input_ids": IDS}
    pruner = GumbelGroupPruner(model, inputs, pruning_ratio=0.5, prune_num_heads=True, head_pruning_ratio=0.5)
    pruner.step()
    assert model.model.layers[0].self_attn.k_proj.out_features == 8
    with torch.no_grad():
        whole = model(IDS).logits
        begin = model(IDS[:, :5])
        end = model(IDS[:, 5:], past_key_values=begin.past_key_values)
    torch.testing.assert_close(torch.cat([begin.logits, end.logits], 1), whole)
    with torch.no_grad():
        generated = model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 10)


class TestWhatIsCompared:
    """Caches beside other outputs are left out, by name or class; nothing else is."""

    class RollingCache:
        def __init__(self, keys: Tensor) -> None:
            self.keys = keys

    @dataclass
    class Output:
        logits: Tensor
        past_key_values: tuple[Tensor, ...]

    def test_names_and_classes(self) -> None:
        one, two = torch.ones(1), torch.zeros(2)
        cache = self.RollingCache(two)
        for output in (
            {"logits": one, "past_key_values": (two,)},
            {"logits": one, "mems": [two]},
            (one, cache),
            (one, [cache, cache]),
            (one, hf.DynamicCache()),
            self.Output(one, (two,)),
        ):
            assert [tensor for _, tensor in named_tensors(output)] == [one]

    def test_what_is_returned_alone_counts(self) -> None:
        keys = torch.ones(1)
        assert [tensor for _, tensor in named_tensors(self.RollingCache(keys))] == [keys]

    def test_other_tuples_count(self) -> None:
        one, two = torch.ones(1), torch.zeros(2)
        assert len(list(named_tensors((one, (two, two))))) == 3
        assert len(list(named_tensors({"logits": one, "hidden_states": (two,), "cached": two}))) == 3
