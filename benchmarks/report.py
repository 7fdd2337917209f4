"""How long a report of a large study takes to build, how large its page is, and how fast a browser shows and
sorts it:

python benchmarks/report.py [--layers 800] [--samples 1000]

The study is made up: a chain of linear layers with ten schemes each, random configurations, every fact that a
page can show. Times in a browser are those of a headless Chromium, where there is one: from the start of the
navigation to the first contentful paint and to the end of loading (the table of layers is then built), and of
one click on a column's head until the next frame.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, about, parser, write_results
from tests.browser import chromium, opened
from tests.pages import Synthetic

SCHEMES = ("usq2", "usq3", "usq4", "usq8", "vq2", "vq3", "vq4", "vq2c", "vq3c", "vq4c")
CLICK = (
    "(async () => { const head = document.querySelector('th[data-key={key}] button'); const start ="
    " performance.now(); head.click(); await new Promise((done) => requestAnimationFrame(() =>"
    " setTimeout(done))); return performance.now() - start; })()"
)
PAINTED = (
    "(() => { const paint = performance.getEntriesByName('first-contentful-paint')[0], n ="
    " performance.getEntriesByType('navigation')[0]; return [paint ? paint.startTime : null, n.loadEventEnd];"
    " })()"
)


class Large(Synthetic):
    """Searched by a threshold on the damage, which is quick."""

    def greedy(self, bits: float) -> Any:
        config, order = self.space.uniform("usq2"), np.argsort(-self.damage)
        layers = {self.space.layers[i]: "vq4" for i in order[: int(len(order) * (bits - 2.2) / 2)]}
        for name, scheme in layers.items():
            config.layers[name] = config.with_layer(name, scheme).layers[name]  # type: ignore[index]
        return config

    def features(self) -> Large:
        self.study.add_features(
            {
                (name, scheme): {
                    "error": float(d * 4.0**-i),
                    "output": float(d * 4.0**-i),
                    "damage": float(0.1 * d * 4.0**-i),
                }
                for name, d in zip(self.space.layers, self.damage, strict=True)
                for i, scheme in enumerate(SCHEMES)
            }
        )
        rows = self.study.get("sensitivity")
        for row in rows["layers"]:
            row["schemes"] = {s: row["effect"] * 0.5**i for i, s in enumerate(SCHEMES)}
            row["shap_schemes"] = {s: row["effect"] * 0.4**i for i, s in enumerate(SCHEMES)}
        self.study.set(sensitivity=rows)
        return self


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=800)
    arguments.add_argument("--samples", type=int, default=1000)
    options = arguments.parse_args()
    from aquabit.reports import report

    with tempfile.TemporaryDirectory() as folder:
        made = Large(Path(folder) / "S.db", options.layers, options.samples)
        made.whole().features()
        start, cpu = time.perf_counter(), time.process_time()
        page = report(made.study, Path(folder) / "out")
        row: dict[str, Any] = {
            "layers": options.layers,
            "schemes": len(SCHEMES),
            "measurements": len(made.study.measurements()),
            "build_s": time.perf_counter() - start,
            "build_cpu_s": time.process_time() - cpu,
            "page_bytes": page.stat().st_size,
            "load_average": os.getloadavg()[0],
        }
        if chromium():
            row |= in_browser(page, Path(folder))
    command = f"python {' '.join(sys.argv)}"
    write_results("report", command, {"rows": [row]}, markdown)
    print((RESULTS / "report.md").read_text())


def markdown(found: dict[str, Any]) -> str:
    row = found["rows"][0]
    lines = [
        "# A report of a large study",
        "",
        about(found["machine"]),
        "",
        f"`{found['command']}`",
        "",
        "| what | value |",
        "|---|---|",
    ]
    lines += [f"| {k} | {v:,.3g} |" if isinstance(v, float) else f"| {k} | {v:,} |" for k, v in row.items()]
    return "\n".join(lines) + "\n"


def in_browser(page: Path, folder: Path) -> dict[str, Any]:
    with opened(folder / "profile") as tab:
        paints, loads = [], []
        for _ in range(3):
            tab.open(page)
            time.sleep(0.5)
            first, load = tab.run(PAINTED)
            paints.append(first)
            loads.append(load)
        clicks = [
            tab.run(CLICK.replace("{key}", key))
            for key in ("effect", "layer", "operator", "weights", "effect", "layer")
        ]
        errors = len(tab.errors)
    return {
        "first_paint_ms": float(np.median(paints)),
        "loaded_ms": float(np.median(loads)),
        "sort_ms": float(np.median(clicks)),
        "slowest_sort_ms": max(clicks),
        "script_errors": errors,
    }


if __name__ == "__main__":
    main()
