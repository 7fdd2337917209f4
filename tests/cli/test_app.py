"""The command line: verbs on a tiny pipeline, JSON, exit codes, and one sentence for bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aquabit.cli.progress import console, plain
from aquabit.study import Study
from tests.command_line import fails, run
from tests.conftest import tiny_pipeline

SMALL = ["--images", "6", "--steps", "2", "--workers", "1"]
WHOLE = ["run", "pipe", "--out", "whole", "--samples", "24", "--flips", "6", "--bits", "5"]
WHOLE += ["--space", "space.json", *SMALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny pipeline, and the whole flow run on it."""
    out = tmp_path_factory.mktemp("cli")
    tiny_pipeline("dit").save_pretrained(out / "pipe")
    (out / "space.json").write_text('{"schemes": ["usq2", "usq3", "usq4", "usq8", "vq3"]}')
    run(out, *WHOLE)
    return out


def test_run_without_samples_searches_and_packs(folder) -> None:
    """A search needs none: what is left out is the ranking, which is said."""
    few = ["--samples", "0", "--flips", "0", "--bits", "3.5", "--space", "few.json", *SMALL]
    (folder / "few.json").write_text('{"schemes": ["usq2", "usq4"], "activations": [8]}')
    said = run(folder, "run", "pipe", "--out", "few", *few)
    assert "layers are not ranked: few/study.db has" in said.replace("\n", " ")
    made = {p.name for p in (folder / "few").iterdir()}
    assert {"front.json", "config.json", "packed", "report", "samples.png"} <= made
    assert "sensitivity.json" not in made and not (folder / "few/report/data/sensitivity.json").exists()
    kinds = set(Study(folder / "few/study.db").measurements(failed=True).kind)
    assert not kinds & {"sample", "flip"}


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
        "first.json",
        "first-config.json",
    ):
        assert (whole / name).stat().st_size > 0, name
    sensitivity = json.loads((whole / "sensitivity.json").read_text())
    assert {"objective", "direction", "protocol", "measurements", "surrogate", "layers", "validation"} <= set(
        sensitivity
    )
    assert {"within_budget_srcc", "srcc", "kendall", "ndcg10", "r2", "noise_ceiling", "baselines"} <= set(
        sensitivity["surrogate"]
    )
    assert {"name", "operator", "block", "effect", "low", "high", "schemes"} <= set(sensitivity["layers"][0])
    assert sensitivity["validation"]["flips"] == 6
    front = json.loads((whole / "front.json").read_text())
    assert {
        "bits_per_weight",
        "bytes",
        "bops",
        "operations",
        "latency_ms",
        "predicted",
        "measured",
        "config",
    } == set(front[0])
    assert all(
        m["measured"]["fid"]["low"] <= m["measured"]["fid"]["value"] <= m["measured"]["fid"]["high"]
        for m in front
    )
    config = json.loads((whole / "config.json").read_text())
    assert set(config) == {"schema", "model", "fingerprint", "layers", "steps", "correction", "calibration"}
    first = json.loads((whole / "first.json").read_text())
    assert first["formats"] == "all formats of the space" and first["bits"] <= 5
    study = Study(whole / "study.db")
    assert (
        study.get("running") is None and "This run goes on" not in (whole / "report/index.html").read_text()
    )
    assert study.get("front")["comparison"]["blocks"] == 5
    proof = study.get("front")["proof"]
    assert (
        proof["optimum_bound"] <= proof["optimum"] + 1e-9
        and proof["predicted"] == proof["optimum"]
        and proof["bound"] is None
    )
    kinds = study.measurements(failed=True).kind.value_counts()
    assert kinds["candidate"] >= 8 and kinds["flip"] >= 6
    before = study.measurements(failed=True)
    run(folder, *WHOLE)
    assert study.measurements(failed=True).equals(before), "run again, nothing is measured twice"


def test_winner_keeps_the_budget(folder) -> None:
    study = Study(folder / "whole" / "study.db")
    front = study.get("front")
    winner = next(
        m
        for m in front["members"]
        if m["config"] == json.loads((folder / "whole" / "config.json").read_text())
    )
    assert winner["bits_per_weight"] <= 5.0 and front["budget"]["bits"] == 5.0


