"""Tables as files: CSV with all digits, and LaTeX that compiles whatever stands in the cells."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aquabit.files import write_text

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a formula begins with in spreadsheets

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "-": "{-}",
    "\N{MINUS SIGN}": "$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
}


def latex_text(text: Any) -> str:
    """Text that LaTeX sets as it is: no command, no ligature of dashes, no optional argument; signs it may
    lack as U+ numbers."""
    out = []
    for c in str(text):
        if c in _LATEX:
            out.append(_LATEX[c])
        elif " " <= c <= "~" or "\u00c0" <= c <= "\u017e":
            out.append(c)
        else:
            out.append(" " if c.isspace() else f"(U+{ord(c):04X})")
    return "".join(out)


def latex(table: pd.DataFrame) -> str:
    """The table as a booktabs ``tabular``: numbers to four digits and right-aligned, undefined ones as a
    dash."""

    def cell(value: Any) -> str:
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        if isinstance(value, float | np.floating):
            exact = float(value)
            if not math.isfinite(exact):
                return "--"
            text = f"{exact:.0f}" if exact == round(exact) and abs(exact) < 1e12 else f"{exact:.4g}"
            return text.replace("-", "$-$")
        return latex_text(value)

    columns = "".join(
        "r" if pd.api.types.is_numeric_dtype(t) and not pd.api.types.is_bool_dtype(t) else "l"
        for t in table.dtypes
    )
    lines = [" & ".join(map(cell, row)) + r" \\" for row in table.itertuples(index=False, name=None)]
    head = " & ".join(map(latex_text, table.columns)) + r" \\"
    return "\n".join(
        [
            r"\begin{tabular}{" + columns + "}",
            r"\toprule",
            head,
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def write(table: pd.DataFrame, folder: Path, name: str) -> None:
    """``name``.csv (all digits) and ``name``.tex in ``folder``."""
    write_text(folder / f"{name}.csv", table.map(_no_formula).to_csv(index=False))
    write_text(folder / f"{name}.tex", "% \\usepackage{booktabs}\n" + latex(table))


def _no_formula(value: Any) -> Any:
    """A text that a spreadsheet would compute, with a sign before it that makes it a text there too."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
