"""Tables and figures of causes and costs: numbers against independent ones, points that carry their own
names, two studies side by side; and the same facts in a terminal of 80 columns."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from aquabit.cli import findings, tables
from aquabit.pipelines import FAMILIES, PRESETS
from aquabit.reports import catalog, side_by_side, style, svg
from aquabit.reports import facts as facts_of
from aquabit.reports.page import embedded, page_data
from aquabit.reports.subjects import chosen, fronts, layer_graph, shap_values
from aquabit.scheme import Measurement, Protocol
from aquabit.search.front import Front
from aquabit.study import Study
from tests.pages import EVIL, Synthetic, parsed

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return Synthetic(tmp_path_factory.mktemp("parts") / "S.db", layers=16, samples=20, names=EVIL).whole()


@pytest.fixture(scope="module")
def facts(made: Synthetic) -> facts_of.Facts:
    return facts_of.read(made.study)


def test_progress_is_the_dominated_area_of_what_was_measured_so_far(facts: facts_of.Facts) -> None:
    table = fronts.progress(facts)
    own = facts.measured[
        facts.measured.kind.isin(["sample", "uniform", "candidate"]) & (facts.measured.status == "ok")
    ]
    own = own[own.protocol == facts.protocol.digest] if facts.protocol else own
    corner = own[own.kind == "sample"].fid.median(), own[own.kind == "sample"].bits.max()

    def area(part: pd.DataFrame) -> float:
        x = np.linspace(own.bits.min(), corner[1], 20001)
        best = np.full(len(x), corner[0])
        for r in part.itertuples():
            best = np.where(x >= r.bits, np.minimum(best, r.fid), best)
        return float((corner[0] - best).mean() * (corner[1] - x[0]))

    assert list(table.measurement) == list(range(1, len(own) + 1)) and table.hypervolume.iloc[-1] == 1
    for n in (3, 9, len(own)):
        assert table.hypervolume.iloc[n - 1] == pytest.approx(area(own.iloc[:n]) / area(own), abs=2e-3)


def test_budgets_frontiers_and_bits_are_the_winners(made: Synthetic, facts: facts_of.Facts) -> None:
    (row,) = fronts.budgets(facts).itertuples()
    used = made.cost(made.winner).bits_per_weight
    assert (
        row.limit == "bits per weight"
        and row.used == pytest.approx(used)
        and row.slack == pytest.approx(1 - used / 3.17)
    )
    table = fronts.frontiers(facts)
    assert (
        table.winner.sum() == 1 and (table.operations == 1.2e7).all() and table.bytes.is_monotonic_increasing
    )
    bits = chosen.chosen_bits(facts).set_index("layer")
    for name in made.space.layers:
        assert bits.loc[name].found == str(made.winner[name].weight) and bits.loc[name].uniform == "usq3"
        assert bits.loc[name].change == made.winner[name].weight.code_bits() - 3


def test_the_layer_graph_is_of_blocks_where_layers_are_many(
    made: Synthetic, facts: facts_of.Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = catalog.all_tables(facts)
    table = found["layer_graph"]
    assert (
        list(table.kind) == ["layer"] * 16
        and table.x.is_monotonic_increasing
        and (table.to.str.split().str.len() <= 1).all()
    )
    monkeypatch.setattr(layer_graph, "MOST", 15)
    blocks = layer_graph.layer_graph(facts)
    assert (
        list(blocks.kind) == ["block"] * 2 and list(blocks.to) == ["n1", ""] and list(blocks.layers) == [8, 8]
    )
    assert blocks.effect.tolist() == pytest.approx(found["blocks"].effect.tolist())


def test_layers_side_by_side_stand_in_the_order_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)  # no graphviz
    graph = nx.DiGraph()
    graph.add_edges_from([("in", "b"), ("in", "a"), ("in", "c"), ("b", "out"), ("a", "out"), ("c", "out")])
    places = layer_graph._places(graph)
    assert [name for name in graph if places[name][0] == places["a"][0]] == ["b", "a", "c"]
    assert places["b"][1] < places["a"][1] < places["c"][1]


def test_ticks_over_many_decades_keep_apart() -> None:
    with style.use():
        canvas, axes = style.canvas(style.SINGLE, 1.5)
        axes.set_yticks([0], ["down_blocks.1.attentions.0"])
        style.symmetric_axis(axes, "x", [0.01, 0.02, -3e9, 4e11], ticks_most=3)
        canvas.draw_without_rendering()
    boxes = [tick.get_window_extent() for tick in axes.get_xticklabels() if tick.get_text()]
    assert len(boxes) >= 5 and not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_points_carry_the_names_they_were_given() -> None:
    names = [EVIL[0], "b", EVIL[1], "d"]
    with style.use():
        canvas, axes = style.canvas(3, 2)
        dots = axes.plot([1, 2, 3, 4], [4, 3, 2, 1], "o")[0]
        style.name_points(axes, dots, names)
        sized = axes.scatter([1, 2, 3, 4], [1, 2, 3, 4], s=[5, 20, 50, 90])
        style.name_points(axes, sized, list("wxyz"), "tip")
        text = _svg_of(canvas)
    places = {"d": 0, EVIL[0]: 7, EVIL[1]: 9}
    page = str(svg.inline(text, style.named_points(canvas), "f", "a <caption>", places))
    root = svg.ET.fromstring(page)
    linked = [(float(e.get("x", "0")), e.get("data-layer")) for e in root.iter() if e.get("data-layer")]
    assert [place for _, place in sorted(linked)] == ["7", "9", "0"], (
        "in the order of x; an unknown layer has no link"
    )
    assert sorted(e.get("data-tip", "") for e in root.iter() if e.get("data-tip")) == list("wxyz")
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert (
        set(used) <= set(ids)
        and all(str(i).startswith("f-") for i in ids)
        and root.get("aria-label") == "a <caption>"
    )
    titles = [
        e.text for e in svg.ET.fromstring(svg.titled(text, style.named_points(canvas))).iter(f"{SVG}title")
    ]
    assert set(titles) == {*names, *"wxyz"}


def _svg_of(canvas: matplotlib.figure.Figure) -> str:
    import io

    file = io.StringIO()
    canvas.savefig(file, format="svg")
    return file.getvalue()


def test_the_pages_data_leaves_no_script_element(facts: facts_of.Facts) -> None:
    text = str(embedded({"a": "</script><!--", "b": float("1.5"), "c": "\u2028&"}))
    assert (
        "<" not in text
        and "&" not in text
        and json.loads(text) == {"a": "</script><!--", "b": 1.5, "c": "\u2028&"}
    )
    data = json.loads(str(page_data(facts, catalog.all_tables(facts))))
    row = next(r for r in data["layers"] if r["layer"] == EVIL[0])
    assert row["schemes"]["effect"][data["schemes"].index("usq2")] == pytest.approx(row["effect"], rel=1e-5)
    partners = {data["layers"][i]["layer"] for i, *_ in row["pairs"]}
    assert facts.sensitivity is not None
    stored = facts.sensitivity.interactions
    others = {*stored.a[stored.b == EVIL[0]], *stored.b[stored.a == EVIL[0]]}
    assert partners <= others and partners


def test_a_swarm_keeps_its_points_apart_and_in_their_row() -> None:
    offsets = shap_values._spread(np.sort(np.r_[np.full(30, 0.5), 0.1, 0.9]))
    assert len(set(offsets[1:31])) == 30 and np.abs(offsets).max() <= 0.42 and offsets[0] == offsets[-1] == 0


@pytest.mark.usefixtures("svg_only")
def test_two_studies_side_by_side(made: Synthetic, tmp_path: Path) -> None:
    other = Synthetic(tmp_path / "O.db", layers=8, samples=8, model=EVIL[0]).measure().explain()
    page = side_by_side(made.study, other.study, tmp_path / "out")
    text = " ".join(parsed(page).text)
    assert "beside " + EVIL[0] in text and "aquabit search O.db" in text and "aquabit search S.db" not in text
    table = pd.read_csv(tmp_path / "out/tables/beside_operators.csv")
    for _, part in table.groupby("study"):
        assert part.share.max() == pytest.approx(1) and sorted(part["rank"]) == list(range(1, len(part) + 1))
    assert set(table.operator[:4]) <= set(other.space.operators.values()), "shared operator types come first"
    again = side_by_side(made.study, made.study, tmp_path / "twice")
    assert "SRCC 1.00" in " ".join(parsed(again).text) and "synthetic-dit (S.db), first" in " ".join(
        parsed(again).text
    )


@pytest.mark.usefixtures("svg_only")
def test_numbers_of_other_protocols_are_left_out_and_named(tmp_path: Path) -> None:
    from aquabit.reports import report

    made = Synthetic(tmp_path / "S.db", layers=2, samples=4).measure()
    config = made.space.sample(1, seed=5)[0]
    strange = Protocol(images=7)
    made.study.add_protocol(strange)
    made.study.record(
        config,
        Measurement(config.digest, strange.digest, {"fid": 0.001}, 1.0),
        "sample",
        {"bits": 2, "bytes": 1, "bops": 1},
    )
    facts = facts_of.read(made.study)
    assert facts.foreign == 1 and facts.rows("sample").value.min() > 0.1
    assert "1 measurements were made under other protocols" in " ".join(
        parsed(report(made.study, tmp_path / "out")).text
    )


LONG = ["down_blocks.1.resnets.0.conv_shortcut", "transformer_blocks.27.norm1.emb.timestep_embedder.linear_2"]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal of 80 columns that records what is printed."""
    console = Console(width=80, file=io.StringIO(), record=True)
    for module in (findings, tables):
        monkeypatch.setattr(module, "console", console)
    return console


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Study]:
    """Of an older study and a newer one: names of layers as large models have them."""
    folder = tmp_path_factory.mktemp("terminal")
    older, newer = (
        Synthetic(folder / f"{name}.db", layers=9, samples=8, names=LONG).whole()
        for name in ("older", "newer")
    )
    return older.study, newer.judged().study


