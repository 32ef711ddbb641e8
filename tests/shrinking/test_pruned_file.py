from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gumbel_plugin import load_pruned, save_pruned, shrink
from gumbel_plugin.errors import ConfigError, DataError
from gumbel_plugin.graph.dependency_groups import find_groups
from gumbel_plugin.graph.record import kept_of
from gumbel_plugin.shrinking.pruned_file import FORMAT, read_header
from gumbel_plugin.shrinking.shrink import masked_copy, remove_dead_units
from gumbel_plugin.storage.tensor_file import write_tensors


def half_closed(network: Any) -> nn.Module:
    """Return a copy of a network whose consumers read every second unit of every group only."""
    model = masked_copy(network.model, {})
    modules = dict(model.named_modules())
    with torch.no_grad():
        for group in network.groups().values():
            for part in group.consumers:
                layer: Any = modules[part.module]
                closed = part.positions[part.units % 2 == 1]
                if getattr(layer, "transposed", False):
                    layer.weight[closed] = 0
                elif getattr(layer, "groups", 1) > 1:
                    continue
                else:
                    layer.weight[:, closed] = 0
    return model


@pytest.fixture
def small(network: Any) -> nn.Module:
    return remove_dead_units(half_closed(network), network.inputs)


class TestRoundTrip:
    @pytest.mark.slow
    def test_every_network(self, network_name: str, make_network: Any, small: nn.Module, tmp_path: Path) -> None:
        """The same weights and outputs, from a factory that knows nothing of the masks."""
        network = make_network(network_name)
        save_pruned(tmp_path / "small.safetensors", small)
        again = load_pruned(tmp_path / "small.safetensors", lambda: make_network(network_name).model)
        assert again.state_dict().keys() == small.state_dict().keys()
        assert all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), small.state_dict().values(), strict=True)
        )
        inputs = network.batch(3)
        assert torch.equal(again.eval()(inputs), small.eval()(inputs))
        assert str(again) == str(small)  # in_channels, num_features and the like follow
        assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]

    @pytest.mark.slow
    def test_kept_indices_are_those_of_the_dense_network(self, network: Any, small: nn.Module, tmp_path: Path) -> None:
        save_pruned(tmp_path / "small", small)
        dense, left = half_closed(network).state_dict(), small.state_dict()
        kept = read_header(tmp_path / "small")["kept"]
        assert {name for name in dense if dense[name].shape != left[name].shape} == set(kept)
        for name, dimensions in kept.items():
            part = dense[name]
            for number, indices in enumerate(dimensions):
                if indices is not None:
                    part = part.index_select(number, torch.tensor(indices))
            assert torch.equal(part, left[name])
            assert part.shape == left[name].shape

    def test_both_engines(self, engine: Any, make_network: Any, tmp_path: Path) -> None:
        network = make_network("residual")
        small = remove_dead_units(half_closed(network), network.inputs, engine=engine)
        save_pruned(tmp_path / "small", small)
        again = load_pruned(tmp_path / "small", lambda: make_network("residual").model)
        assert torch.equal(again.eval()(network.inputs), small.eval()(network.inputs))
        assert read_header(tmp_path / "small")["kept"]["head.weight"] == [None, [0, 2, 4]]

    def test_two_removals_are_counted_from_the_first_network(self, tmp_path: Path) -> None:
        dense = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        for layer in (dense[0], dense[2]):  # nothing is constant, so that nothing is folded
            nn.init.uniform_(layer.weight, 0.5, 1.0)
        first, second = copy.deepcopy(dense), None
        first[2].weight.data[:, [0, 3]] = 0
        small = remove_dead_units(first, torch.randn(2, 3))
        small[2].weight.data[:, 1] = 0  # of [1, 2, 4, 5]
        second = remove_dead_units(small, torch.randn(2, 3))
        save_pruned(tmp_path / "small", second)
        kept = read_header(tmp_path / "small")["kept"]
        assert kept["0.weight"] == [[1, 4, 5], None]
        assert kept["2.weight"] == [None, [1, 4, 5]]
        small[4].weight.data[:, 2] = 0
        kept_now = kept_of(remove_dead_units(small, torch.randn(2, 3)))
        assert [None if d is None else d.tolist() for d in kept_now["2.weight"]] == [[0, 1, 3], [1, 4, 5]]

    def test_copies_know_what_was_kept(self, make_network: Any) -> None:
        network = make_network("residual")
        small = remove_dead_units(half_closed(network), network.inputs)
        assert kept_of(copy.deepcopy(small)).keys() == kept_of(small).keys() != set()

    def test_the_same_network_is_the_same_file(self, make_network: Any, tmp_path: Path) -> None:
        for number in range(4):
            save_pruned(tmp_path / str(number), make_network("residual").model)
        assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1

    def test_a_bias_that_only_the_small_network_has(self, tmp_path: Path) -> None:
        """Constants of removed units are folded into biases, which a layer may get for that."""
        small = nn.Sequential(nn.Linear(3, 2))
        save_pruned(tmp_path / "small", small)
        again = load_pruned(tmp_path / "small", lambda: nn.Sequential(nn.Linear(3, 4, bias=False)))
        assert torch.equal(again(torch.ones(1, 3)), small(torch.ones(1, 3)))

    def test_an_untouched_network(self, make_network: Any, tmp_path: Path) -> None:
        model = make_network("no_bn").model
        save_pruned(tmp_path / "whole", model)
        again = load_pruned(tmp_path / "whole", lambda: make_network("no_bn").model)
        assert all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
        )

    def test_shared_parameters_stay_shared(self, tmp_path: Path) -> None:
        class Tied(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, width), nn.Linear(4, width)
                self.b.weight = self.a.weight

        save_pruned(tmp_path / "small", Tied(3))
        again = load_pruned(tmp_path / "small", lambda: Tied(5))
        assert again.a.weight is again.b.weight
        assert again.a.out_features == 3


