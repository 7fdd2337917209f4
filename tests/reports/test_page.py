"""The report of synthetic studies: tables, figures and the page, whole or with parts missing, with hostile
names."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from aquabit.cli import findings
from aquabit.reports import catalog, drawing, figures, report, style, words, writing
from aquabit.reports import facts as facts_of
from aquabit.reports.answer import answer
from aquabit.reports.lacks import missing
from aquabit.reports.subjects import comparison, interactions, quality, ranking, scheme_scores, swaps
from aquabit.scheme import AquabitError, Measurement
from aquabit.scheme_kinds import uniform_name
from aquabit.study import Study
from tests.pages import EVIL, PROTOCOL, Synthetic, parsed


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """A whole study with hostile names, and its page."""
    folder = tmp_path_factory.mktemp("report")
    study = Synthetic(folder / "S.db", names=EVIL, model=EVIL[0] + EVIL[1]).whole().study
    return study, report(study, folder / "out")


def test_page_loads_nothing_and_links_only_to_its_own_files(built: tuple[Study, Path]) -> None:
    page = built[1]
    reader = parsed(page)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in reader.loads)
    assert sum(address.startswith("data:") for address in reader.loads) == 3  # full precision, uniform, found
    source = page.read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/)", source)
    for link in reader.links:
        assert (link[1:] in reader.ids) if link.startswith("#") else (page.parent / link).is_file(), link
    assert len(reader.ids) == len(set(reader.ids))


def test_hostile_names_are_text_everywhere(built: tuple[Study, Path]) -> None:
    page = built[1]
    reader = parsed(page)
    assert reader.tags.count("img") == 3 and not reader.handlers and reader.tags.count("b") == 3
    assert all(any(name in text for text in reader.text) for name in EVIL)
    assert any("not finite <b>" in text for text in reader.text)
    for name in ("layer_ranking", "swaps", "operators"):
        root = ET.parse(page.parent / "figures" / f"{name}.svg").getroot()
        assert not [e for e in root.iter() if e.tag.endswith("img")]
    words = {
        "".join(e.itertext()).strip()
        for e in ET.parse(page.parent / "figures/layer_ranking.svg").getroot().iter()
        if e.tag.endswith("text")
    }
    assert set(EVIL) <= words
    latex = (page.parent / "tables/layers.tex").read_text()
    assert r"\textless{}img src=x onerror=alert(1)\textgreater{}" in latex
    assert r"\$\textbackslash{}alpha\$\_\%\&" in latex


def test_latex_rows_have_one_cell_a_column() -> None:
    table = pd.DataFrame(
        {
            "a_b": ["x & y", "[2pt]", "--", "日本"],
            "n": [1.5, float("nan"), -2.0, 1e6],
            "ok": [True, False, True, False],
        }
    )
    lines = writing.latex(table).splitlines()
    assert lines[0] == r"\begin{tabular}{lrl}"
    assert lines[2] == r"a\_b & n & ok \\"
    assert lines[4:8] == [
        r"x \& y & 1.5 & yes \\",
        r"{[}2pt{]} & -- & no \\",
        r"{-}{-} & $-$2 & yes \\",
        r"(U+65E5)(U+672C) & 1000000 & no \\",
    ]


def test_files_beside_the_page_are_its_tables(built: tuple[Study, Path]) -> None:
    study, page = built
    found = catalog.all_tables(facts_of.read(study))
    for name, table in found.items():
        assert (page.parent / "tables" / f"{name}.tex").is_file()
        stored = pd.read_csv(page.parent / "tables" / f"{name}.csv")
        pd.testing.assert_frame_equal(stored, table.replace("", np.nan), check_dtype=False)
    assert len(found["quality_vs_bits"]) == 40 + 4 + 1 + 4 + 1
    assert list(found["counts"].set_index("kind").failed[["sample"]]) == [2]
    for name in (
        "quality_vs_bits",
        "layer_ranking",
        "operators",
        "blocks",
        "chosen_schemes",
        "surrogate_scatter",
        "swaps",
    ):
        assert {f.suffix for f in (page.parent / "figures").glob(f"{name}.*")} == {".pdf", ".svg", ".png"}


def test_the_summary_names_worst_layer_winner_and_trust(built: tuple[Study, Path]) -> None:
    study, _ = built
    facts = facts_of.read(study)
    found = catalog.all_tables(facts)
    where, which, trust = (s.text for s in answer(facts, found, missing(facts)))
    assert found["layers"].layer[0] in where and "a combined (predicted and measured)" in where
    before = answer(replace(facts, sensitivity=replace(facts.sensitivity, ranking="predicted")), found, {})[
        0
    ].text
    assert "by a predicted " in before and "combined" not in before
    assert (
        "usq3" in which
        and "the found configuration wins" in which
        and f"{int(found['comparison'].bytes[0]):,} bytes" in which
    )
    assert (
        "within-budget SRCC of 0.83 (average bits 0.02; ridge one-hot 0.61)" in trust
        and "0.71" in trust
        and "0.96" not in trust
    )


def test_interactions_scores_and_the_source_of_the_ranking_are_shown(built: tuple[Study, Path]) -> None:
    study, page = built
    facts = facts_of.read(study)
    pairs, scores = interactions.pairs(facts), scheme_scores.scheme_scores(facts)
    assert (
        pairs.interaction.tolist() == [9.0 / (i + 1) for i in range(12)]
        and scores.score.tolist() == [-0.7] * 3
    )
    text = " ".join(parsed(page).text)
    assert "interaction, predicted" in text and "0.900 0.500 to 12.0" in " ".join(text.split())
    assert "0.750 0.500" not in " ".join(text.split()), "ten are shown"
    assert (
        "combines predictions with real swaps" in text
        and "effect, combined" in text
        and "effect, predicted" not in text
    )
    drawn = ET.parse(page.parent / "figures/layer_ranking.svg").getroot().iter()
    words = {"".join(e.itertext()).strip() for e in drawn if e.tag.endswith("text")}
    assert "combined, 90 % interval" in words and not any(w.startswith("predicted") for w in words)


def test_fresh_seeds_replace_search_seeds_and_the_interval_is_students(built: tuple[Study, Path]) -> None:
    facts = facts_of.read(built[0])
    table = quality.quality_vs_bits(facts)
    usq3 = table[table.label == "usq3"].iloc[0]
    values = facts.rows("fresh").query("config == @usq3.config").value
    assert usq3.blocks == 5 and usq3.value == pytest.approx(values.mean())
    assert usq3.high - usq3.value == pytest.approx(2.7764451 * values.std(ddof=1) / 5**0.5)
    assert table[table.label == "usq2"].iloc[0].blocks == 0


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Synthetic, Path]:
    """A study as searches and explanations leave it today, and its page; ``built`` is one of an older
    version."""
    folder = tmp_path_factory.mktemp("newer")
    made = Synthetic(folder / "S.db", layers=12, samples=20).whole().judged()
    return made, report(made.study, folder / "out")


def test_the_page_says_first_what_the_objective_cannot_tell_then_fidelity_and_size(
    newer: tuple[Synthetic, Path],
) -> None:
    made, _ = newer
    facts = facts_of.read(made.study)
    found = catalog.all_tables(facts)
    which = answer(facts, found, missing(facts))[1].text
    assert which.startswith(
        "FID of 5 \u00d7 128 images cannot tell the found configuration from uniform usq3 (about 10,241"
        " images would)"
    )
    gap = made.psnr(made.winner) - made.psnr(made.uniform["usq3"])
    ends = f"{words.figures(gap - 0.3)} to {words.figures(gap + 0.3)}, 95 %"
    assert (
        f"a paired difference of {words.figures(gap)} dB ({ends}) over 5 blocks of fresh seeds: the found"
        " configuration wins." in which
    )
    least = min(made.cost(c).bytes for c in made.found if made.psnr(c) >= made.psnr(made.uniform["usq3"]))
    share = 100 * least / made.cost(made.uniform["usq3"]).bytes
    assert (
        f"A found configuration of {least:,} bytes, {share:.0f} % of the"
        f" {made.cost(made.uniform['usq3']).bytes:,} of uniform usq3" in which
    )
    difference = {"value": -0.4, "low": -0.5, "high": -0.3}
    told = replace(
        facts, front=replace(facts.front, comparison={**facts.comparison, "difference": difference})
    )
    sure = answer(told, catalog.all_tables(told), {})[1].text
    assert (
        sure.startswith("Within 3.17 bits a weight, the found configuration (") and "cannot tell" not in sure
    )
    assert sure.endswith(
        "a paired difference of \u22120.400 (\u22120.500 to \u22120.300, 95 %): the found configuration wins."
    )


def test_the_page_shows_psnr_good_ones_halves_and_levels(newer: tuple[Synthetic, Path]) -> None:
    made, page = newer
    parts = [" ".join(part.split()) for part in parsed(page).text]
    text = " ".join(" ".join(parts).split())
    assert "too few (14)" in text and "PSNR lost, dB" in parts and "drawn at random 0.71 0.95 4 8" in text
    assert (
        "first in the ranking 0.44" in text
        and "hierarchical model" in text
        and "each by its precision" not in text
    )
    assert "95 % interval" in text
    found = catalog.all_tables(facts_of.read(made.study))
    for name, columns in SHOWN.items():
        levels = {level for column in columns for level in found[name][column]} - {""}
        old = name in ("layers", "swaps", "learning_curve")  # real swaps and the curve came later
        assert levels == ({"95 %", "90 %"} if name == "layers" else {"90 %"} if old else {"95 %"}), name
    assert "the surrogate itself" not in text and "additive scores" in text, "the program alone was searched"
    facts = facts_of.read(made.study)
    table = quality.psnr_vs_bits(facts)
    assert table[table.label == "winner"].value.tolist() == [made.psnr(made.winner)]
    design = table[table.group == "design"]
    for r in design.itertuples():  # PSNR: more is better
        beaten = ((design.bits <= r.bits) & (design.value >= r.value)).sum() > 1
        assert r.frontier == (not beaten)
    assert (table[table.group == "uniform"].value < 100).all() and list(
        table[table.group == "full precision"].value
    ) == [100.0]
    drawn = ET.parse(page.parent / "figures/psnr_vs_bits.svg").getroot().iter()
    words = {"".join(e.itertext()).strip() for e in drawn if e.tag.endswith("text")}
    assert "PSNR to full precision, dB" in words and "full precision" not in words and "100" not in words
    rival = comparison.comparison(facts).query("which == 'against'").iloc[0]
    assert rival.scheme == "rival.json" and rival.psnr == pytest.approx(made.psnr(made.uniform["usq3"]))
    assert ranking.layers(facts).psnr_effect.tolist() == pytest.approx(
        (ranking.layers(facts).effect / 8).tolist()
    )


SHOWN = {  # tables with intervals, and the columns that say their level
    "front": ["level"],
    "frontiers": ["level"],
    "comparison": ["level"],
    "layers": ["level", "real_level"],
    "operators": ["level"],
    "blocks": ["level"],
    "pairs": ["level"],
    "scheme_scores": ["interval"],
    "learning_curve": ["level"],
    "swaps": ["level"],
}
RECKONED = ("comparison",)  # from the measurements, when the report is made


def test_an_older_study_opens_with_the_levels_it_was_made_with(built: tuple[Study, Path]) -> None:
    study, page = built
    facts = facts_of.read(study)
    assert (facts.effect_level, facts.swap_level) == ("90 %", "90 %")
    assert facts.contexts.startswith("random configurations")
    found = catalog.all_tables(facts)
    for name, columns in SHOWN.items():
        for column in columns:
            shown = "95 %" if name in RECKONED else "90 %"
            assert set(found[name][column]) - {""} == {shown}, (name, column)
    both = found["quality_vs_bits"].groupby("group")["level"].unique()
    assert both["found"].tolist() == ["90 %"] and "95 %" in both["uniform"]
    assert "95 % intervals (found: 90 %)" in page.read_text(encoding="utf-8")
    parts = [" ".join(part.split()) for part in parsed(page).text]
    text = " ".join(parts)
    assert (
        "90 % interval" in text
        and "PSNR lost, dB" not in parts
        and "good ones" not in text
        and "hierarchical" not in text
    )
    assert (
        swaps.agreement(facts).empty
        and comparison.same_quality(facts).empty
        and not (page.parent / "figures/psnr_vs_bits.svg").exists()
    )


@pytest.mark.usefixtures("svg_only")
def test_videos_have_a_figure_of_temporal_consistency(
    newer: tuple[Synthetic, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Synthetic(tmp_path / "S.db", videos=True).measure().explain().validate().search().judged()
    page = report(made.study, tmp_path / "report")
    table = quality.temporal_vs_bits(facts_of.read(made.study))
    assert table[table.label == "winner"].value.tolist() == [made.psnr(made.winner) - 3]
    drawn = ET.parse(page.parent / "figures/temporal_vs_bits.svg").getroot().iter()
    words = {"".join(e.itertext()).strip() for e in drawn if e.tag.endswith("text")}
    assert "temporal PSNR to full precision, dB" in words and "full precision" not in words
    assert "temporal PSNR 3" in page.read_text(encoding="utf-8")  # of the pictures
    monkeypatch.setattr(findings, "console", shown := Console(width=200, file=io.StringIO()))
    findings.show_front(facts_of.read(made.study).front)
    assert isinstance(shown.file, io.StringIO) and "temporal PSNR" in shown.file.getvalue()
    images, page = newer
    assert quality.temporal_vs_bits(facts_of.read(images.study)).empty
    assert not (page.parent / "figures/temporal_vs_bits.svg").exists()


@pytest.mark.usefixtures("svg_only")
def test_a_front_without_a_uniform_as_large_says_so(newer: tuple[Synthetic, Path], tmp_path: Path) -> None:
    made = Synthetic(tmp_path / "S.db", layers=3, samples=4).whole().judged()
    front = made.study.get("front")
    kept = {k: front["comparison"][k] for k in ("same_quality", "judged", "against")}
    made.study.set(front={**front, "comparison": kept})
    text = " ".join(parsed(report(made.study, tmp_path / "out")).text)
    assert "No uniform configuration of the space is as large as the winner" in text


STAGES = [
    ("", ["measure", "samples 120"]),
    ("measure", ["explain", "validate", "search"]),
    ("measure explain", ["validate", "search"]),
    ("measure search", ["explain", "validate"]),
]


def test_labels_of_points_meet_no_line_and_no_other_label() -> None:
    with style.use():
        canvas, axes = style.canvas(3.0, 2.0)
        axes.plot([0, 1, 2], [0, 1, 0.5], marker="o")
        axes.plot([0, 2], [1, 0.4], marker="s")
        points = [(0, 0, "low"), (1, 1, "high"), (2, 0.5, "first"), (2, 0.4, "second"), (0, 1, "left")]
        drawing.label_points(axes, points)
        canvas.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [name for _, _, name in points]
    assert all(not box.count_contains(drawing._drawn(axes)) for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    frame = axes.get_window_extent()
    assert all(frame.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_a_uniform_configuration_of_many_formats_has_a_plain_name() -> None:
    assert [uniform_name(name) for name in ("usq3h", "aq+usq", "aq", "usq", "mixed")] == [
        "usq3h",
        "additive codebooks",
        "additive codebooks",
        "usq",
        "mixed",
    ]


@pytest.mark.usefixtures("svg_only")
@pytest.mark.parametrize(("stages", "commands"), STAGES)
def test_what_is_missing_is_named_with_its_command(tmp_path: Path, stages: str, commands: list[str]) -> None:
    made = Synthetic(tmp_path / "S.db", layers=9, samples=12)
    for stage in stages.split():
        getattr(made, stage)()
    text = " ".join(parsed(report(made.study, tmp_path / "out")).text)
    for command in commands:
        assert command in text
    for verb in {"explain", "validate", "search"} - set(commands) if stages else set():
        assert f"aquabit {verb} S.db" not in text


@pytest.mark.usefixtures("svg_only")
def test_empty_study_and_failures_only(tmp_path: Path) -> None:
    text = " ".join(parsed(report(Study(tmp_path / "E.db"), tmp_path / "empty")).text)
    assert "aquabit measure MODEL --study E.db" in text
    made = Synthetic(tmp_path / "F.db", layers=1, samples=1)
    config = made.space.uniform("usq2")
    made.study.record(
        config,
        Measurement(config.digest, PROTOCOL.digest, {}, 0.5, {}, "failed", "NaN"),
        "sample",
        {"bits": 2.0, "bytes": 1, "bops": 1},
    )
    assert "NaN" in " ".join(parsed(report(made.study, tmp_path / "failed")).text)


@pytest.mark.usefixtures("svg_only")
def test_odd_facts(tmp_path: Path) -> None:
    """One layer, one scheme, undefined numbers, a higher-is-better objective, a front that was never
    measured, a damaged thumbnail."""
    made = Synthetic(tmp_path / "S.db", layers=1, samples=3).measure()
    row = {
        "name": made.space.layers[0],
        "operator": "adaln",
        "block": "b",
        "effect": None,
        "low": None,
        "high": None,
        "schemes": {},
    }
    told = {
        "objective": "is",
        "direction": "max",
        "protocol": PROTOCOL.digest,
        "measurements": 3,
        "bits": None,
        "swap": "",
        "layers": [row],
        "operators": [],
        "blocks": [],
        "surrogate": {"within_budget_srcc": None},
        "scatter": [{}],
        "validation": {"rows": [{"layer": "gone", "real": 1.0}], "srcc": None},
    }
    member = {
        "bits_per_weight": 2.0,
        "bytes": 1,
        "bops": 0.0,
        "operations": None,
        "latency_ms": None,
        "predicted": {"is": 3.0},
        "measured": {"is": {"value": None, "low": None, "high": None}},
        "config": made.winner.to_dict(),
    }
    front = {"members": [member], "budget": None, "winner": None, "comparison": {"winner": {}}}
    made.study.set(sensitivity=told, front=front)
    made.study.record(
        made.winner,
        Measurement(made.winner.digest, PROTOCOL.digest, {"is": 1.0}, 1.0),
        "fresh",
        {"bits": 2, "bytes": 1, "bops": 1},
        b"no",
    )
    text = " ".join(parsed(report(made.study, tmp_path / "out")).text)
    assert "higher is better" in text
    made.study.set(sensitivity={**told, "objective": "beauty"})
    with pytest.raises(AquabitError, match="beauty"):
        report(made.study, tmp_path / "out")
    for damaged in ({"objective": "is"}, {**told, "layers": [{**row, "effect": "much"}]}):
        made.study.set(sensitivity=damaged)
        with pytest.raises(AquabitError, match="run `aquabit explain` again"):
            report(made.study, tmp_path / "out")
    made.study.set(sensitivity=None, front={**front, "members": [{**member, "config": None}]})
    with pytest.raises(AquabitError, match=r"stored front is not a front: 0\.config"):
        report(made.study, tmp_path / "out")


@pytest.mark.usefixtures("svg_only")
def test_a_shorter_study_leaves_no_old_figures(tmp_path: Path) -> None:
    made = Synthetic(tmp_path / "S.db", layers=3, samples=4).whole()
    report(made.study, tmp_path / "out")
    made.study.set(sensitivity={**made.study.get("sensitivity"), "validation": None})
    report(made.study, tmp_path / "out")
    assert not list((tmp_path / "out/figures").glob("swaps.*"))


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(AquabitError, match="could not be written"):
        report(Study(tmp_path / "S.db"), tmp_path / "out")


def test_style_changes_nothing_global_and_embeds_fonts(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with style.use():
        figure, axes = style.canvas(style.SINGLE, 2.0)
        table = pd.DataFrame({"config": ["a"], "bits": [3.0], "predicted": [1.0], "measured": [2.0]})
        figures.surrogate_scatter(table, axes, "$x_1$", 0.5)
        text = style.save(figure, tmp_path, "one")
    assert dict(matplotlib.rcParams) == before
    assert (
        b"/Subtype /CIDFontType2" in (tmp_path / "one.pdf").read_bytes()
        or b"/FontFile2" in (tmp_path / "one.pdf").read_bytes()
    )
    assert "within-budget SRCC 0.50" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1.00"),
        (12, "12.0"),
        (-0.01234, "−0.0123"),
        (9.6, "9.60"),
        (123.4, "123"),
        (1e-7, "1.00e−07"),
        (1234567, "1,234,567"),
        (float("nan"), "–"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert words.figures(value) == text


def test_the_figures_that_papers_draw_are_found_under_their_names() -> None:
    from aquabit.reports import attribution, figures

    assert attribution is figures and callable(attribution.draw_curve)
    assert all(callable(getattr(figures, name)) for name in figures.__all__)