def told(study: Study) -> dict[str, Any]:
    """The sensitivity of a study, with the parts of a layer's row that ``Synthetic`` leaves out."""
    found = study.get("sensitivity")
    rows = [{**r, "predicted": r["effect"], "real": None, "n": 0} for r in found["layers"]]
    return {**found, "layers": rows}


def test_the_terminal_cuts_no_name_at_80_columns(terminal: Console, both: tuple[Study, Study]) -> None:
    for study in both:
        result = told(study)
        findings.show_sensitivity(result, 10)
        said = terminal.export_text()
        assert "\u2026" not in said
        for row in result["layers"]:
            assert f"{row['name']} ({row['operator']})\n" in said
            assert tables.ends(row) in said
    tables.show_families([f.to_dict() for f in FAMILIES], [p.to_dict() for p in PRESETS])
    said = terminal.export_text()
    assert "\u2026" not in said and all(f"{p.name} ({p.family})\n" in said for p in PRESETS)
    assert all(pipeline in said for f in FAMILIES for pipeline in f.pipelines)
    assert max(map(len, said.splitlines())) <= 80


def test_names_stand_beside_their_numbers_where_there_is_room() -> None:
    head, rows = ["layer", "worse\nby", "swaps"], [["conv_in", "0.123", "2"], ["x" * 30, "-12.3", "10"]]
    assert tables.named_lines(head, rows, 80) == [
        " " * 30 + "  worse       ",
        "layer" + " " * 25 + "     by  swaps",
        "conv_in" + " " * 23 + "  0.123      2",
        "x" * 30 + "  -12.3     10",
    ]
    assert tables.named_lines(head, rows, 40) == [
        "layer",
        "    worse       ",
        "       by  swaps",
        "conv_in",
        "    0.123      2",
        "x" * 30,
        "    -12.3     10",
    ]