def test_verbs_one_by_one(folder) -> None:
    s = "steps.db"
    out = run(
        folder,
        "measure",
        "pipe",
        "--study",
        s,
        "--samples",
        "30",
        "--space",
        "space.json",
        "--json",
        "-",
        *SMALL,
    )
    assert json.loads(out)["measurements"] >= 30
    assert (
        json.loads(
            run(
                folder,
                "measure",
                "pipe",
                "--study",
                s,
                "--samples",
                "30",
                "--space",
                "space.json",
                "--json",
                "-",
                *SMALL,
            )
        )["new"]
        == 0
    )
    assert json.loads(run(folder, "status", s, "--json", "-"))["explained"] is False
    text = run(folder, "explain", s, "--bits", "5", "--top", "3")
    assert "within-" in text and "95 % interval" in text and "not checked against real swaps yet" in text
    assert "ranking: predictions of the surrogate" in text and "swapped together" in text
    checked = json.loads(
        run(folder, "validate", s, "--flips", "4", "--bits", "5", "--workers", "1", "--json", "-")
    )
    assert (
        checked["validation"]["flips"] == 4
        and checked["ranking"] == "combined"
        and sum(r["n"] for r in checked["layers"]) == 4
    )
    assert {"a", "b", "interaction", "low", "high"} == set(checked["interactions"][0])
    text = run(folder, "explain", s, "--bits", "5", "--top", "3")
    assert "predictions and real swaps combined" in text and "real" in text
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
    said = run(folder, "generate", "packed", "--images", "4", "--steps", "2", "--out", "grid.png")
    assert "4 images" in said and "layers by kernel: " in said and "MB resident of" in said
    assert "layers by kernel: " in run(
        folder, "generate", "packed", "--images", "4", "--steps", "2", "--out", "grid.png", "--memory", "auto"
    )
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")
    run(folder, "report", s, "--out", "page")
    assert "<html" in (folder / "page" / "index.html").read_text()


def test_search_under_a_latency(folder, monkeypatch) -> None:
    """Latencies are made up, so that nothing hangs on how busy the machine is; tests/test_tuning.py
    measures some."""
    from aquabit.cost import Latency
    from aquabit.search import fresh_front, search
    from aquabit.search import winner as choosing

    def table(evaluator, space, progress, protocol) -> Latency:
        bits = np.array([s.bits for s in space.schemes], float)
        layers = np.broadcast_to(bits[None, :, None], (len(space.choices), len(bits), 3)).copy()
        return Latency(layers, (16, 8, 6), 10.0)

    def call_of(config) -> float:
        return 11.0 + sum(16 if str(c.weight) == "fp" else c.weight.bits for c in config.layers.values())

    monkeypatch.setattr(search, "latency_table", table)
    for module in (choosing, fresh_front):
        monkeypatch.setattr(
            module,
            "packed_latencies",
            lambda evaluator, configs, progress, protocol: [call_of(c) for c in configs],
        )
    shutil.copy(folder / "whole" / "study.db", folder / "fast.db")
    said = fails(folder, "search", "fast.db", "--latency", "1", "--workers", "1")
    low, high = (
        float(n)
        for n in re.search(
            r"latency_ms = 1 is out of range: this space can reach ([\d.]+) to ([\d.]+)", said
        ).groups()
    )
    words = ["--rounds", "1", "--workers", "1"]
    middle = str((low + high) / 2)
    front = json.loads(
        run(
            folder,
            "search",
            "fast.db",
            "--latency",
            middle,
            "--bits",
            "6",
            "--out",
            "fast.json",
            "--json",
            "-",
            *words,
        )
    )
    winner = next(m for m in front if m["config"] == json.loads((folder / "fast.json").read_text()))
    assert winner["bits_per_weight"] <= 6 and winner["latency_ms"] <= float(middle)
    assert all(m["latency_ms"] > 0 and set(m["operations"]) == {"multiply_adds", "lut_adds"} for m in front)
    monkeypatch.setattr(
        choosing, "packed_latencies", lambda evaluator, configs, progress, protocol: [1e4 for _ in configs]
    )
    assert "whole calls take 1e+04 ms or more" in fails(
        folder, "search", "fast.db", "--latency", middle, "--json", "-", *words
    )


