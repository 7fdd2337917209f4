"""What benchmarks/kernels.py computes besides taking times: pairs, ratios, errors, the work of a format,
the figures and their tables."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import common, kernel_groups
from benchmarks import kernel_denoiser_peers as denoiser_peers
from benchmarks import kernel_tables as tables
from benchmarks.kernel_roofline import Machine, bound, work
from benchmarks.kernel_timing import (
    DENSE,
    Layer,
    contenders,
    dense_runs,
    errors,
    expected,
    over_best,
    paired,
    ratio,
)

UNIT = Machine(
    1,
    {"L1": 1.0, "L2": 2.0},
    {"float32": 4e-3, "bfloat16": 2e-3, "int16": 2e-3, "int8": 1e-3},
    1.0,
    1e-6,
    0.5,
)


def test_every_run_is_taken_once_a_round_in_changing_order() -> None:
    seen: list[str] = []
    times = paired({name: lambda name=name: seen.append(name) for name in "abc"}, 0.0, (6, 9))
    assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(rounds) == 7 and all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1


def test_ratios_are_within_rounds() -> None:
    assert ratio([2.0, 20.0, 6.0], [1.0, 10.0, 1.0]) == {"median": 2.0, "low": 2.0, "high": 4.0}
    assert over_best([[9.0, 9.0], [4.0, 6.0]], [2.0, 2.0])["median"] == 2.5  # of the faster of two


def test_errors_are_relative_to_the_largest_and_to_the_norm() -> None:
    found = errors(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert found == pytest.approx({"error": 0.125, "error_norm": 0.1})


@pytest.mark.parametrize(
    ("scheme", "shape"), [("aq2x4g8", (24, 32)), ("usq4", (24, 32)), ("aq1x4k", (8, 5, 3, 3))]
)
def test_kernels_of_a_case_compute_what_they_are_compared_with(scheme: str, shape: tuple[int, ...]) -> None:
    layer = Layer(scheme, shape)
    x, bias = torch.randn(2, shape[1], *([6, 6] if len(shape) == 4 else [])), torch.randn(shape[0])
    for name, run in contenders(layer, x, bias).items():
        act, limit = 8 if name.endswith("a8") else 16, 1e-6 if "exact" in name else 3e-3
        assert errors(run(), expected(layer, x, bias, act))["error"] < limit, name
    runs, which = dense_runs(x, layer.decoded, bias, layer.geometry)
    assert set(which) == set(DENSE) and sorted(n for names in which.values() for n in names) == sorted(runs)
    for name, run in runs.items():
        assert errors(run(), expected(layer, x, bias, 16))["error"] < (
            1e-5 if name.startswith("float32") else 3e-2
        ), name


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 2, 1), (3, 1, 4), (1, 2, 2)])
def test_convolutions_of_every_kind(kernel: int, stride: int, groups: int) -> None:
    layer = Layer("usq4", (8, 12 // groups, kernel, kernel), stride=stride, groups=groups)
    x, bias = torch.randn(1, 12, 7, 7), torch.randn(8)
    for name, run in contenders(layer, x, bias).items():
        act, limit = 8 if name.endswith("a8") else 16, 1e-6 if "exact" in name else 3e-3
        assert errors(run(), expected(layer, x, bias, act))["error"] < limit, name
    for name, run in dense_runs(x, layer.decoded, bias, layer.geometry)[0].items():
        assert errors(run(), expected(layer, x, bias, 16))["error"] < 3e-2, name


def test_work_of_formats_by_hand() -> None:
    """A load serves 32 columns (exact: 16); bytes of two 4-bit codes are one load in 256 sums of 16 and
    16."""
    plain = work("aq2x6g8", (100, 64), 64)
    assert (plain.loads, plain.table_multiply_adds, plain.table_stores) == (
        100 * 8 * 2 * 2,
        2 * 64 * 64 * 64,
        2 * 8 * 64 * 2,
    )
    assert work("aq2x6g8", (100, 64), 64, "exact").loads == 2 * plain.loads
    pairs = work("aq4x4g8", (100, 64), 32)
    assert (pairs.loads, pairs.table_multiply_adds, pairs.table_stores) == (
        100 * 16,
        4 * 16 * 64 * 32,
        16 * 256,
    )
    fused = work("usq2", (100, 64), 32)  # four codes a byte, tables of two halves of 16 pairs
    assert (fused.loads, fused.table_multiply_adds, fused.code_bytes) == (
        100 * 16,
        16 * 2 * 16 * 2 * 32,
        1600,
    )
    shared, slices = work("aq1x8g8", (100, 64, 3, 3), 32), work("aq1x8k", (100, 64, 3, 3), 32)
    assert (shared.loads, shared.table_multiply_adds) == (
        100 * 72,
        8 * 256 * 8 * 32,
    )  # nine taps share a group's table
    assert (slices.loads, slices.table_multiply_adds) == (100 * 64, 64 * 256 * 9 * 32)


def test_bounds_take_the_rates_that_apply() -> None:
    w, seconds = bound("lut fast", "aq2x6g8", (100, 64), 64, UNIT)
    assert seconds == w.loads * 1.0 + max(w.table_multiply_adds * 2e-3, w.table_stores * 1.0)
    assert (
        bound("lut fast", "aq1x8g8", (100, 64), 64, UNIT)[1] > 100 * 8 * 2 * 2.0
    )  # large tables come from the second cache
    assert bound("decode a8", "usq4", (100, 64), 64, UNIT)[1] == pytest.approx(100 * 64 * 64 * 1e-3)
    assert bound("decode a8", "vq4", (100, 64), 64, UNIT)[1] == pytest.approx(100 * 64 * 64 * 2e-3)
    two = Machine(2, UNIT.load, UNIT.multiply_add, UNIT.store, UNIT.read, UNIT.scalar)
    assert bound("decode a8", "usq4", (100, 64), 64, two)[1] == pytest.approx(100 * 64 * 64 * 1e-3 / 2)


def _row(kernel: str, scheme: str | None, over: float, **facts: Any) -> dict[str, Any]:
    value = {"median": over, "low": over - 0.1, "high": over + 0.1}
    own = {
        "shape": "1152 -> 1152",
        "tokens": 256,
        "threads": 1,
        "kernel": kernel,
        "format": scheme,
        "bits": 2.0,
        "ms": 1 / over,
        "rounds": 4,
    }
    return own | {"over_float32": value, "over_bfloat16": value, "error": 1e-4, "error_norm": 1e-4} | facts


def test_a_figure_is_the_worst_case_of_the_best_kernel() -> None:
    rows = [
        _row("float32", None, 1.0),
        _row("lut fast", "aq2x6g8", 3.5),
        _row("decode a16", "aq2x6g8", 2.0),
        _row("lut fast", "aq2x6g8", 2.5, tokens=1024),
        _row("decode a8", "aq2x6g8", 4.0, tokens=1024),
        _row("lut fast", "aq2x6g8", 0.5, tokens=1),
    ]  # one token is no case of it
    found = {f["claim"]: f for f in tables.figures({"linear": {"rows": rows}})}
    as_they_are = found["aq2x6g8 over float32, out 1152, activations as they are"]
    assert (as_they_are["reached"], as_they_are["met"], as_they_are["where"]) == (
        2.5,
        False,
        "aq2x6g8, lut fast, 1152 -> 1152, 1024 tokens, 1 thread",
    )
    assert found["aq2x6g8 over float32, out 1152, or at 8 bits"]["reached"] == 3.5
    assert not any("4608" in claim for claim in found)  # nothing was measured there


def test_attention_has_its_figures_and_tables() -> None:
    def row(tokens: int, kernel: str, over: float, rounded: bool = True, **facts: object) -> dict[str, Any]:
        spread = {"over_torch_form": {"median": over, "low": over, "high": over}, "gmac_s": 60.0}
        named = _row(kernel, "rounded" if rounded else None, over, tokens=tokens)
        return named | {"shape": "8 heads of 64", "keys": tokens} | spread | facts

    rows = [
        row(1024, "float32", 2.5),
        row(1024, "float32", 1.0, rounded=False),
        row(4096, "float32", 1.4, threads=2),
        row(256, "float32", 0.5),
        row(1024, "bfloat16", 3.0),
        row(16, "float32", 0.9, shape="6 heads of 32, 16 samples"),
    ]
    found = {f["claim"]: f for f in tables.figures({"attention": {"rows": rows}})}
    assert [(f["reached"], f["met"]) for f in found.values()] == [(1.4, False), (3.0, True), (0.9, False)]
    assert "4096 tokens, 2 threads" in found["attention over float32, 1,024 and 4,096 tokens"]["where"]
    text = tables.attention_section(rows)
    assert "### 8 heads of 64, 2 threads" in text and "| 4,096 | rounded, float32 | 0.714 | 60 |" in text
    assert "| 1,024 | torch, not rounded, float32 |" in text


def test_groups_have_their_figures_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_groups, "SHAPES", {"8 -> 8": (8, 64, ("mxfp4", "q5_0"))})
    monkeypatch.setattr(kernel_groups, "SHORTEST", 0.0)
    rows = kernel_groups.groups(lambda *_: None, quick=True)
    assert {r["format"] for r in rows} == {"usq4", "usq5", "mxfp4", "q5_0"} and len(rows) == 4 * 2 * 3
    assert all(r["error"] < (1e-6 if r["kernel"] != "decode a16" else 1e-3) for r in rows)
    assert next(r["bits"] for r in rows if r["format"] == "mxfp4") == 4.25
    for row in rows:
        if "over_uniform" in row:
            middle = 0.5 if (row["format"], row["kernel"]) == ("mxfp4", "decode i8") else 1.0
            row["over_uniform"] = {"median": middle, "low": middle, "high": middle}
    found = {f["claim"]: f for f in tables.figures({"groups": {"rows": rows}})}
    claim = "scales of groups over usq of their bits, 8 -> 8, "
    assert found[claim + "a8"]["met"] and not found[claim + "i8"]["met"]
    assert found[claim + "i8"]["where"].startswith("mxfp4")
    text = tables.groups_section(rows)
    assert text.count("###") == 2 and text.count("| mxfp4 | 4.25 |") == 2 and "0.50 (0.50 to 0.50)" in text


def test_instructions_that_a_case_has_not_are_left_empty() -> None:
    over = {"median": 2.0, "low": 1.5, "high": 2.5}
    rows = [
        {"case": c, "scheme": "usq4", "level": n, "ms": 0.5, "rounds": 7, "over_avx2": over}
        for c, n in (("a layer", "avx512vnni"), ("a layer", "avx2"), ("attention", "avx2"))
    ]
    head, _, layer, attention = tables.levels_section(rows).splitlines()[:4]
    assert "avx512vnni, ms" in head and "avx2 over avx2" not in head
    assert layer == "| a layer | usq4 | 0.500 | 0.500 | 2.00 (1.50 to 2.50) | 7 |"
    assert attention == "| attention | usq4 |  | 0.500 |  | 7 |"


def test_which_formats_figures_speak_of() -> None:
    assert [
        s for s in ("aq2x8g8", "aq4x4g8", "usq2", "aq2x6g8", "vq3") if tables.two_bits({"format": s})
    ] == ["aq2x8g8", "aq4x4g8", "usq2"]
    assert [s for s in ("aq1x8k", "aq2x6k", "aq4x4k", "aq4x4g8", "usq1") if tables.small(s)] == [
        "aq2x6k",
        "aq4x4k",
    ]


def test_markdown_holds_every_part_that_was_measured() -> None:
    made = {
        "command": "python benchmarks/kernels.py linear",
        "seconds": 3.0,
        "load": 0.1,
        "machine": {"cpu": "some", "level": "AVX2", "torch": "2"},
    }
    text = tables.markdown(
        {"linear": {**made, "rows": [_row("float32", None, 1.0), _row("lut fast", "usq2", 3.0)]}}
    )
    assert "| usq2 | 2.00 | 0.333 |" in text and "### 1152 -> 1152, 256 tokens, 1 thread" in text
    assert "Whole denoisers" not in text and tables.markdown({}).startswith("# Kernels")


def test_processors_of_other_instructions_have_sections_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*levels: str) -> str:
        monkeypatch.setattr(common, "decode_levels", lambda: list(levels))
        return common.section_of("linear")

    names = [of("avx512vnni", "avx2"), of("avx2", "baseline"), of()]
    assert names == ["linear", "linear avx2", "linear reference"]
    made = {"command": "x", "seconds": 3.0, "load": 0.1}
    found = {
        name: {
            **made,
            "machine": {"cpu": name, "level": "", "torch": "2"},
            "rows": [_row("float32", None, 1.0)],
        }
        for name in reversed(names)
    }
    text = tables.markdown(found | {"linear2": found["linear"]})
    titles = [line for line in text.splitlines() if line.startswith("## Linear")]
    plain = "## Linear layers of DiT-XL/2"
    assert sorted(titles) == [plain, f"{plain} (AVX2)", f"{plain} (REFERENCE)"]


HELPER = """
import sys
sys.stderr.write("loading\\n")
if "--form=none" in " ".join(sys.argv).replace("--form ", "--form="):
    raise ImportError("no such program")
