"""The command line: verbs on a tiny pipeline, JSON, exit codes, and one sentence for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aquabit.cli import app
from aquabit.study import Study
from tests.conftest import tiny_pipeline

SMALL = ["--images", "6", "--steps", "2", "--workers", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny pipeline, and the whole flow run on it."""
    out = tmp_path_factory.mktemp("cli")
    tiny_pipeline("dit").save_pretrained(out / "pipe")
    (out / "space.json").write_text('{"schemes": ["usq2", "usq3", "usq4", "usq8", "vq3"]}')
    run(out, "run", "pipe", "--out", "whole", "--samples", "24", "--flips", "6", "--bits", "5", "--space", "space.json", *SMALL)
    return out


def call(out: Path, *words: str, ok: bool = True):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        patch.setenv("AQUABIT_BANK", str(out / "bank"))
        result = CliRunner().invoke(app, list(words))
    if ok:
        assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def run(out: Path, *words: str) -> str:
    return str(call(out, *words).output)


def fails(out: Path, *words: str) -> str:
    """The sentence that a wrong command ends with; exit code 2 and no traceback."""
    result = call(out, *words, ok=False)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


def test_run_writes_everything_and_continues(folder) -> None:
    whole = folder / "whole"
    for name in (
        "study.db",
        "sensitivity.json",
        "front.json",
        "config.json",
        "packed/model_index.json",
        "report/index.html",
        "samples.png",
    ):
        assert (whole / name).stat().st_size > 0, name
    sensitivity = json.loads((whole / "sensitivity.json").read_text())
    assert {"objective", "direction", "protocol", "measurements", "surrogate", "layers", "validation"} <= set(sensitivity)
    assert {"within_budget_srcc", "srcc", "kendall", "ndcg10", "r2", "noise_ceiling", "baselines"} <= set(sensitivity["surrogate"])
    assert {"name", "operator", "block", "effect", "low", "high", "schemes"} <= set(sensitivity["layers"][0])
    assert sensitivity["validation"]["flips"] == 6
    front = json.loads((whole / "front.json").read_text())
    assert {"bits_per_weight", "bytes", "bops", "operations", "latency_ms", "predicted", "measured", "config"} == set(front[0])
    assert all(m["measured"]["fid"]["low"] <= m["measured"]["fid"]["value"] <= m["measured"]["fid"]["high"] for m in front)
    config = json.loads((whole / "config.json").read_text())
    assert set(config) == {"schema", "model", "fingerprint", "layers", "steps", "correction", "calibration"}
    study = Study(whole / "study.db")
    assert study.get("front")["comparison"]["blocks"] == 5
    kinds = study.measurements(failed=True).kind.value_counts()
    assert kinds["candidate"] >= 16 and kinds["flip"] >= 6
    before = study.measurements(failed=True)
    run(folder, "run", "pipe", "--out", "whole", "--samples", "24", "--flips", "6", "--bits", "5", "--space", "space.json", *SMALL)
    assert study.measurements(failed=True).equals(before), "run again, nothing is measured twice"


def test_winner_keeps_the_budget(folder) -> None:
    study = Study(folder / "whole" / "study.db")
    front = study.get("front")
    winner = next(m for m in front["members"] if m["config"] == json.loads((folder / "whole" / "config.json").read_text()))
    assert winner["bits_per_weight"] <= 5.0 and front["budget"]["bits"] == 5.0


def test_verbs_one_by_one(folder) -> None:
    s = "steps.db"
    out = run(folder, "measure", "pipe", "--study", s, "--samples", "30", "--space", "space.json", "--json", "-", *SMALL)
    assert json.loads(out)["measurements"] >= 30
    assert (
        json.loads(run(folder, "measure", "pipe", "--study", s, "--samples", "30", "--space", "space.json", "--json", "-", *SMALL))["new"]
        == 0
    )
    assert json.loads(run(folder, "status", s, "--json", "-"))["explained"] is False
    text = run(folder, "explain", s, "--bits", "5", "--top", "3")
    assert "within-budget" in text and "not checked against real swaps yet" in text
    assert (
        json.loads(run(folder, "validate", s, "--flips", "4", "--bits", "5", "--workers", "1", "--json", "-"))["validation"]["flips"] == 4
    )
    bops = str(Study(folder / s).measurements(kind="uniform").bops.max() * 0.9)
    front = json.loads(
        run(
            folder,
            "search",
            s,
            "--bits",
            "5",
            "--bops",
            bops,
            "--rounds",
            "1",
            "--per-round",
            "3",
            "--workers",
            "1",
            "--out",
            "c.json",
            "--json",
            "-",
        )
    )
    assert min(m["bits_per_weight"] for m in front) <= 5
    assert "bytes of tensors" in run(folder, "quantize", "pipe", "c.json", "--out", "packed")
    assert "4 images" in run(folder, "generate", "packed", "--images", "4", "--steps", "2", "--out", "grid.png")
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")
    run(folder, "report", s, "--out", "page")
    assert "<html" in (folder / "page" / "index.html").read_text()