class TestAttention:
    def test_heads_of_torch(self, tmp_path: Path) -> None:
        from torchvision.models import VisionTransformer

        def vit() -> nn.Module:
            return VisionTransformer(
                image_size=16, patch_size=8, num_layers=1, num_heads=4, hidden_dim=16, mlp_dim=24, num_classes=3
            )

        torch.manual_seed(0)
        model, x = vit(), torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            nn.init.normal_(model.heads.head.weight)
            layer = model.encoder.layers[0].self_attention
            layer.out_proj.weight[:, 4:8] = 0
        assert any(group.name.endswith("self_attention") for group in find_groups(model, x))
        small = shrink(model, {}, x)
        assert small.encoder.layers[0].self_attention.num_heads == 3
        save_pruned(tmp_path / "small", small)
        again = load_pruned(tmp_path / "small", vit)
        assert torch.equal(again.eval()(x), small.eval()(x))


class TestLoadingItTheWrongWay:
    def test_torch_names_the_function(self, make_network: Any, tmp_path: Path) -> None:
        """Complaint: the pruned model cannot be loaded."""
        network = make_network("residual")
        save_pruned(tmp_path / "small", remove_dead_units(half_closed(network), network.inputs))
        with pytest.raises(RuntimeError, match=r"gumbel_plugin\.load_pruned\(path, factory\)"):
            make_network("residual").model.load_state_dict(load_file(tmp_path / "small"))

    def test_another_network(self, make_network: Any, tmp_path: Path) -> None:
        save_pruned(tmp_path / "small", make_network("residual").model)
        with pytest.raises(DataError, match="is it another network"):
            load_pruned(tmp_path / "small", lambda: make_network("no_bn").model)

    def test_a_smaller_factory(self, tmp_path: Path) -> None:
        save_pruned(tmp_path / "small", nn.Linear(3, 5))
        with pytest.raises(
            DataError, match=r"'weight' is \(5, 3\) in the file and \(4, 3\) in the network of the factory"
        ):
            load_pruned(tmp_path / "small", lambda: nn.Linear(3, 4))


class TestDamage:
    @pytest.mark.parametrize("cut", [3, 40, -1])
    def test_truncated(self, cut: int, tmp_path: Path) -> None:
        path = tmp_path / "small"
        save_pruned(path, nn.Linear(3, 4))
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(DataError, match="cannot be read"):
            load_pruned(path, lambda: nn.Linear(3, 4))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot be read"):
            load_pruned(tmp_path / "nothing", lambda: nn.Linear(3, 4))

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            (None, r"its header has \[\]"),
            ({"format": "x"}, r"header has \['digest', 'format'\]"),
            ({FORMAT: "{"}, "damaged header"),
            ({FORMAT: "3"}, "damaged header"),
            ({FORMAT: "[" * 10_000}, "damaged header: Invalid JSON"),
        ],
    )
    def test_another_file(self, metadata: Any, message: str, tmp_path: Path) -> None:
        if metadata is None:
            save_file({"weight": torch.ones(2)}, tmp_path / "other")
        else:
            write_tensors(tmp_path / "other", {"weight": torch.ones(2)}, metadata)
        with pytest.raises(DataError, match=message):
            read_header(tmp_path / "other")

    def test_state_that_is_no_tensor(self, tmp_path: Path) -> None:
        class Odd(nn.Linear):
            def get_extra_state(self) -> Any:
                return {"a": 1}

        with pytest.raises(ConfigError, match="'_extra_state' is no tensor"):
            save_pruned(tmp_path / "small", Odd(2, 2))
        assert list(tmp_path.iterdir()) == []

    def test_more_can_be_noted(self, tmp_path: Path) -> None:
        save_pruned(tmp_path / "small", nn.Linear(3, 4), model={"name": "lenet300"})
        header = read_header(tmp_path / "small")
        assert header["model"] == {"name": "lenet300"}
        assert header["versions"]["torch"] == torch.__version__
        assert json.dumps(header)