print('{"quantized": "all"}', flush=True)
for _ in sys.stdin:
    print(flush=True)
"""


def test_other_programs_are_called_in_their_own_process_or_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    monkeypatch.setattr(denoiser_peers, "HELPER", tmp_path / "helper.py")
    programs = (("torchao", "none"), ("torchao", "float32"))
    with ExitStack() as running:
        started = denoiser_peers.started(
            running, Path(sys.executable), tmp_path, programs, 1, lambda *_: None
        )
        found = dict(started)
        assert list(found) == ["torchao float32"] and found["torchao float32"].about == {"quantized": "all"}
        assert paired(found, 0.0, (2, 2))["torchao float32"][1] > 0
        process = found["torchao float32"].process
    assert process.poll() is not None  # ended with the rounds
    assert "torchao none is skipped: ImportError: no such program" in capsys.readouterr().out


def test_other_programs_have_figures_and_a_table() -> None:
    def row(variant: str, threads: int, times: float, **facts: object) -> dict[str, Any]:
        spread = {"median": times, "low": times, "high": times}
        slower = {f"slower_than_{bits}": spread for bits in (2, 4, 8)}
        own = {"model": "a U-Net", "threads": threads, "variant": variant, "ms": 1000 * times, "rounds": 3}
        return own | slower | facts

    rows = [row("usq4 a8", 2, 1.0), row("stable-diffusion.cpp q4_0", 2, 1.4), row("torchao float32", 1, 0.97)]
    rows.append(row("stable-diffusion.cpp q4_0", 1, 3.0, quantized="Linear", versions={"it": "0.4"}))
    found = {f["claim"]: f for f in tables.figures({"denoiser_peers": {"rows": rows}})}
    slow = found["whole denoisers, 4 bits over stable-diffusion.cpp q4_0"]
    assert (slow["reached"], slow["met"]) == (1.4, False)
    assert found["whole denoisers, 8 bits over torchao float32"]["met"]
    assert not any("bfloat16" in claim for claim in found)
    text = tables.denoiser_peers_section(rows)
    assert "| stable-diffusion.cpp q4_0 | Linear | 3000 | 3.00 (3.00 to 3.00) |" in text and "it 0.4." in text


def test_cases_of_other_programs_are_chosen_by_model_and_threads() -> None:
    every = denoiser_peers.cases()
    assert len(every) > len(denoiser_peers.cases("SD 1.5")) > 1
    assert {count for _, count in denoiser_peers.cases(", 1 thread")} == {1}
    assert denoiser_peers.cases("nothing") == []
