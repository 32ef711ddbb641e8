from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin.errors import ConfigError, GraphError, TargetError
from gumbel_plugin.insight.connections import find_connections
from gumbel_plugin.insight.interpret import (
    Part,
    Symmetry,
    disjoint_parts,
    feature_importance,
    pathways,
    symmetries,
)
from gumbel_plugin.runs.models import build_model

RAW = [
    # (inputs, fc1, outputs by hand): x0 and x1 with opposite signs into unit 0 and 2, x2 and x3 alike into unit 1
    [[2.0, -2.0, 0, 0], [0, 0, 3.0, 3.0], [1.0, -1.0, 0, 0], [0, 0, 0, 0]],
    [[0.5, 0, -1.0, 0], [0, 4.0, 0, 0], [0, 0, 0, 7.0]],
    [[1.0, 0, 0], [0, -2.0, 0]],
]


def known() -> nn.Sequential:
    """4-4-3-2: two disjoint halves; unit 3 of the first layer has nothing in, unit 2 of the second nothing alive in."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)
    )  # fmt: skip
    with torch.no_grad():
        for place, weight in zip((1, 3, 5), RAW, strict=True):
            model[place].weight.copy_(torch.tensor(weight))
    return model


def sparse(model: nn.Module, density: float, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < density)
    return model


class TestImportance:
    def test_of_a_known_network(self) -> None:
        """Output 0: x0 by |2|·|0.5|·|1| + |1|·|−1|·|1| = 2, x1 the same. Output 1: x2 and x3 by 3·4·2 = 24."""
        found = feature_importance(known(), {})
        assert found.per_output.tolist() == [[2, 2, 0, 0], [0, 0, 24, 24]]
        assert found.total.tolist() == [2, 2, 24, 24]

    def test_masks_count(self) -> None:
        mask = torch.ones(4, 4)
        mask[2, 0] = 0
        found = feature_importance(known(), {"1": {"weight": mask}})
        assert found.per_output[0].tolist() == [1, 2, 0, 0]

    def test_is_the_sum_over_all_paths(self) -> None:
        """Brute force: every path of a random MLP, one product each."""
        torch.manual_seed(0)
        model = sparse(build_model("toy_mlp"), 0.5)
        first, second, third = (model.get_submodule(n).weight.abs().double() for n in ("fc1", "fc2", "fc3"))
        expected = torch.zeros(2, 4, dtype=torch.float64)
        for i, h, g, k in itertools.product(range(4), range(10), range(10), range(2)):
            expected[k, i] += (first[h, i] * second[g, h] * third[k, g]).detach()
        torch.testing.assert_close(feature_importance(model, {}).per_output, expected)

    def test_through_convolution_norm_pooling_and_residual(self) -> None:
        """The oracle runs absolute weights on a unit impulse at every pixel."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
                self.again, self.pool = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.MaxPool2d(2)
                self.fc = nn.Linear(16, 3)

            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(self.norm(self.conv(x)))
                x = F.hardswish(x - self.again(x).relu_())
                return self.fc(torch.flatten(self.pool(x), 1)).softmax(1)

        torch.manual_seed(0)
        net = Net()
        with torch.no_grad():
            for tensor in (net.norm.weight, net.norm.bias, net.norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(net.norm.running_var, 0.5, 2.0)
        found = feature_importance(net, {}, (2, 4, 4)).per_output
        impulses = torch.eye(32, dtype=torch.float64).reshape(32, 2, 4, 4)
        scale = (net.norm.weight.abs() / torch.sqrt(net.norm.running_var + net.norm.eps)).double()
        with torch.no_grad():
            x = F.conv2d(impulses, net.conv.weight.abs().double(), padding=1) * scale[:, None, None]
            x = x + F.conv2d(x, net.again.weight.abs().double(), padding=1, groups=2)
            expected = F.avg_pool2d(x, 2).flatten(1) @ net.fc.weight.abs().double().T
        torch.testing.assert_close(found, expected.T.reshape(3, 2, 4, 4))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "shape", "density"), [("lenet5", (1, 16, 16), 0.03), ("resnet20", (3, 8, 8), 0.02)]
    )
    def test_inputs_without_a_path_have_no_gradient(self, name: str, shape: tuple[int, ...], density: float) -> None:
        options = {"image_size": 16} if name == "lenet5" else {}
        torch.manual_seed(0)
        model = sparse(build_model(name, **options), density, seed=1).double().eval()
        found = feature_importance(model, {}, shape).total > 0
        touched = torch.zeros(shape, dtype=torch.bool)
        for seed in range(8):  # one gradient misses what a ReLU or a pooling hides
            x = torch.randn(16, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            x.requires_grad_()
            model(x).square().sum().backward()
            assert x.grad is not None
            touched |= (x.grad != 0).any(0)
        assert not bool((touched & ~found).any())
        assert 0 < int(touched.sum()) <= int(found.sum()) < found.numel()

    def test_leaves_the_model_alone(self) -> None:
        model = known().train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        feature_importance(model, {})
        pathways(model, {})
        assert model.training
        assert all(p.grad is None and p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class TestPathways:
    def test_of_a_known_network(self) -> None:
        graph = pathways(known(), {})
        edges = {(*edge[:2], edge[2]["value"]) for edge in graph.edges(data=True)}
        assert edges == {
            (("input", 0), ("1", 0), 2.0), (("input", 1), ("1", 0), -2.0),
            (("input", 0), ("1", 2), 1.0), (("input", 1), ("1", 2), -1.0),
            (("input", 2), ("1", 1), 3.0), (("input", 3), ("1", 1), 3.0),
            (("1", 0), ("3", 0), 0.5), (("1", 2), ("3", 0), -1.0), (("1", 1), ("3", 1), 4.0),
            (("3", 0), ("output", 0), 1.0), (("3", 1), ("output", 1), -2.0),
        }  # fmt: skip
        assert {about["weight"] for _, _, about in graph.edges(data=True)} == {0.5, 1.0, 2.0, 3.0, 4.0}
        layers = dict(graph.nodes(data="layer"))
        assert (layers[("input", 0)], layers[("1", 0)], layers[("3", 0)]) == (0, 1, 2)
        assert layers[("output", 0)] > 2
        assert disjoint_parts(graph) == [Part((0, 1), (0,), 3, 7), Part((2, 3), (1,), 2, 4)]
        assert dict(graph.nodes(data="part"))[("3", 1)] == 1

    def test_what_lies_on_no_path_is_left_out(self) -> None:
        graph = pathways(known(), {})
        assert ("1", 3) not in graph
        assert ("3", 2) not in graph
        assert graph.graph["input_units"] == 4

    def test_an_output_without_a_path_stands_alone(self) -> None:
        closed = torch.ones(2, 3)
        closed[0] = 0
        graph = pathways(known(), {"5": {"weight": closed}})
        assert disjoint_parts(graph) == [Part((), (0,), 0, 0), Part((2, 3), (1,), 2, 4)]

    def test_counts_every_kept_weight_of_a_dense_network(self) -> None:
        graph = pathways(build_model("toy_mlp"), {})
        assert sum(part.connections for part in disjoint_parts(graph)) == graph.number_of_edges() == 160
        assert len(graph) == 4 + 10 + 10 + 2

    def test_convolutions_connect_channels(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16, 2),
        )  # fmt: skip
        with torch.no_grad():
            model[0].weight[:, 2] = 0
            model[6].weight[:, 4:] = 0  # the last three channels' places
        graph = pathways(model, {}, (3, 8, 8))
        assert ("input", 2) not in graph
        assert {node for node in graph if node[0] == "2"} == {("2", 0)}
        assert set(graph.predecessors(("2", 0))) == {("0", 0), ("0", 1)}  # of its own group
        edge = graph.edges[("2", 0), ("output", 1)]
        scale = 1 / (1 + 1e-5) ** 0.5
        assert edge["connections"] == 4
        assert edge["weight"] == pytest.approx(scale * float(model[6].weight[1, :4].detach().abs().sum()), rel=1e-6)
        assert graph.edges[("input", 0), ("0", 1)]["connections"] == 9

    def test_a_residual_and_a_shared_layer(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

            def forward(self, x: Tensor) -> Tensor:
                x = x + F.silu(self.inner(x))
                x += torch.tanh(self.inner(x))
                return self.head(x)

        net = Net()
        with torch.no_grad():
            net.inner.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 0.0])))
            net.head.weight.copy_(torch.tensor([[1.0, 0.0, 1.0]]))
        graph = pathways(net, {}, (3,))
        assert set(graph.predecessors(("output", 0))) == {
            ("input", 0), ("input", 2), ("inner", 0), ("inner#2", 0)
        }  # fmt: skip
        assert set(graph.predecessors(("inner#2", 0))) == {("input", 0), ("inner", 0)}

    def test_an_input_may_go_straight_to_an_output(self) -> None:
        class Skip(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x[:, :2]

        graph = pathways(Skip(), {}, (3,))
        assert list(graph.edges) == [(("input", 0), ("output", 0)), (("input", 1), ("output", 1))]
        assert [part.connections for part in disjoint_parts(graph)] == [0, 0]

    def test_connections_compute_the_linear_part(self) -> None:
        """Multiplying the layers' weights along the sources gives the network's own Jacobian, without activations."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 4, 2, groups=1), nn.Flatten(), nn.Linear(16, 2))
        found = find_connections(model, (2, 4, 4))
        assert [layer.name for layer in found.layers] == ["0", "1", "3"]
        assert found.layers[2].kernels("1").shape == (2, 4, 4)
        torch.testing.assert_close(
            found.layers[2].kernels("1").flatten(1), model[3].weight.detach().double(), rtol=0, atol=0
        )
        torch.testing.assert_close(
            found.layers[0].kernels("input"), model[0].weight.detach().double().flatten(2), rtol=0, atol=0
        )


class TestSymmetries:
    def test_of_a_known_network(self) -> None:
        assert symmetries(known(), {}) == [Symmetry((0, 1), (1, -1), 1.0), Symmetry((2, 3), (1, 1), 1.0)]

    def test_exchanging_the_inputs_leaves_the_outputs(self) -> None:
        model, x = known(), torch.randn(5, 4)
        for group in symmetries(model, {}):
            i, j = group.inputs
            swapped = x.clone()
            swapped[:, i], swapped[:, j] = group.signs[1] * x[:, j], group.signs[1] * x[:, i]
            torch.testing.assert_close(model(swapped), model(x))

    @pytest.mark.parametrize(("factor", "found"), [(1.15, True), (1.3, False)])
    def test_nearly_alike(self, factor: float, found: bool) -> None:
        model = known()
        with torch.no_grad():
            model[1].weight[:, 1] *= factor
        alike = [group for group in symmetries(model, {}) if group.inputs == (0, 1)]
        assert len(alike) == found
        for group in alike:
            assert group.score == pytest.approx(1 - 0.15 / 2.15)

    def test_another_pattern_is_another_role(self) -> None:
        model = known()
        with torch.no_grad():
            model[1].weight[2, 0] = 0
        assert [group.inputs for group in symmetries(model, {})] == [(2, 3)]

    def test_signs_must_agree_throughout(self) -> None:
        model = known()
        with torch.no_grad():
            model[1].weight[2, 0] *= -1
        assert [group.inputs for group in symmetries(model, {}, tolerance=0.2)] == [(2, 3)]

    def test_dead_ends_do_not_count(self) -> None:
        model = known()
        with torch.no_grad():
            model[1].weight[3, 2] = 9.0  # unit 3 only reaches unit 2 of the next layer, which nothing reads
        assert [group.inputs for group in symmetries(model, {})] == [(0, 1), (2, 3)]

    def test_channels_of_images(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        with torch.no_grad():
            model[0].weight[:, 2] = -model[0].weight[:, 0]
        assert symmetries(model, {}, (3, 4, 4)) == [Symmetry((0, 2), (1, -1), 1.0)]

    def test_several_at_once(self) -> None:
        model = nn.Sequential(nn.Linear(5, 2), nn.ReLU(), nn.Linear(2, 1))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, -1.0, 1.0, 0.0, 5.0], [2.0, -2.0, 2.0, 0.0, 0.0]]))
        assert symmetries(model, {}) == [Symmetry((0, 1, 2), (1, -1, 1), 1.0)]


class TestErrors:
    def test_a_shape_is_needed(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
        with pytest.raises(ConfigError, match="input_shape is missing: the network starts with a Conv2d"):
            feature_importance(model, {})

    def test_gates_multiply(self) -> None:
        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.a(x) * torch.sigmoid(self.b(x))

        with pytest.raises(GraphError, match="Gated multiplies what it computes"):
            feature_importance(Gated(), {})

    def test_a_wrong_shape(self) -> None:
        with pytest.raises(GraphError, match="does not run as a network of paths"):
            pathways(known(), {}, (7,))

    def test_several_outputs(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x, x

        with pytest.raises(GraphError, match="must compute one tensor"):
            feature_importance(Two(), {}, (2,))

    def test_masks_that_do_not_fit(self) -> None:
        with pytest.raises(TargetError, match="mask for module 'fc'"):
            pathways(known(), {"fc": {"weight": torch.ones(1)}})

    @pytest.mark.parametrize("tolerance", [-0.1, 1.0])
    def test_tolerance(self, tolerance: float) -> None:
        with pytest.raises(ConfigError, match="tolerance is"):
            symmetries(known(), {}, tolerance=tolerance)


class Written(nn.Module):
    """A forward that is written down, over some layers."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


class TestSigns:
    def test_inputs_that_reach_outputs_past_the_layers_are_told_apart(self) -> None:
        model = Written(lambda m, x: x + torch.tanh(m.fc(x)), fc=nn.Linear(2, 2, bias=False))
        model.fc.weight.data.fill_(1.0)
        assert symmetries(model, {}) == []

    def test_a_difference_has_opposite_signs(self) -> None:
        layers = {"fc": nn.Linear(2, 3), "out": nn.Linear(3, 1)}
        model = Written(lambda m, x: m.out(torch.relu(m.fc(x[:, :2] - x[:, 2:]))), **layers)
        found = symmetries(model, {}, (4,))
        assert [(each.inputs, each.signs) for each in found] == [((0, 2), (1, -1)), ((1, 3), (1, -1))]

    def test_a_norm_may_turn_a_sign(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).eval()
        model[0].weight.data = torch.tensor([1.0, -1.0])
        model[1].weight.data.fill_(1.0)
        assert [each.signs for each in symmetries(model, {})] == [(1, -1)]

    def test_convolutions_of_one_pixel_read_channels(self) -> None:
        model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
        assert pathways(model, {}, (2, 2, 2)).graph["input_units"] == 2

    @pytest.mark.parametrize(
        "forward",
        [
            lambda m, x: -m.fc(x),
            lambda m, x: 1 - m.fc(x),
            lambda m, x: m.fc(x) * -2 / 2,
            lambda m, x: -2 * m.fc(x) / -2,
            lambda m, x: m.fc(x) - 3,
        ],
    )
    def test_importance_is_that_of_absolute_weights(self, forward) -> None:
        layer = nn.Linear(3, 2)
        expected = layer.weight.detach().abs().double()
        torch.testing.assert_close(feature_importance(Written(forward, fc=layer), {}).per_output, expected)


@pytest.mark.parametrize("names", [("input", "b", "c"), ("a", "output", "c"), ("a", "b", "output")])
def test_layers_may_have_the_names_of_the_graphs_own_nodes(names: tuple[str, str, str]) -> None:
    def network(first: str, second: str, third: str) -> nn.Module:
        layers = {first: nn.Linear(4, 3), second: nn.Linear(3, 3), third: nn.Linear(3, 2)}
        return Written(
            lambda m, x: getattr(m, third)(getattr(m, second)(torch.relu(getattr(m, first)(x)).tanh())), **layers
        )

    graph, plain = pathways(network(*names), {}), pathways(network("a", "b", "c"), {})
    assert (len(graph), graph.number_of_edges()) == (len(plain), plain.number_of_edges()) == (12, 27)
    assert disjoint_parts(graph) == disjoint_parts(plain)
    symmetries(network(*names), {})
