"""What the benchmarks share: their command lines, the machine, studies, intervals, and the result files."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aquabit.jsonio import defined, read_json, write_json
from aquabit.kernels.backends.decode import decode_levels
from aquabit.stats import LEVEL, mean_interval, paired_difference

RESULTS = Path(__file__).parent / "results"
MODELS = ("digits-unet", "digits-dit")  # what a benchmark measures unless it is told other ones
BUNDLED = (*MODELS, "fashion-unet", "fashion-dit", "emoji-dit")
INSTRUCTIONS = "avx512vnni"  # of the processors that kernels were mostly timed on


# ---- command lines


def parser(
    doc: str | None, parts: Sequence[str] = (), folder: str | None = None, models: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """With what most benchmarks take: the parts to run and, where there is a folder for studies, ``--folder``
    and ``--models`` (no others than ``models``, if given)."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if parts:
        made.add_argument("parts", nargs="+", choices=parts)
    if folder:
        made.add_argument("--folder", type=Path, default=Path(folder))
        made.add_argument("--models", nargs="+", default=list(MODELS), choices=models)
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """What the user wrote, once the folder is there and torch runs on one thread."""
    given = made.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return given


def say(what: str, done: int, total: int) -> None:
    """A progress callback that prints every twentieth step and the last."""
    if done == total or done % 20 == 0:
        print(f"{what}: {done}/{total}", flush=True)


# ---- the machine


def machine() -> dict[str, Any]:
    """Processor, cores, vector instructions and torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return {
        "cpu": next(names, platform.processor()),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def about(of: Mapping[str, Any]) -> str:
    """A machine in words."""
    return f"{of['cpu']}, {of['cores']} cores, torch {of['torch']}"


def section_of(part: str) -> str:
    """The name of a part among results; on a processor without INSTRUCTIONS with those that it has, so that
    no machine replaces what one of another kind measured."""
    level = next(iter(decode_levels()), "reference")
    return part if level == INSTRUCTIONS else f"{part} {level}"


def sections_of(part: str, found: Mapping[str, Any]) -> dict[str, str]:
    """Names of a part among results, each with what its title says of the processor."""
    return {
        name: f" ({name.removeprefix(part).strip().upper()})" if name != part else ""
        for name in found
        if name == part or name.startswith(f"{part} ")
    }


# ---- files


def read(path: Path, missing: Any = None) -> Any:
    """The JSON of a file; ``missing`` (an empty dict) where there is none."""
    if path.exists():
        return read_json(path)
    return {} if missing is None else missing


def write(path: Path, value: Any) -> None:
    """JSON that is either the old file or the whole new one; undefined numbers are null."""
    write_json(path, defined(value))


def write_results(
    name: str,
    command: str,
    found: Mapping[str, Any],
    text: Callable[[dict[str, Any]], str],
    folder: Path = RESULTS,
) -> None:
    """NAME.json: the machine, the command that made it and what was found; NAME.md: the same in words."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**found, "machine": machine(), "command": command}
    write(folder / f"{name}.json", whole)
    (folder / f"{name}.md").write_text(text(whole))


def run_parts(
    name: str,
    parts: Mapping[str, Callable[[], Any]],
    wanted: Sequence[str],
    text: Callable[[dict[str, Any]], str],
    folder: Path = RESULTS,
) -> None:
    """Run the wanted parts ("all": every one) and write what each found beside what the others had."""
    for part in parts if "all" in wanted else wanted:
        rows = parts[part]()
        found = read(folder / f"{name}.json") | {part: rows}
        write_results(name, f"python benchmarks/{name}.py all", found, text, folder)


def replaced(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], models: Sequence[str]
) -> list[Any]:
    """The rows of other models that a result file has, and the new ones of these, in the order of BUNDLED."""
    rows = [r for r in old if r["model"] not in models] + list(new)
    return sorted(rows, key=lambda r: BUNDLED.index(r["model"]))


# ---- studies and what they measured


def open_study(
    path: Path,
    model: str,
    bank: Path | str | None = None,
    space: Mapping[str, Any] | None = None,
    workers: int = 2,
    base: Path | None = None,
    images: int | None = None,
) -> Any:
    """A session on the study of a model, made where it is missing: a copy of ``base``, if that is there, or
    one of the given space and number of images a measurement. The bank is that of the folder unless another
    is named."""
    from aquabit.measuring.session import open_session
    from aquabit.measuring.settings import MeasureOptions
    from aquabit.measuring.where import Where
    from aquabit.scheme import Protocol
    from aquabit.study import Study

    if base is not None and base.exists() and not path.exists():
        shutil.copy(base, path)
    study = Study(path)
    options = MeasureOptions(
        protocol=Protocol(images=images) if images and "protocol" not in study else None,
        space=None if "space" in study else space,
    )
    return open_session(
        model, study, options, Where(workers=workers, bank=str(bank or path.parent / "bank")), progress=say
    )


def measured_blocks(
    session: Any, configs: Mapping[str, Any], protocols: Sequence[Any], metrics: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """name -> metric -> value on each block of fresh seeds; full precision is measured there too."""
    session.measure([session.space.full_precision()], "reference", protocols=protocols)
    session.measure(list(configs.values()), "fresh", protocols=protocols)
    return block_values(session, configs, protocols, metrics)


def block_values(
    session: Any, configs: Mapping[str, Any], protocols: Sequence[Any], metrics: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """As ``measured_blocks``, of what was measured already."""
    known = values_of(session.study, metrics)
    return {
        name: {m: [known[c.digest, p.digest][m] for p in protocols] for m in metrics}
        for name, c in configs.items()
    }


def values_of(
    study: Any, metrics: Sequence[str], failed: bool = True
) -> dict[tuple[str, str], dict[str, float]]:
    """(digest of a configuration, of a protocol) -> metric -> value (infinitely bad where it failed)."""
    table = study.measurements(failed=failed)
    rows = zip(table.config, table.protocol, table[list(metrics)].to_numpy(float).tolist(), strict=True)
    return {(c, p): dict(zip(metrics, row, strict=True)) for c, p, row in rows}


# ---- numbers


def mean(values: Sequence[float], level: float = LEVEL) -> list[float]:
    """[mean, low, high] with Student's t interval over blocks."""
    return list(mean_interval(values, level))


def difference(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """[mean, low, high] of ``values - others``, paired, with a 95 % interval."""
    return list(paired_difference(values, others))


def plain(value: Any, digits: int) -> Any:
    """What JSON can say: None for undefined numbers, others to so many significant digits."""
    value = defined(value)
    if isinstance(value, dict):
        return {k: plain(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def spans(found: Iterable[float], digits: int = 2, sign: str = "") -> str:
    """[mean, low, high], or an ``Interval``, in words."""
    return "{:{f}} ({:{f}} to {:{f}})".format(*found, f=f"{sign}.{digits}f")
