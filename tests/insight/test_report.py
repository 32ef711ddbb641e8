from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
import pytest
from torch import nn

from gumbel_plugin.errors import MissingExtraError
from gumbel_plugin.insight.report import render_comparison, render_report
from gumbel_plugin.insight.report_data import (
    ReportData,
    agreement_line,
    agreement_rows,
    comparison_rows,
    latency_warnings,
    result_rows,
)
from gumbel_plugin.insight.widths import layer_widths, misaligned
from gumbel_plugin.training.agreement import Agreement

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def column(scale: float, score: float | None, milliseconds: float) -> dict[str, Any]:
    latency = {"1": {"median_ms": milliseconds, "iqr_ms": 0.1, "runs": 9}}
    size = int(1000 * scale)
    return {
        "parameters": size,
        "nonzero": size,
        "macs": 10 * size,
        "file_bytes": 4 * size,
        "score": score,
        "latency": {**latency, "64": {"median_ms": 20 * milliseconds, "iqr_ms": 1.0, "runs": 9}},
    }


def data(**changes: Any) -> ReportData:
    bins = [[1000 - 100 * epoch, *[5 * epoch] * 18, 10 * epoch] for epoch in range(9)]
    masks = [f"features.{number}.conv" for number in range(30)]
    whole = ReportData(
        name="a <run>",
        columns={"dense": column(2, 99.5, 1.0), "masked": column(2, 98.0, 1.0), "small": column(1, 98.0, 0.5)},
        score="test accuracy (%)",
        validation="validation accuracy (%)",
        equivalence={
            "passed": True,
            "samples": 4,
            "errors": {"float32": 1e-7, "float64": None},
            "absolute_errors": {"float32": 1e-7, "float64": None},
            "tolerances": {"float32": 1e-5, "float64": 1e-10},
        },
        sparsity=0.5,
        layers=[{"name": name, "kind": "Conv2d", "before": [8, 64], "after": [8, 37]} for name in masks],
        log=[
            {
                "epoch": epoch,
                "loss": 1 / epoch,
                "sparsity": epoch / 20,
                "soft_sparsity": epoch / 18,
                "validation_score": math.nan if epoch == 2 else 80 + epoch,
            }
            for epoch in range(1, 10)
        ],
        gates=[{"epoch": epoch + 1, "masks": dict.fromkeys(masks, counts)} for epoch, counts in enumerate(bins)],
        facts={"seed": "0", "git revision": "abcdef"},
        versions={"torch": "2"},
        config="pruning: {}",
    )
    return replace(whole, **changes)


class TestPage:
    @pytest.mark.slow
    def test_says_everything(self) -> None:
        page = render_report(data())
        assert page.count("<svg") == 4
        for text in ("a &lt;run&gt;", "98.00", "50.0 %", "1e-05", "abcdef", "pruning: {}", "not a number"):
            assert text in page
        assert "The first 24 of 30 masks" in page

    @pytest.mark.slow
    def test_needs_no_network(self) -> None:
        page = render_report(data())
        assert re.findall(r'(?:src|href)="(?!#|data:)', page) == []
        assert "@import" not in page
        assert "url(http" not in page

    @pytest.mark.slow
    def test_is_the_same_for_the_same_run(self) -> None:
        few = data(gates=[{"epoch": 1, "masks": {"conv": [1, 2, 3]}}])
        assert render_report(few) == render_report(few)

    @pytest.mark.slow
    @pytest.mark.parametrize("missing", ["log", "gates", "layers"])
    def test_what_is_missing_is_left_out(self, missing: str) -> None:
        assert render_report(data(**{"gates": (), missing: ()})).count("<svg") == 3 - (missing != "gates")

    @pytest.mark.slow
    def test_without_latency(self) -> None:
        columns = {name: {**column, "latency": {}} for name, column in data().columns.items()}
        page = render_report(data(columns=columns, gates=()))
        assert "latency (batch" not in page
        assert latency_warnings(data(columns=columns)) == []

    @pytest.mark.slow
    def test_a_failed_proof_is_plain_to_see(self) -> None:
        failed = {**data().equivalence, "passed": False}
        assert "NOT equal" in render_report(data(equivalence=failed, gates=()))

    @pytest.mark.slow
    def test_matplotlib_keeps_its_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # it cannot be imported
        before = dict(matplotlib.rcParams.copy())
        render_report(data(gates=()))
        assert dict(matplotlib.rcParams.copy()) == before

    def test_a_missing_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.delitem(sys.modules, "gumbel_plugin.insight.report_figures", raising=False)
        monkeypatch.delattr("gumbel_plugin.insight.report_figures", raising=False)
        with pytest.raises(MissingExtraError, match=r"gumbel-plugin\[report\]"):
            render_report(data(gates=()))