def test_bench(folder) -> None:
    rows = json.loads(
        run(folder, "bench", "--formats", "usq4,aq2x3g4", "--shapes", "12x16@5", "--act", "16", "--json", "-")
    )["rows"]
    assert [r["format"] for r in rows] == ["usq4", "aq2x3g4"] and all(
        r["milliseconds"]["reference"] > 0 for r in rows
    )
    said = run(folder, "bench", "--formats", "usq4", "--shapes", "12x16@5", "--threads", "1")
    assert "threads 1" in said and "fp32/best" in said and "usq4" in said
    calls = json.loads(run(folder, "bench", "whole/packed", "--json", "-"))["rows"]
    assert [r["name"] for r in calls] == [
        "packed, memory=packed",
        "packed, memory=auto",
        "dense float32",
        "dense bfloat16",
    ]
    assert "layers by kernel" in run(folder, "bench", "whole/packed")


def test_shards_merge_to_the_same_numbers(folder) -> None:
    options = ["--samples", "6", "--space", "space.json", *SMALL]
    run(folder, "measure", "pipe", "--study", "all.db", *options)
    for i in (1, 2):
        run(folder, "measure", "pipe", "--study", f"part{i}.db", "--shard", f"{i}/2", *options)
    run(folder, "merge", "part1.db", "part2.db", "--out", "joined.db")
    columns = ["config", "fid", "psnr"]
    whole, joined = (
        Study(folder / f"{n}.db").measurements()[columns].sort_values("config", ignore_index=True)
        for n in ("all", "joined")
    )
    assert whole.equals(joined)
    said = json.loads(run(folder, "status", "part1.db", "part2.db", "--json", "-"))
    assert [s["shard"] for s in said["studies"]] == ["1/2", "2/2"] and said["together"]["missing"] == 0
    assert "part2.db" in run(
        folder, "status", "part1.db", "part2.db"
    ) and "joined.db: 11 measurements" in run(folder, "status", "joined.db")


def test_inspect_and_models(folder) -> None:
    assert len(json.loads(run(folder, "inspect", "pipe", "--json", "-"))["nodes"]) > 20
    assert "ff.up" in run(folder, "inspect", "pipe")
    bundled = json.loads(run(folder, "models", "--json", "-"))["bundled"]
    assert {m["name"]: m["trained_on"] for m in bundled} == {
        "digits-dit": "scikit-learn's digits",
        "digits-unet": "scikit-learn's digits",
        "emoji-dit": "Google's emoji of Emoji 16.0",
        "fashion-dit": "Fashion-MNIST",
        "fashion-unet": "Fashion-MNIST",
    }


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
        "scheme 'usq99' is out of": ["explain", "whole/study.db", "--swap", "usq99:usq2"],
        "prompts file": ["measure", "pipe", "--prompts", "empty.txt", *study],
        "unknown metric 'beauty'": ["measure", "pipe", "--objective", "beauty", *study],
        "scheduler 'magic'": ["measure", "pipe", "--scheduler", "magic", *study],
        "no Ray cluster answers at '127.0.0.1:1'": ["measure", "pipe", "--ray", "127.0.0.1:1", *study],
        "--workers 2 counts processes": ["measure", "pipe", "--ray", "auto", *study, "--workers", "2"],
        r"broken\.db is no folder": ["measure", "pipe", "--reference", "broken.db", *study],
        "features 'vgg=x' must be one of inception=FILE": ["measure", "pipe", "--features", "vgg=x", *study],
        "module 'no_such_module' of metric": ["measure", "pipe", "--metric", "no_such_module:f", *study],
        "design 'sobol'": ["measure", "pipe", "--design", "sobol", *study],
        "shard '3/2'": ["measure", "pipe", "--shard", "3/2", *study],
        r"correction 'cnc\+no' is unknown": [
            "quantize",
            "pipe",
            "whole/config.json",
            "--out",
            "x",
            "--correction",
            "cnc+no",
        ],
        "is for model": ["quantize", "digits-unet", "whole/config.json", "--out", "x"],
        "scheme 'usq99' is out of range": ["bench", "--formats", "usq99"],
        "must be OUTxIN@TOKENS": ["bench", "--shapes", "wide"],
        "changes nothing beside whole/packed": ["bench", "whole/packed", "--formats", "usq4"],
        "memory 'all' is unknown": ["generate", "whole/packed", "--out", "x.png", "--memory", "all"],
        "no model_index.json": ["generate", ".", "--out", "x.png"],
        "3 studies were given": ["report", *["whole/study.db"] * 3, "--out", "x"],
    }
    for expected, words in cases.items():
        said = fails(folder, *words)
        assert re.search(expected, said), (words, said)


