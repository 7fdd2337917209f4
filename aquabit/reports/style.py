"""The look of our figures: sizes for print, fonts that embed, colours that the colour-blind and a grey
printer keep apart.

with style.use():
    figure, axes = style.canvas(style.SINGLE, 2.4)
    figures.surrogate_scatter(table, axes, "fid")
    style.save(figure, Path("figures"), "surrogate")
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Tick
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator

from aquabit.files import write_text, writing
from aquabit.reports.svg import titled
from aquabit.scheme import FP, Scheme

SINGLE, DOUBLE = 3.35, 6.9  # inches: one and two columns of a paper

# Okabe and Ito (2008), with a grey; lightness differs, so that order survives a grey printer
BLACK, BLUE, VERMILLION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
ORANGE, SKY, PURPLE, GREY = "#E69F00", "#56B4E9", "#CC79A7", "#8C8C8C"

RC: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout on every machine
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.2,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "aquabit",
    "axes.unicode_minus": True,
}

# by nominal bits, nearest one: the more bits the lighter, so that a grey print keeps the order; full
# precision is black
BIT_COLOURS = {2: "#7A2500", 3: VERMILLION, 4: "#7CC4EE", 6: "#A8D8F3", 8: "#D5EAF7", 16: "#1B1B1B"}


@contextmanager
def use() -> Iterator[None]:
    """Our style inside a ``with`` block; nothing global stays changed."""
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        # a name in a script the font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that many inches with one pair of axes, without pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


# beside SVG; and what they omit
FORMATS = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "png": {"Software": None}}


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write ``name``.pdf, .svg and .png into ``folder``; returns the SVG text."""
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is found once, not once per format
    for suffix, metadata in FORMATS.items():
        with writing(folder / f"{name}.{suffix}") as temporary:
            figure.savefig(temporary, format=suffix, metadata=metadata)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    write_text(folder / f"{name}.svg", titled(text, named_points(figure)))
    return text


def label(name: str, limit: int = 56) -> str:
    """A name as matplotlib shall show it: no mathematics, no control characters, the middle left out where
    it is long."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in str(name))
    if len(text) > limit:
        head = (limit - 3) // 2  # three dots: every sign beyond Latin-1 costs a second font in each PDF
        text = f"{text[:head]}...{text[head + 3 - limit :]}"
    return text.replace("$", r"\$")


def scheme_look(scheme: str) -> tuple[str, str]:
    """Colour (by nominal bits) and hatch (by method) of a weight scheme."""
    parsed = Scheme.parse(scheme)
    bits = parsed.code_bits(9)
    return BIT_COLOURS[min(BIT_COLOURS, key=lambda b: abs(b - bits))], parsed.look.hatch


def scheme_group(scheme: str) -> str:
    """Method and nominal bits, as ``aq 2``: schemes of one group look alike, so that a legend can be read;
    ``fp`` is alone."""
    parsed = Scheme.parse(scheme)
    if parsed == FP:
        return "fp"
    bits = min(BIT_COLOURS, key=lambda b: abs(b - parsed.code_bits(9)))
    return f"{parsed.look.method} {bits}"


def group_order(group: str) -> tuple[float, str]:
    """Sorts names of ``scheme_group`` by bits, then method."""
    kind, _, bits = group.partition(" ")
    return float(bits or 16), kind


def scheme_mark(scheme: str) -> dict[str, Any]:
    """Marker (by method) and colour (by nominal bits) of a weight scheme."""
    return {"color": scheme_look(scheme)[0], "marker": Scheme.parse(scheme).look.marker}


_named: WeakKeyDictionary[Figure, dict[str, tuple[str, list[str]]]] = WeakKeyDictionary()


def name_points(axes: Axes, artist: Artist, names: Sequence[str], kind: str = "layer") -> None:
    """Say what the points of an artist are, in their order: in SVG files each then has a title, and on the
    page those of ``kind`` "layer" are linked to the layer table. An artist of one name is linked as a
    whole."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    known = _named.setdefault(figure, {})
    key = f"named-{len(known)}"
    artist.set_gid(key)
    known[key] = (kind, [str(n) for n in names])


def name_ticks(axes: Axes, ticks: Sequence[Tick], names: Sequence[str]) -> None:
    """Link the labels of ``ticks`` to layers."""
    for tick, name in zip(ticks, names, strict=True):
        for text in (tick.label1, tick.label2):
            if text.get_visible():
                name_points(axes, text, [name])


def named_points(figure: Figure) -> dict[str, tuple[str, list[str]]]:
    """SVG id -> kind and names, as ``name_points`` was told."""
    return _named.get(figure, {})


def colour_bar(axes: Axes, norm: Any, colours: Any, text: str) -> None:
    """A thin colour bar beside ``axes``."""
    bar = axes.figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02, aspect=30)
    bar.set_label(text)
    bar.outline.set_linewidth(0.4)
    assert bar.solids is not None
    bar.solids.set_rasterized(False)
    bar.solids.set_edgecolor("face")  # else viewers show hairlines between the colours
    bar.ax.yaxis.set_major_formatter(FuncFormatter(_tick))


def symmetric_axis(axes: Axes, which: str, values: Any, ticks_most: int = 4) -> None:
    """An axis over ``values`` and zero: linear, or linear near zero and logarithmic beyond where few
    values dwarf the rest."""
    size = np.abs(np.asarray(values, float))
    size = size[np.isfinite(size) & (size > 0)]
    seen = np.nan_to_num(np.asarray(values, float), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(seen.min(initial=0.0)), float(seen.max(initial=0.0))
    if not len(size) or size.max() < 12 * np.median(size):
        pad = 0.06 * (high - low) or 1.0
        getattr(axes, f"set_{which}lim")(low - pad if low < 0 else -0.5 * pad, high + pad)
        return
    near = 10.0 ** math.floor(math.log10(float(np.median(size))))
    getattr(axes, f"set_{which}scale")("symlog", linthresh=near, linscale=0.6)
    getattr(axes, f"set_{which}lim")(1.6 * low if low < -near else -0.4 * near + min(low, 0.0), 1.6 * high)
    decades = math.floor(math.log10(1.6 * max(high, -low) / near))
    step = decades // (ticks_most + 2) + 1  # over many decades the first ticks would crowd at zero
    powers = [near * 10.0**k for k in range(step - 1, decades + 1, step)]
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(
        FixedLocator([-p for p in powers if -p >= 1.6 * low] + [0.0] + [p for p in powers if p <= 1.6 * high])
    )
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_locator(FixedLocator([]))


def _tick(value: float, _: int = 0) -> str:
    size = abs(value)
    text = (
        f"{value:.0e}".replace("e+0", "e")
        if size >= 1e5
        else f"{value:,.0f}"
        if size >= 1000
        else f"{value:.6g}"
    )
    return text.replace("-", "\N{MINUS SIGN}")


def log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """A logarithmic axis from ``low`` to ``high`` whose ticks are plain numbers, as many as can be read."""
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    axis = getattr(axes, f"{which}axis")
    ticks: list[float] = []
    for subs in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        ticks = [
            float(t) for t in LogLocator(subs=subs, numticks=50).tick_values(low, high) if low <= t <= high
        ]
        if len(ticks) >= 4:
            break
    if len(ticks) < 3:
        ticks = [float(t) for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_locator(FixedLocator([]))
