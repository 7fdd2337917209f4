"""What a report shows of quantization noise and its correction: numbers, files, pictures, and hostile or
missing facts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from aquabit.reports import catalog, report, style
from aquabit.reports import facts as facts_of
from aquabit.reports.subjects import noise
from aquabit.reports.subjects.pictures import images
from aquabit.scheme import Measurement, QuantConfig
from tests.pages import PROTOCOL, Synthetic, parsed, png

BLOCKS = [PROTOCOL.block(i) for i in range(1, 6)]
STEPS = 4


def noise_rows(branches: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """As ``Statistics.table`` gives them."""
    rows = []
    for step in range(STEPS):
        for branch in range(branches):
            row: dict[str, Any] = {
                "step": step,
                "timestep": 900.0 - 100 * step,
                "branch": branch,
                "weight": [-0.5, 1.5][branch],
            }
            for measure in noise.MEASURES:
                value = float(rng.uniform(0.1, 1) * 10 ** (-step if measure == "variance" else 0))
                row |= {measure: value, f"{measure}_low": 0.8 * value, f"{measure}_high": 1.3 * value}
            rows.append(row)
    return rows


def add_noise(
    made: Synthetic, winner_is_corrected: bool = False, branches: int = 2, **changed: Any
) -> tuple[QuantConfig, QuantConfig]:
    """The winner's counterpart measured on the fresh blocks, and the fact that a search stores; (without,
    with) correction."""
    other = replace(made.winner, correction="cnc+bc")
    pair = (other, made.winner) if winner_is_corrected else (made.winner, other)
    for i, protocol in enumerate(BLOCKS):
        for config, kind, fid in (
            (made.winner, "fresh", 10.0 + i),
            (other, "correction", 9.0 + i + 0.1 * (-1) ** i),
        ):
            metrics = {"fid": fid, "psnr": 20.0 + fid, "is": float("nan")}
            m = Measurement(config.digest, protocol.digest, metrics, 0.5)
            made.study.record(
                config, m, kind, {"bits": 3.0, "bytes": 10, "bops": 1.0}, png(made.rng) if i == 0 else None
            )
    fact = {
        "correction": "cnc+bc",
        "without": pair[0].digest,
        "with": pair[1].digest,
        "protocols": [p.digest for p in BLOCKS],
        "images": 64,
        "rows": noise_rows(branches, made.rng),
    }
    made.study.set(noise={**fact, **changed})
    return pair


def searched(path: Path) -> Synthetic:
    """A study whose winner is chosen, but not yet measured on fresh blocks."""
    made = Synthetic(path, layers=4, samples=6).measure()
    made.record(made.winner, "candidate", picture=True)
    made.study.add_protocol(PROTOCOL)
    for protocol in BLOCKS:
        made.study.add_protocol(protocol)
    made.record(made.space.full_precision(), "reference", BLOCKS[0], picture=True)
    cost = made.cost(made.winner)
    member = {
        "bits_per_weight": cost.bits_per_weight,
        "bytes": cost.bytes,
        "bops": cost.bops,
        "operations": None,
        "latency_ms": None,
        "predicted": {"fid": 1.0},
        "measured": {},
        "config": made.winner.to_dict(),
    }
    made.study.set(
        front={"budget": None, "winner": made.winner.digest, "members": [member], "comparison": {}}
    )
    return made


def test_the_correction_table_is_a_paired_t_test_with_its_direction(tmp_path: Path) -> None:
    made = searched(tmp_path / "S.db")
    add_noise(made)
    table = noise.correction(facts_of.read(made.study)).set_index("metric")
    change = np.array([-0.9, -1.1, -0.9, -1.1, -0.9])
    truth = stats.ttest_1samp(change, 0).confidence_interval(0.95)
    assert list(table.index) == ["FID", "PSNR"], (
        "what is nowhere finite is left out; the objective comes first"
    )
    for metric, verdict in (("FID", "better"), ("PSNR", "worse")):  # lower is better, higher is better
        row = table.loc[metric]
        assert (
            row.difference == pytest.approx(change.mean()) == pytest.approx(row.corrected - row.not_corrected)
        )
        assert (row.low, row.high) == (
            pytest.approx(truth.low),
            pytest.approx(truth.high),
        ) and row.blocks == 5
        assert row.verdict == verdict
    made.study.set(noise={**made.study.get("noise"), "protocols": [BLOCKS[0].digest]})
    (one,) = noise.correction(facts_of.read(made.study)).query("metric == 'FID'").itertuples()
    assert one.blocks == 1 and math.isnan(one.low) and one.verdict == "undecided"


@pytest.mark.parametrize("branches", [1, 2])
def test_the_page_shows_noise_and_both_winners(tmp_path: Path, branches: int) -> None:
    made = searched(tmp_path / "S.db")
    add_noise(made, branches=branches)
    page = report(made.study, tmp_path / "out")
    reader = parsed(page)
    text = " ".join(reader.text)
    assert (
        "noise" in reader.ids
        and "Noise correction" in text
        and "found, corrected by cnc+bc" in text
        and "64 images" in text
    )
    assert (
        reader.tags.count("img") == 3
        and (page.parent / "figures/images_found-corrected-by-cnc-bc.png").is_file()
    )
    for link in reader.links:
        assert (link[1:] in reader.ids) if link.startswith("#") else (page.parent / link).is_file(), link
    for panel in noise.PANELS:
        assert {f.suffix for f in (page.parent / "figures").glob(f"{panel.name}.*")} == {
            ".pdf",
            ".svg",
            ".png",
        }
        svg = (page.parent / f"figures/{panel.name}.svg").read_text()
        assert panel.axis in svg and ("branch 2 (weight 1.5)" in svg) == (branches == 2)
    stored = pd.read_csv(page.parent / "tables/noise.csv")
    expected = pd.DataFrame(made.study.get("noise")["rows"])
    assert (
        list(stored.step) == [1, 2, 3, 4] * branches
        and list(stored.branch) == sorted([1, 2] * 4)[: 4 * branches]
    )
    for column in ("timestep", "weight", "k", "bias_low", "variance_high", "snr", "r2", "kurtosis"):
        assert stored[column].tolist() == pytest.approx(
            expected.sort_values(["branch", "step"])[column].tolist()
        )
    assert (page.parent / "tables/correction.tex").is_file()


def test_a_corrected_winner_is_shown_beside_itself_without(tmp_path: Path) -> None:
    made = searched(tmp_path / "S.db")
    pair = add_noise(made, winner_is_corrected=True)
    facts = facts_of.read(made.study)
    folder = tmp_path / "figures"
    folder.mkdir()
    assert [g.title for g in images(facts, folder)] == [
        "full precision",
        "found, not corrected",
        "found, corrected by cnc+bc",
    ]
    assert (folder / "images_found-not-corrected.png").read_bytes() == facts.thumbnails[
        pair[0].digest, BLOCKS[0].digest
    ]
    assert noise.correction(facts).set_index("metric").loc["FID"].verdict == "worse"


@pytest.mark.usefixtures("svg_only")
def test_studies_without_the_fact_have_no_section_and_keep_no_old_figures(tmp_path: Path) -> None:
    made = searched(tmp_path / "S.db")
    add_noise(made)
    report(made.study, tmp_path / "out")
    made.study.set(noise={})
    page = report(made.study, tmp_path / "out")
    reader = parsed(page)
    assert "noise" not in reader.ids and "Noise correction" not in " ".join(reader.text)
    assert not [link for link in reader.links if "noise" in link or "correction" in link]
    assert not list((page.parent / "figures").glob("noise_*"))
    assert catalog.all_tables(facts_of.read(made.study))["noise"].empty


@pytest.mark.usefixtures("svg_only")
def test_hostile_undefined_and_missing_facts(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    made = searched(tmp_path / "S.db")
    rows = [
        {"step": 0, "branch": 0, "weight": None, "k": 0.1, "variance": 0.0, "snr": None},
        {"k": 1.0},
        {"step": None, "branch": 0},
    ]
    add_noise(made, correction=evil, reason=f"k is too small {evil}", rows=rows, images=None)
    page = report(made.study, tmp_path / "out")
    reader = parsed(page)
    assert reader.tags.count("img") == 3 and not reader.handlers
    text = " ".join(reader.text)
    assert f"was not measured: k is too small {evil}" in text and f"found, corrected by {evil}" in text
    assert len(pd.read_csv(page.parent / "tables/noise.csv")) == 1, "rows that name no step are left out"
    made.study.set(noise={"correction": "cnc+bc", "rows": []})
    assert "Noise correction" in " ".join(parsed(report(made.study, tmp_path / "out")).text)


def test_a_variance_over_decades_takes_a_logarithmic_axis(tmp_path: Path) -> None:
    table = pd.DataFrame(noise_rows(1, np.random.default_rng(0)))
    panels = {p.measure: p for p in noise.PANELS}
    with style.use():
        for measure, scale in (("variance", "log"), ("k", "linear"), ("snr", "linear")):
            _, axes = style.canvas(style.SINGLE, 1.9)
            noise.draw_noise(table.assign(snr=3.0, snr_low=2.0, snr_high=4.0), axes, panels[measure])
            assert axes.get_yscale() == scale
            low, high = axes.get_ylim()
            values = table if measure != "snr" else pd.DataFrame({"snr_low": [2.0], "snr_high": [4.0]})
            assert low < values[f"{measure}_low"].min() and high > values[f"{measure}_high"].max(), (
                "the bands are whole"
            )
            (line,) = axes.lines[:1]
            assert len(line.get_xdata()) == STEPS