class TestSlower:
    """Complaint: it is not faster."""

    def slow(self, after: int) -> ReportData:
        layers = [{"name": "conv1", "kind": "Conv2d", "before": [3, 64], "after": [3, after]}]
        return data(layers=layers, columns={**data().columns, "small": column(1, 98.0, 1.5)})

    @pytest.mark.slow
    def test_misaligned_widths_are_the_reason(self) -> None:
        sentences = latency_warnings(self.slow(37))
        assert len(sentences) == 2
        assert sentences[0].startswith("The small network is slower at a batch of 1: 1.500 ms against 1.000 ms.")
        assert "conv1 (37)" in sentences[0]
        assert "round_to=8" in sentences[0]
        assert sentences[0] in render_report(replace(self.slow(37), gates=())).replace("&#39;", "'")

    def test_even_widths_are_not(self) -> None:
        assert all("round_to" not in sentence for sentence in latency_warnings(self.slow(32)))

    def test_within_the_noise_nothing_is_said(self) -> None:
        assert latency_warnings(data(columns={**data().columns, "small": column(1, 98.0, 1.05)})) == []
        assert latency_warnings(data()) == []


class TestAgreement:
    """Consensus runs: each sample had gates of its own."""

    AGREEMENT: ClassVar[dict[str, Any]] = {
        "samples": 10000,
        "unanimous": 0.0651,
        "gates": {"stage1.0": [1.0], "conv<1>": [1.0, 0.5, 0.0716]},
    }

    @pytest.mark.slow
    def test_the_page_has_a_row_for_every_mask(self) -> None:
        page = render_report(data(agreement=self.AGREEMENT, gates=()))
        section = page.split("<h2>Agreement</h2>")[1].split("</section>")[0]
        cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", section.split("<tbody>")[1])
        assert cells == ["stage1.0", "1", "100.0 %", "100.0 %", "conv&lt;1&gt;", "3", "52.4 %", "7.2 %"]
        assert "6.5 % of 10,000 held-out samples" in section

    @pytest.mark.slow
    def test_other_runs_have_none(self) -> None:
        assert "Agreement" not in render_report(data(gates=()))

    def test_rows_are_those_of_a_session(self) -> None:
        agreement = Agreement(4, 0.75, {"0": [1.0, 0.75]}).as_dict()
        assert agreement_rows(agreement) == [["0", "2", "87.5 %", "75.0 %"]]
        assert agreement_line(agreement) == "75.0 % of 4 held-out samples have exactly the decided gates as their own"


class TestTables:
    def test_result(self) -> None:
        rows = dict(result_rows({**data().columns, "dense": column(2, None, 1.0)}))
        assert rows["MACs"] == ["20,000", "20,000", "10,000"]
        assert rows["latency (batch 1)"] == ["1.000 ± 0.050 ms", "1.000 ± 0.050 ms", "0.500 ± 0.050 ms"]
        assert rows["test score"] == ["-", "98.00", "98.00"]

    def test_comparison(self) -> None:
        failed = data(name="b", equivalence={**data().equivalence, "passed": False})
        rows = comparison_rows([data(), failed])
        expected = ["99.50", "98.00", "1,000 (50.0 %)", "10,000 (50.0 %)", "0.500 ± 0.050 ms", "50.00 %"]
        assert rows == [["a <run>", *expected, "equal"], ["b", *expected, "NOT EQUAL"]]
        page = render_comparison([data(), failed])
        assert page.count("<svg") == 1
        assert "NOT EQUAL" in page


def test_widths() -> None:
    dense = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(8, 4))
    small = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 8, 1), nn.Flatten(), nn.Linear(8, 4))
    widths = layer_widths(dense, small)
    assert [(w.name, w.before, w.after) for w in widths] == [
        ("0", (3, 16), (3, 5)),
        ("2", (16, 8), (5, 8)),
        ("4", (8, 4), (8, 4)),
    ]
    assert [w.name for w in misaligned(widths)] == ["0"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize("page", ["report", "comparison"])
def test_in_a_browser(page: str, tmp_path: Path) -> None:
    """No console errors; every figure has a size, and nothing is wider than the page."""
    probe = """<script>
        const boxes = [...document.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
        const sizes = boxes.map(box => `${Math.round(box.width)}x${Math.round(box.height)}`);
        document.title = `sizes ${sizes.join(" ")}; overflow ${document.documentElement.scrollWidth - innerWidth}`;
    </script></body>"""
    html = render_report(data()) if page == "report" else render_comparison([data(), data(name="b")])
    (tmp_path / "page.html").write_text(html.replace("</body>", probe), encoding="utf-8")
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    place = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,900", "--dump-dom"]
    done = subprocess.run(
        [*command, *place, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>sizes (.*); overflow (-?\d+)</title>", done.stdout)
    assert title is not None
    sizes = [tuple(map(int, size.split("x"))) for size in title[1].split()]
    assert len(sizes) == html.count("<svg") == (4 if page == "report" else 1)
    assert all(width > 300 and height > 100 for width, height in sizes)
    assert int(title[2]) <= 0