def test_shards_merge_to_the_same_numbers(folder) -> None:
    options = ["--samples", "6", "--space", "space.json", *SMALL]
    run(folder, "measure", "pipe", "--study", "all.db", *options)
    for i in (1, 2):
        run(folder, "measure", "pipe", "--study", f"part{i}.db", "--shard", f"{i}/2", *options)
    run(folder, "merge", "part1.db", "part2.db", "--out", "joined.db")
    columns = ["config", "fid", "psnr"]
    whole, joined = (Study(folder / f"{n}.db").measurements()[columns].sort_values("config", ignore_index=True) for n in ("all", "joined"))
    assert whole.equals(joined)


def test_inspect_and_models(folder) -> None:
    assert len(json.loads(run(folder, "inspect", "pipe", "--json", "-"))["nodes"]) > 20
    assert "ff.up" in run(folder, "inspect", "pipe")
    assert [m["name"] for m in json.loads(run(folder, "models", "--json", "-"))["bundled"]] == ["digits-dit", "digits-unet"]


def test_bad_input_is_one_sentence(folder) -> None:
    (folder / "empty.txt").write_text("\n\n")
    (folder / "broken.db").write_bytes((folder / "whole" / "study.db").read_bytes()[:9000])
    (folder / "cut.json").write_text((folder / "whole" / "config.json").read_text()[:200])
    study = ["--study", "new.db", *SMALL]
    cases = {
        "unknown model 'digits-foo'": ["measure", "digits-foo", *study],
        "smallest|reach": ["search", "whole/study.db", "--bits", "0.5"],
        "largest|reach 2": ["search", "whole/study.db", "--bits", "17"],
        "whole/study.db is a study of": ["measure", "digits-unet", "--study", "whole/study.db", *SMALL],
        "another protocol": [
            "measure",
            "pipe",
            "--study",
            "whole/study.db",
            "--images",
            "7",
            "--steps",
            "2",
            "--workers",
            "1",
            "--space",
            "space.json",
        ],
        "there is no study": ["explain", "nothing.db"],
        "truncated|not a readable study|damaged": ["explain", "broken.db"],
        "valid JSON": ["quantize", "pipe", "cut.json", "--out", "x"],
        "scheme 'usq99' is out of range": ["explain", "whole/study.db", "--swap", "usq99:usq2"],
        "prompts file": ["measure", "pipe", "--prompts", "empty.txt", *study],
        "unknown metric 'beauty'": ["measure", "pipe", "--objective", "beauty", *study],
        "scheduler 'magic'": ["measure", "pipe", "--scheduler", "magic", *study],
        "--ray is not available yet": ["measure", "pipe", "--ray", "auto", *study],
        "--reference is not available yet": ["measure", "pipe", "--reference", ".", *study],
        "design 'sobol'": ["measure", "pipe", "--design", "sobol", *study],
        "shard '3/2'": ["measure", "pipe", "--shard", "3/2", *study],
        "--correct is not available yet": ["quantize", "pipe", "whole/config.json", "--out", "x", "--correct"],
        "is for model": ["quantize", "digits-unet", "whole/config.json", "--out", "x"],
        "formats of bench|scheme .usq99. is out of range": ["bench", "--formats", "usq99"],
        "no model_index.json": ["generate", ".", "--out", "x.png"],
        "budget latency_ms = 1e-05 is out of range": ["search", "whole/study.db", "--latency", "0.00001", "--workers", "1"],
        "comparing studies is not available yet": ["report", "whole/study.db", "whole/study.db", "--out", "x"],
    }
    import re

    for expected, words in cases.items():
        said = fails(folder, *words)
        assert re.search(expected, said), (words, said)


def test_too_few_measurements_say_how_many(folder) -> None:
    run(folder, "measure", "pipe", "--study", "few.db", "--samples", "3", "--space", "space.json", *SMALL)
    assert "at least 20" in fails(folder, "explain", "few.db")


def test_a_full_disk_while_writing_is_said(folder) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    assert "cannot be written" in fails(folder, "generate", "whole/packed", "--images", "2", "--steps", "1", "--out", "/dev/full")


def test_interrupted_work_says_how_to_continue(folder, tmp_path) -> None:
    """Ctrl-C in a fresh process: a sentence, no traceback, and a study that continues."""
    import signal
    import time

    command = [
        sys.executable,
        "-m",
        "aquabit.cli",
        "measure",
        str(folder / "pipe"),
        "--study",
        str(tmp_path / "s.db"),
        "--samples",
        "1000",
        "--space",
        str(folder / "space.json"),
        "--bank",
        str(tmp_path / "bank"),
        *SMALL,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        time.sleep(0.1)
        if (tmp_path / "s.db").exists() and len(Study(tmp_path / "s.db").measurements()) > 6:
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "nothing measured is lost" in said and "Traceback" not in said
    assert len(Study(tmp_path / "s.db").measurements()) > 6


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; import aquabit.cli; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'pandas', 'matplotlib', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