def test_correction_is_an_option_of_what_measures(folder) -> None:
    few = ["--images", "4", "--steps", "2", "--workers", "1", "--samples", "1", "--space", "space.json"]
    run(folder, "measure", "pipe", "--study", "corrected.db", "--correction", "bc+cnc", *few)
    assert json.loads(run(folder, "status", "corrected.db", "--json", "-"))["correction"] == "cnc+bc"
    assert "begun with --correction cnc+bc, not none" in fails(
        folder, "measure", "pipe", "--study", "corrected.db", *few
    )
    assert "correction 'dnc' is unknown" in fails(
        folder, "measure", "pipe", "--study", "dnc.db", "--correction", "dnc", *few
    )
    assert "DDIM with eta 0 adds none" in fails(folder, "run", "pipe", "--out", "vsc", "--correction", "vsc")
    assert "measured with --correction cnc+bc; search with that" in fails(
        folder, "search", "corrected.db", "--correction", "cnc"
    )


def test_too_few_measurements_say_how_many(folder) -> None:
    run(folder, "measure", "pipe", "--study", "few.db", "--samples", "3", "--space", "space.json", *SMALL)
    assert "at least 20" in fails(folder, "explain", "few.db")


def test_a_full_disk_while_writing_is_said(folder) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    assert "could not be written" in fails(
        folder, "generate", "whole/packed", "--images", "2", "--steps", "1", "--out", "/dev/full"
    )


def test_interrupted_work_says_how_to_continue(folder, tmp_path) -> None:
    """Ctrl-C in a fresh process: a sentence, no traceback, and a study that continues."""
    import signal
    import time
    from functools import partial

    command = [
        sys.executable,
        "-m",
        "aquabit.cli.app",
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
    attended = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # what a shell starts in the background ignores Ctrl-C
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=attended
    )
    while process.poll() is None:  # however slow the machine is
        time.sleep(0.1)
        if (tmp_path / "s.db").exists() and len(Study(tmp_path / "s.db").measurements()) > 6:
            process.send_signal(signal.SIGINT)
            break
    _, said = process.communicate(timeout=300)
    assert "nothing measured is lost" in said and "Traceback" not in said
    assert len(Study(tmp_path / "s.db").measurements()) > 6


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; import aquabit.cli.app; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers',"
        " 'pandas', 'matplotlib', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_names_from_files_do_not_reach_the_terminal_as_commands(capsys: pytest.CaptureFixture[str]) -> None:
    console.print(plain("layer \x1b[31m[bold]\x07 \u202e x"), highlight=False, soft_wrap=True)
    assert capsys.readouterr().out.strip() == r"layer \x1b[31m[bold]\x07 \u202e x"


def test_inspect_lists_what_stays_dense() -> None:
    from aquabit.cli import tables
    from aquabit.cli.progress import console
    from aquabit.graph import graph_notes, trace
    from tests.test_following import DIGITS, MODELS, Ends

    for model, inputs, shown in (
        (Ends(), DIGITS, (r"spare +other +head +6x8 \(fp\) +0.00 M", "4 layers")),
        (*MODELS["conv3d"][:2], (r"then.weight +dense +Conv3d +6x4x1x2x2 \(fp\)", "1 layers")),
    ):
        graph = trace(model, inputs)
        with console.capture() as captured:
            tables.show_graph(graph)
        assert all(re.search(text, captured.get()) for text in shown), captured.get()
        assert graph_notes(graph)