def test_the_terminal_says_what_the_ranking_is_and_how_true(
    terminal: Console, both: tuple[Study, Study]
) -> None:
    findings.show_sensitivity(told(both[1]), 10)
    said = " ".join(terminal.export_text().split())
    assert "too few (14)" in said and "95 % interval" in said and "90 %" not in said and "PSNR" in said
    assert (
        "combined by a hierarchical model fitted to this study's swaps; effects in good configurations near 3"
        " bits" in said
    )
    assert (
        "layers drawn at random, the honest score: SRCC 0.710, sign agreement 0.95 (4 layers, 8 swaps)"
        in said
    )
    assert "layers that the ranking puts first: SRCC 0.440" in said
    findings.show_sensitivity(told(both[0]), 10)
    said = " ".join(terminal.export_text().split())
    assert (
        "90 % interval" in said
        and "95 %" not in said
        and "PSNR" not in said
        and "real swaps: SRCC 0.710" in said
    )


def test_a_front_in_the_terminal(terminal: Console, both: tuple[Study, Study]) -> None:
    front = Front.from_dict(both[1].get("front"))
    findings.show_front(front)
    said = terminal.export_text()
    assert "\u2026" not in said and max(map(len, said.splitlines())) <= 80
    c, best, words = front.comparison, front.best_member, " ".join(said.split())
    cells = f"* {best.bits_per_weight:.3f} {best.bytes:,} {best.latency_ms:.2f} {best.predicted['psnr']:.2f}"
    assert (
        f"{cells} {best.measured['psnr'].value:.2f} \u00b1 0.20 - {best.measured['fid'].value:.2f}"
        " \u00b1 0.50" in words
    )
    gap = c["psnr_difference"]
    ends = f"{gap['value']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f}, 95 %)"
    assert words.index(f"difference {ends}") < words.index("difference -0.10 (-0.50 to +0.30, 95 %)")
    assert (
        "FID of these 5 blocks cannot tell them apart (about 10,241 images would); fidelity decides" in words
    )
    row = next(r for r in c["same_quality"] if r["uniform"] == "usq3")
    share = f"{100 * row['found_bytes'] / row['bytes']:.0f} %"
    assert (
        f"usq3 for all layers has {row['value']:.1f} dB at {row['bytes']:,} bytes; the front has that from"
        f" {row['found_bytes']:,}" in words
    )
    assert f"bytes on ({share})" in words and words.count("for all layers has") == 3
    assert "against rival.json: " in words and "the next best is worse by 0.20 (0.10 to 0.30, 95 %)" in words
    assert words.endswith("additive program: optimum 1.5, bound 1.4, gap 0.1 of its span"), (
        "no surrogate was searched"
    )


def test_fronts_of_older_searches_and_without_uniform_are_shown(
    terminal: Console, both: tuple[Study, Study]
) -> None:
    older = Front.from_dict(both[0].get("front"))
    findings.show_front(older)
    said = " ".join(terminal.export_text().split())
    assert (
        "\u00b1 90 %" in said and "PSNR" not in said and "uniform usq3" in said and "cannot tell" not in said
    )
    newer = Front.from_dict(both[1].get("front"))
    kept = {k: newer.comparison[k] for k in ("same_quality", "judged", "against")}
    findings.show_front(replace(newer, comparison=kept))
    said = " ".join(terminal.export_text().split())
    assert "\u00b1 95 %" in said and "for all layers has" in said and "difference" not in said
