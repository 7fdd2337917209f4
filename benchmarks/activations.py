"""What rounding activations costs, by kind: python benchmarks/activations.py all [--folder DIR]
[--models ...]

Every quantized layer of digits-dit and digits-unet takes one kind of activations: so many bits between the
smallest and the largest value (a8, a6), symmetric int8 (i8) or float8 e4m3 (f8), with weights as they are and
at usq4h. PSNR to the images of full precision on five blocks of 128 fresh seeds, 10 steps; differences are
paired. Kinds of bits round Q, K, V and the softmax's output as well, which i8 and f8 leave alone as other
programs do: "inputs alone" is a8 without those. Tables go to benchmarks/results/activations.json and
activations.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import (
    RESULTS,
    about,
    difference,
    mean,
    parsed,
    parser,
    plain,
    read,
    replaced,
    run_parts,
    spans,
)

WEIGHTS = ("fp", "usq4h")
ACTIVATIONS: tuple[Any, ...] = (16, 8, "i8", "f8", 6)
BLOCKS = (41, 42, 43, 44, 45)  # of fresh seeds
IMAGES = 128
ALONE = "a8, inputs alone"


@contextmanager
def inputs_alone() -> Iterator[None]:
    """Q, K, V and the softmax's output as they are, whatever the layers' inputs are rounded to."""
    with (
        patch("aquabit.quant.step_switch.output_rounding", lambda _: 16),
        patch("aquabit.quant.attention.output_rounding", lambda _: 16),
    ):
        yield


def kinds(folder: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    from aquabit.measuring.evaluator import Evaluator
    from aquabit.pipelines import load, trace
    from aquabit.quality.paired import mse, psnr_from_mse
    from aquabit.quant.bank import Bank
    from aquabit.quant.model import fingerprint
    from aquabit.scheme import Protocol, QuantConfig, act_text
    from aquabit.space import make_space

    rows = []
    for model in models:
        pipe = load(model)
        graph, own = trace(pipe), fingerprint(pipe.denoiser)
        here = Evaluator(pipe, graph, Bank(folder / "bank"), own)
        space = make_space(graph, own, schemes=WEIGHTS, activations=ACTIVATIONS)
        blocks = [replace(Protocol(images=IMAGES, steps=10).block(b), images=IMAGES) for b in BLOCKS]
        full = [here.generate(space.full_precision(), protocol) for protocol in blocks]

        def values(
            config: QuantConfig, here: Any = here, blocks: Any = blocks, full: Any = full
        ) -> list[float]:
            """Mean PSNR to the images of full precision in each block."""
            made = (here.generate(config, protocol) for protocol in blocks)
            return [float(psnr_from_mse(mse(a, b)).mean()) for a, b in zip(made, full, strict=True)]

        for weights in WEIGHTS:
            acts = [a for a in ACTIVATIONS if (weights, a) != ("fp", 16)]
            found = {act_text(a): values(space.uniform(weights, a)) for a in acts}
            with inputs_alone():
                found[ALONE] = values(space.uniform(weights, 8))
            for name, own_values in found.items():
                row = {"model": model, "weights": weights, "activations": name, "psnr": mean(own_values)}
                row["blocks"] = own_values
                row["to_a8"] = None if name == "a8" else difference(own_values, found["a8"])
                row["to_alone"] = difference(own_values, found[ALONE]) if name in ("i8", "f8") else None
                print(model, weights, name, spans(row["psnr"]), flush=True)
                rows.append(plain(row, 6))
    return replaced(read(RESULTS / "activations.json", {"kinds": []}).get("kinds", []), rows, models)


def markdown(found: Mapping[str, Any]) -> str:
    lines = [
        "# Activations by kind",
        "",
        f"`{found['command']}` on {about(found['machine'])}. One kind for all quantized layers; five blocks"
        f" of {IMAGES} fresh seeds, 10 steps; PSNR to the images of full precision; 95 % intervals;"
        " differences are paired. a8 and a6 round Q, K, V and the softmax's output as well, which i8 and f8"
        ' leave alone: "inputs alone" is a8 without those.',
        "",
        "| model | weights | activations | PSNR [dB] | over a8 | over a8, inputs alone |",
        "|---|---|---|---|---|---|",
    ]
    for r in found["kinds"]:
        apart = [spans(r[k], 1, "+") if r[k] else "" for k in ("to_a8", "to_alone")]
        cells = [f"`{r['model']}`", r["weights"], r["activations"], spans(r["psnr"], 1), *apart]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    given = parsed(parser(__doc__, ["kinds", "all"], "build/activations"))
    run_parts("activations", {"kinds": lambda: kinds(given.folder, given.models)}, given.parts, markdown)


if __name__ == "__main__":
    main()
