from __future__ import annotations

import io
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn

from gumbel_plugin.insight.interpret import Importance, feature_importance, pathways
from gumbel_plugin.insight.pictures import as_png, as_svg, importance_figure, pathways_figure
from gumbel_plugin.runs.models import build_model

SVG = "{http://www.w3.org/2000/svg}"


def check(figure: Figure) -> set[str]:
    """Both files hold a picture; returns the words in it."""
    image = imread(io.BytesIO(as_png(figure)))
    assert min(image.shape[:2]) > 100
    assert image.std() > 0.01  # not a blank page
    svg = as_svg(figure)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert len(list(root.iter(f"{SVG}path"))) > 3
    return {text.text for text in root.iter(f"{SVG}text") if text.text}


def toy() -> nn.Module:
    """Two parts: inputs 0 and 1 to output 0, inputs 2 and 3 to output 1."""
    torch.manual_seed(0)
    model = build_model("toy_mlp")
    with torch.no_grad():
        model.fc1.weight[:5, 2:] = model.fc1.weight[5:, :2] = 0
        model.fc2.weight[:5, 5:] = model.fc2.weight[5:, :5] = 0
        model.fc3.weight[0, 5:] = model.fc3.weight[1, :5] = 0
    return model


def test_bars_for_numbers() -> None:
    figure = importance_figure(feature_importance(toy(), {}), lambda node: f"<{node[0]} {node[1]}>")
    words = check(figure)
    assert words >= {"<input 0>", "<input 3>", "<output 0>", "<output 1>", "path weight"}
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx(feature_importance(toy(), {}).per_output.flatten().tolist())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 6, 5), (6, 5)])
def test_maps_for_images(shape: tuple[int, ...]) -> None:
    values = torch.zeros(2, *shape, dtype=torch.float64)
    values[1][..., 4, 2] = 2.0
    figure = importance_figure(Importance(values))
    assert check(figure) >= {"all outputs", "output 0", "output 1"}
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert [image.shape for image in images[:3]] == [(6, 5)] * 3
    assert images[2][4, 2] == images[2].sum() == 2.0 * (shape[0] if len(shape) == 3 else 1)
    assert images[1].max() == 0


def test_many_outputs_are_cut() -> None:
    figure = importance_figure(Importance(torch.rand(100, 1, 4, 4, dtype=torch.float64)))
    assert len([axis for axis in figure.axes if axis.images]) == 21


def test_pathways_of_two_parts() -> None:
    graph = pathways(toy(), {})
    figure = pathways_figure(graph, lambda node: f"{node[0][0]}{node[1] + 1}")
    assert check(figure) >= {"i1", "i4", "o1", "o2", "inputs (4)", "fc1 (10)", "outputs (2)", "positive weight"}
    lines = figure.axes[0].collections[:2]  # positive and negative
    assert sum(len(part.get_segments()) for part in lines) == graph.number_of_edges()
    widths = [width for part in lines for width in part.get_linewidths()]
    weights = [
        about["weight"] / max(a["weight"] for *_, t, a in graph.edges(data=True) if t[0] == target[0])
        for sign in (True, False)
        for _, target, about in graph.edges(data=True)
        if (about["value"] >= 0) == sign
    ]
    order = sorted(range(len(widths)), key=lambda number: weights[number])
    assert [widths[number] for number in order] == sorted(widths)  # the heavier, the wider
    assert len({tuple(color) for part in lines for color in part.get_colors()}) == 2  # one for each part
    low = {y for (x, y) in (segment[0] for part in lines for segment in part.get_segments()) if x == 0}
    assert len(low) == 4


@pytest.mark.slow
def test_pathways_of_a_crowd() -> None:
    torch.manual_seed(0)
    model = build_model("lenet300", in_features=64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand_like(parameter) < 0.02)
    words = check(pathways_figure(pathways(model, {}, (64,))))
    assert "output 9" in words
    assert "input 0" not in words  # too many to name


def test_a_network_without_a_path() -> None:
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    check(pathways_figure(pathways(model, {})))
    check(importance_figure(feature_importance(model, {})))


@pytest.mark.slow
def test_the_same_figure_is_the_same_file() -> None:
    assert as_svg(pathways_figure(pathways(toy(), {}))) == as_svg(pathways_figure(pathways(toy(), {})))


def test_nothing_global_changes() -> None:
    before = dict(matplotlib.rcParams)
    as_png(pathways_figure(pathways(toy(), {})))
    assert dict(matplotlib.rcParams) == before