def test_a_study_notes_what_stays_dense() -> None:
    from aquabit.measuring.model import open_model
    from tests.tiny_pipelines import tiny

    assert open_model(tiny("hunyuan")).notes[-1].startswith("4 layers stay fp (the model reads its weight")


def test_no_verb_works_for_what_it_cannot_write(folder, monkeypatch) -> None:
    """The sentence comes before the work whose result it is about."""
    from aquabit import packing, workflows

    def works(*_: object, **__: object) -> None:
        raise AssertionError("it has begun")

    for module, name in ((workflows, "search"), (workflows, "explained"), (packing, "generate")):
        monkeypatch.setattr(module, name, works)
    monkeypatch.setattr(packing, "quantize", works)
    monkeypatch.setattr(workflows, "coded", works)
    study, config = "whole/study.db", "whole/config.json"
    for words in (
        ("search", study, "--out", "nowhere/a.json"),
        ("search", study, "--json", "whole"),
        ("explain", study, "--json", "nowhere/a.json"),
        ("generate", "whole/packed", "--out", "nowhere/a.png"),
        ("quantize", "pipe", config, "--out", "space.json"),
        ("quantize", "pipe", config, "--out", "space.json/packed"),
        ("export", "pipe", config, "--to", "gguf", "--out", "nowhere/a.gguf"),
        ("export", "pipe", config, "--to", "sdnq", "--out", "space.json/a"),
        ("export", "pipe", config, "--to", "modelopt", "--out", "nowhere/a.json"),
    ):
        said = fails(folder, *words)
        assert "could not be written" in said, (words, said)


def test_a_recipe_replaces_a_recipe_alone(folder) -> None:
    words = ("export", "pipe", "whole/config.json", "--out")
    run(folder, *words, "recipe.json", "--to", "torchao")
    run(folder, *words, "recipe.json", "--to", "quanto")
    assert json.loads((folder / "recipe.json").read_text())["to"] == "quanto"
    (folder / "mine.json").write_text('{"schemes": ["usq4"]}')
    said = fails(folder, *words, "mine.json", "--to", "quanto")
    assert "mine.json is there already and is none of aquabit's for quanto" in " ".join(said.split())
    assert (folder / "mine.json").read_text() == '{"schemes": ["usq4"]}'


def test_no_verb_writes_over_what_it_reads(folder) -> None:
    (folder / "linked").symlink_to("pipe")
    (folder / "site").mkdir()
    (folder / "site" / "config.json").write_text("my own settings")
    (folder / "site" / "index.html").write_text("my own page")

    def kept() -> dict[str, bytes]:
        places = ("pipe", "whole", "site")
        return {str(p): p.read_bytes() for n in places for p in (folder / n).rglob("*") if p.is_file()}

    before, study, config = kept(), "whole/study.db", "whole/config.json"
    wrong = (
        ("quantize", "pipe", config, "--out", "linked"),
        ("quantize", "pipe", config, "--out", "pipe/denoiser"),
        ("quantize", "pipe", config, "--out", "."),
        ("run", "pipe", "--out", "pipe/run"),
        ("run", "whole/packed", "--out", "whole"),
        ("search", study, "--out", study),
        ("search", study, "--against", config, "--out", config),
        ("export", "pipe", config, "--to", "torchao", "--out", "whole/../" + config),
        ("export", "pipe", config, "--to", "torchao", "--out", "pipe/model_index.json"),
        ("inspect", "pipe", "--json", "pipe/model_index.json"),
        ("status", study, "--json", study),
        ("generate", "whole/packed", "--out", "whole/packed/denoiser/config.json"),
        ("report", study, "--out", "site"),
        ("run", "pipe", "--out", "site"),
    )
    for words in wrong:
        said = fails(folder, *words)
        assert "overwrit" in said, said
    assert "both are a.json" in fails(
        folder, *("export", "pipe", config, "--to", "torchao", "--out", "a.json", "--json", "a.json")
    )
    for _ in range(2):  # a picture may lie with the model, and be made again
        run(
            folder, "generate", "whole/packed", "--images", "1", "--steps", "1", "--out", "whole/packed/a.png"
        )
    (folder / "whole/packed/a.png").unlink()
    (folder / "linked").unlink()
    assert kept() == before
