"""benchmarks/results/kernels.md from kernels.json: the figures to reach, then a section per part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from aquabit.scheme import Scheme
from benchmarks.common import sections_of

Rows = list[dict[str, Any]]
AS_THEY_ARE = ("lut fast", "decode a16")  # activations
ANY = (*AS_THEY_ARE, "decode a8")
KERNELS = ("lut fast", "lut exact", "decode a16", "decode a8")
TOKENS = (256, 1024)  # that the figures speak of


def code_bits(scheme: str, area: int = 1) -> float:
    return Scheme.parse(scheme).code_bits(area)


def two_bits(row: dict[str, Any]) -> bool:
    """A linear format of two bits a weight, codes alone."""
    return row["format"] is not None and code_bits(row["format"]) == 2


def of_format(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: row["format"] in names


# ---- the figures to reach
# ------------------------------------------------------------------------------------------------------------


def figure(
    claim: str, target: float, cases: Iterable[Rows], ratio: str, at_least: bool = True
) -> dict[str, Any] | None:
    """The best row of every case, and the worst of those: None where nothing was measured."""
    best = [max(rows, key=lambda r: r[ratio]["median"]) for rows in cases if rows]
    if not best:
        return None
    worst = min(best, key=lambda r: r[ratio]["median"])
    value = worst[ratio]["median"]
    return {
        "claim": claim,
        "target": target,
        "reached": value,
        "low": worst[ratio]["low"],
        "high": worst[ratio]["high"],
        "where": _where(worst),
        "met": value >= target if at_least else value <= target,
    }


def _where(row: dict[str, Any]) -> str:
    parts = [row.get("format") or row.get("variant"), row.get("kernel"), row.get("shape") or row.get("model")]
    parts += [count(row["tokens"], "token")] if "tokens" in row else []
    return ", ".join(
        str(p) for p in (*parts, f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}") if p
    )


def by_case(rows: Rows, keep: Callable[[dict[str, Any]], bool], kernels: tuple[str, ...] = ANY) -> list[Rows]:
    """The rows that are meant, by shape, tokens and threads."""
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        if row["format"] is not None and row["kernel"] in kernels and keep(row):
            found.setdefault((row["shape"], row.get("tokens"), row["threads"]), []).append(row)
    return list(found.values())


NEVER_SLOWER = 0.95  # than torchao at 8 bits, by more than 5 %
WHOLE = {  # whole denoisers and what they are to be over dense ones, all activations rounded
    "U-Net of LDM-4's shapes": {"float32": 2.2, "bfloat16": 1.3},
    "DiT-XL/2, 28 blocks": {"float32": 3.3, "bfloat16": 1.6},
    "SD 1.5's U-Net at 64 x 64": {"float32": 2.0, "bfloat16": 1.2},
}


def figures(found: dict[str, Any]) -> Rows:
    """What the issue asks for and what was reached: of the best kernel (and format) in the worst case."""
    linear, conv, peers, models = (
        found.get(part, {}).get("rows", []) for part in ("linear", "conv", "peers", "models")
    )
    rows: list[dict[str, Any] | None] = []
    wanted = (
        ("aq2x6g8", of_format("aq2x6g8"), "float32", 3.0, 5.0),
        ("best 2-bit format", two_bits, "float32", 2.8, 3.5),
        ("usq4", of_format("usq4"), "float32", 1.3, 2.2),
        ("best 2-bit format", two_bits, "bfloat16", 1.2, 1.8),
    )
    for name, which, dense, *targets in wanted:
        for out, target in zip((1152, 4608), targets, strict=True):
            mine = [r for r in linear if r.get("tokens") in TOKENS and r["shape"].endswith(f"-> {out}")]
            for kernels, how in ((AS_THEY_ARE, "activations as they are"), (ANY, "or at 8 bits")):
                rows.append(
                    figure(
                        f"{name} over {dense}, out {out}, {how}",
                        target,
                        by_case(mine, which, kernels),
                        f"over_{dense}",
                    )
                )
    for side, target in ((32, 1.3), (16, 2.2)):
        mine = [r for r in conv if r["side"] == side and r["channels"] >= 384]
        for scheme in sorted({r["format"] for r in mine if r["format"] and small(r["format"])}):
            rows.append(
                figure(
                    f"conv {scheme} over float32, {side}x{side}",
                    target,
                    by_case(mine, of_format(scheme), AS_THEY_ARE),
                    "over_float32",
                )
            )
    rows += group_figures(found.get("groups", {}).get("rows", []))
    rows += attention_figures(found.get("attention", {}).get("rows", []))
    main = [
        r
        for r in peers
        if "over_torchao" in r and (r["shape"], r["tokens"], r["threads"]) == ("1152 -> 4608", 256, 2)
    ]
    rows.append(figure("best 2-bit format over torchao W8A8", 1.3, by_case(main, two_bits), "over_torchao"))
    rows.append(figure("best format over torchao W8A8", 1.3, by_case(main, lambda _: True), "over_torchao"))
    eight = by_case([r for r in peers if "over_torchao" in r], of_format("usq8"))
    rows.append(figure("8 bits over torchao W8A8", NEVER_SLOWER, eight, "over_torchao"))
    for tokens, target in ((256, 100.0), (1, 1.0)):
        mine = [r for r in peers if "over_aqlm" in r and r["tokens"] == tokens]
        rows.append(
            figure(
                f"aq2x8g8 over aqlm, {tokens} token{'s' if tokens > 1 else ''}",
                target,
                by_case(mine, lambda _: True, KERNELS),
                "over_aqlm",
            )
        )
    rows += denoiser_peer_figures(found.get("denoiser_peers", {}).get("rows", []))
    for model, targets in WHOLE.items():
        mine = {r["variant"]: r for r in models if r["model"] == model}
        two, four = ([mine[v]] if v in mine else [] for v in ("usq2 a8 packed", "usq4 a8 packed"))
        for dense, target in targets.items():
            rows.append(figure(f"{model}, everything rounded, over {dense}", target, [two], f"over_{dense}"))
        four = [r for r in four if "over_two_bits" in r]
        rows.append(figure(f"{model}, the same at 4 bits over 2 bits", 0.9, [four], "over_two_bits"))
    for model in dict.fromkeys(r["model"] for r in models):
        mine = [r for r in models if r["model"] == model]
        for how, target in (("packed", 2.0), ("auto", 1 / 1.05)):
            ours = [
                r for r in mine if r["variant"].endswith(how) and (how == "auto" or "x6" not in r["variant"])
            ]
            cases = [[r for r in ours if r["threads"] == n] for n in sorted({r["threads"] for r in ours})]
            cases = cases if how == "packed" else [[r] for r in ours]  # auto: every format
            rows.append(figure(f"{model} over float32, memory={how}", target, cases, "over_float32"))
    small_models = found.get("bundled", {}).get("rows", [])
    for (model, batch), mine in _cases(small_models, ("model", "batch")).items():
        cases = [[r] for r in mine if r["variant"].endswith(" a8 packed")]  # every format, all rounded
        claim = f"{model}, {count(batch, 'sample')} over float32, memory=packed"
        rows.append(figure(claim, 1.0 if batch == 1 else 1.3, cases, "over_float32"))
    return [r for r in rows if r is not None]


def group_figures(rows: Rows) -> list[dict[str, Any] | None]:
    """Of formats with a scale a group: within a tenth of uniform codes of their bits, each of them."""
    coded = [r for r in rows if "over_uniform" in r]
    return [
        figure(
            f"scales of groups over usq of their bits, {shape}, {kernel.removeprefix('decode ')}",
            1 / 1.1,
            [[r] for r in own],
            "over_uniform",
        )
        for (shape, kernel), own in _cases(coded, ("shape", "kernel")).items()
    ]


def denoiser_peer_figures(rows: Rows) -> list[dict[str, Any] | None]:
    """How many times as long others' calls take as ours, in the worst case of models and threads."""
    wanted = (("stable-diffusion.cpp q4_0", 4, 1.5), ("torchao float32", 8, NEVER_SLOWER))
    return [
        figure(
            f"whole denoisers, {bits} bits over {variant}",
            target,
            [[r] for r in rows if r["variant"] == variant],
            f"slower_than_{bits}",
        )
        for variant, bits, target in wanted
    ]


def attention_figures(rows: Rows) -> list[dict[str, Any] | None]:
    """Of the kernel that rounds: beside torch's own at many tokens, and beside its form in torch at few."""
    many = [r for r in rows if r["shape"] == "8 heads of 64" and r["tokens"] >= 1024]
    few = [r for r in rows if r["tokens"] <= 64]
    wanted = (
        ("attention over float32, 1,024 and 4,096 tokens", 1.5, many, "float32", "over_float32"),
        ("attention in bfloat16 over bfloat16, the same", 1.0, many, "bfloat16", "over_bfloat16"),
        ("attention over its form in torch, 16 and 64 tokens", 1.0, few, "float32", "over_torch_form"),
    )
    return [
        figure(
            claim, target, [[r] for r in own if r["format"] == "rounded" and r["kernel"] == kind], ratio_name
        )
        for claim, target, own, kind, ratio_name in wanted
    ]


def small(scheme: str) -> bool:
    """Codebooks of at most 64 entries, below two bits a weight of a 3 x 3 convolution."""
    s = Scheme.parse(scheme)
    return s.kind == "aq" and s.bits <= 6 and s.code_bits(9) < 2


# ---- Markdown
# ------------------------------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def count(n: int, word: str) -> str:
    return f"{n} {word}{'s' if n > 1 else ''}"


def _cases(rows: Rows, keys: tuple[str, ...]) -> dict[tuple[Any, ...], Rows]:
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row.get(k) for k in keys), []).append(row)
    return found


def _dense_line(rows: Rows) -> str:
    parts = []
    for row in (r for r in rows if r["format"] is None):
        other = f", {1 / row['over_torchao']['median']:.2f} of torchao's" if "over_torchao" in row else ""
        parts.append(f"{row['kernel']} {row['ms']:.3f} ms (error {row['error']:.1e}{other})")
    return "; ".join(parts) + ".\n"


def layer_tables(rows: Rows, other: str | None = None) -> str:
    """A table per shape, tokens and threads: a line a format, milliseconds of each kernel, ratios of the
    best ones."""
    parts = []
    for (shape, tokens, threads), mine in _cases(rows, ("shape", "tokens", "threads")).items():
        parts.append(
            f"### {shape}{'' if tokens is None else ', ' + count(tokens, 'token')},"
            f" {count(threads, 'thread')}\n\n{_dense_line(mine)}"
        )
        lines = []
        for (scheme,), own in _cases([r for r in mine if r["format"]], ("format",)).items():
            by = {r["kernel"]: r for r in own}
            best = min((by[k] for k in AS_THEY_ARE if k in by), key=lambda r: r["ms"])
            eight = by.get("decode a8")
            cells = [
                f"{by[k]['ms']:.3f}" if k in by else "" for k in KERNELS if k in {r["kernel"] for r in rows}
            ]
            ratios = [
                spread(best.get(f"over_{n}")) for n in ("float32", "bfloat16", *([other] if other else []))
            ]
            ratios += [spread(eight.get(f"over_{other or 'float32'}")) if eight else ""]
            exact = f"{by['lut exact']['error']:.0e}" if "lut exact" in by else ""
            wrong = ", ".join(
                f"{by[k]['error']:.0e} ({by[k]['error_norm']:.0e})" for k in AS_THEY_ARE if k in by
            )
            lines.append(
                [scheme, f"{best['bits']:.2f}", *cells, best["kernel"], *ratios, wrong, exact, best["rounds"]]
            )
        names = [f"{k}, ms" for k in KERNELS if k in {r["kernel"] for r in rows}]
        over = [
            "over float32",
            "over bfloat16",
            *([f"over {other}"] if other else []),
            f"a8 over {other or 'float32'}",
        ]
        parts.append(
            table(["format", "bits", *names, "best", *over, "errors (of norm)", "exact", "rounds"], lines)
        )
    return "\n".join(parts)


def levels_section(rows: Rows) -> str:
    """A line for each case and format, milliseconds and ratios by instructions."""
    names = list(dict.fromkeys(r["level"] for r in rows))
    lines = []
    for (name, scheme), own in _cases(rows, ("case", "scheme")).items():
        by = {r["level"]: r for r in own}
        times = [f"{by[n]['ms']:.3f}" if n in by else "" for n in names]
        over = [spread(by[n]["over_avx2"]) if n in by else "" for n in names if n != "avx2"]
        lines.append([name, scheme, *times, *over, str(own[0]["rounds"])])
    head = [f"{n}, ms" for n in names] + [f"avx2 over {n}" for n in names if n != "avx2"]
    return table(["case", "format", *head, "rounds"], lines)


def groups_section(rows: Rows) -> str:
    """A table per shape and tokens: a line for each format, milliseconds and ratios by activations."""
    parts = []
    kernels = list(dict.fromkeys(r["kernel"] for r in rows))
    for (shape, tokens, threads), mine in _cases(rows, ("shape", "tokens", "threads")).items():
        parts.append(f"### {shape}, {count(tokens, 'token')}, {count(threads, 'thread')}\n")
        lines = []
        for (scheme,), own in _cases(mine, ("format",)).items():
            by = {r["kernel"]: r for r in own}
            times = [f"{by[k]['ms']:.3f}" for k in kernels]
            ratios = [spread(by[k].get("over_uniform")) for k in kernels]
            wrong = ", ".join(f"{by[k]['error']:.0e}" for k in kernels)
            lines.append([scheme, f"{own[0]['bits']:.2f}", *times, *ratios, wrong, own[0]["rounds"]])
        names = [k.removeprefix("decode ") for k in kernels]
        over = [f"{n}: usq over it" for n in names]
        parts.append(
            table(["format", "bits", *(f"{n}, ms" for n in names), *over, "errors", "rounds"], lines)
        )
    return "\n".join(parts)


def attention_section(rows: Rows) -> str:
    """A table per shape and threads: a line for each kernel and type."""
    parts = []
    for (shape, threads), mine in _cases(rows, ("shape", "threads")).items():
        parts.append(f"### {shape}, {count(threads, 'thread')}\n")
        lines = [
            [
                f"{r['tokens']:,}",
                f"{r['format'] or 'torch, not rounded'}, {r['kernel']}",
                f"{r['ms']:.3f}",
                f"{r['gmac_s']:.2g}",
                spread(r["over_float32"]),
                spread(r["over_bfloat16"]),
                spread(r["over_torch_form"]),
                f"{r['error']:.0e} ({r['error_norm']:.0e})",
                r["rounds"],
            ]
            for r in mine
        ]
        head = ["tokens", "kernel", "ms", "GMAC/s", "over float32", "over bfloat16", "over its form in torch"]
        parts.append(table([*head, "errors (of norm)", "rounds"], lines))
    return "\n".join(parts)


def peers_section(rows: Rows) -> str:
    theirs = [r for r in rows if "over_aqlm" in r]
    lines = [
        [
            count(r["tokens"], "token"),
            r["threads"],
            r["kernel"],
            f"{r['ms']:.2f}",
            spread(r["over_aqlm"]),
            f"{r['error']:.0e}",
            r["rounds"],
        ]
        for r in theirs
    ]
    text = (
        "AQLM's kernel adds from several threads to the same outputs without a lock: its error with two"
        " threads is a race.\n\n"
    )
    aqlm = (
        f"### The aqlm package's CPU kernel, 2x8g8, {theirs[0]['shape']}\n\n{text}"
        + table(["tokens", "threads", "kernel", "ms", "over aqlm", "error", "rounds"], lines)
        if theirs
        else ""
    )
    return layer_tables([r for r in rows if "over_aqlm" not in r], "torchao") + "\n" + aqlm


def models_section(rows: Rows) -> str:
    parts = []
    for (model, batch, threads), mine in _cases(rows, ("model", "batch", "threads")).items():
        parts.append(f"### {model}, {count(batch, 'sample')}, {count(threads, 'thread')}\n")
        lines = []
        for r in mine:
            kernels = ", ".join(f"{k} {n}" for k, n in r["kernels"].items())
            lines.append(
                [
                    r["variant"],
                    "" if r["bits"] is None else f"{r['bits']:.2f}",
                    f"{r['ms']:.{0 if r['ms'] >= 100 else 2}f}",
                    spread(r["over_float32"]),
                    spread(r["over_bfloat16"]),
                    f"{r['resident'] / 1e6:.1f} ({100 * r['resident'] / r['dense_float32']:.1f} %)",
                    kernels,
                    "" if r["difference"] is None else f"{r['difference']:.0e}",
                    r["rounds"],
                ]
            )
        head = [
            "variant",
            "bits",
            "ms a call",
            "over float32",
            "over bfloat16",
            "resident, MB (of float32)",
            "layers by kernel",
            "difference",
            "rounds",
        ]
        parts.append(table(head, lines))
    return "\n".join(parts)


def ways_section(rows: Rows) -> str:
    """A line a case, run two ways."""
    first, second = rows[0]["ms"]
    head = ["case", f"{first}, ms", f"{second}, ms", f"{first} over {second}", "rounds"]
    lines = [
        [r["case"], *(f"{t:.3g}" for t in r["ms"].values()), spread(r["ratio"]), r["rounds"]] for r in rows
    ]
    return table(head, lines)


def denoiser_peers_section(rows: Rows) -> str:
    parts = []
    for (model, threads), mine in _cases(rows, ("model", "threads")).items():
        lines = [
            [
                r["variant"],
                r.get("quantized", ""),
                f"{r['ms']:.0f}",
                *(spread(r[f"slower_than_{bits}"]) for bits in (2, 4, 8)),
                r["rounds"],
            ]
            for r in sorted(mine, key=lambda r: r["ms"])
        ]
        head = ["variant", "quantized", "ms a call", "over our 2 bits", "4 bits", "8 bits", "rounds"]
        parts.append(f"### {model}, 1 sample, {count(threads, 'thread')}\n\n" + table(head, lines))
    versions = {p: v for r in rows for p, v in r.get("versions", {}).items()}
    parts.append(", ".join(f"{p} {v}" for p, v in sorted(versions.items())) + ".\n")
    return "\n".join(parts)


def roofline_section(rows: Rows) -> str:
    names = (
        "load_L1_ns",
        "load_L2_ns",
        "store_ns",
        "scalar_ns",
        "float32_gmac_s",
        "bfloat16_gmac_s",
        "int16_gmac_s",
        "int8_gmac_s",
        "read_gb_s",
    )
    heads = (
        "load + add of 64 bytes, L1, ns",
        "L2, ns",
        "store of 64 bytes, ns",
        "load + add of a float, ns",
        "float32, GMAC/s",
        "bfloat16",
        "int16",
        "int8",
        "memory, GB/s",
    )
    machines = [[r["threads"], *(f"{r[n]:.2f}" for n in names)] for r in rows if r["what"] == "machine"]
    parts = ["A core of the machine, by the number of cores at work:\n", table(["cores", *heads], machines)]
    for threads in sorted({r["threads"] for r in rows}):
        mine = [r for r in rows if r["what"] == "layer" and r["threads"] == threads and r["kernel"] in ANY]
        lines = []
        for key, own in _cases(mine, ("shape", "tokens", "format")).items():
            groups = (
                [r for r in own if r["kernel"] in AS_THEY_ARE],
                [r for r in own if r["kernel"] not in AS_THEY_ARE and (key[2] or "").startswith("usq")],
            )
            for best in (min(g, key=lambda r: r["ms"]) for g in groups if g):
                asked = [
                    f"{best[k] / 1e6:.1f}" if k in best else ""
                    for k in ("table_bytes", "loads", "table_multiply_adds", "multiply_adds")
                ]
                size = key[0] if key[1] is None else f"{key[0]}, {count(key[1], 'token')}"
                lines.append(
                    [
                        size,
                        key[2],
                        best["kernel"],
                        *asked,
                        f"{best['bound_ms']:.3f}",
                        f"{best['ms']:.3f}",
                        f"{100 * best['share']:.0f} %",
                    ]
                )
        head = [
            "layer",
            "format",
            "kernel",
            "from tables, MB",
            "loads and adds, M",
            "multiply-adds of tables, M",
            "of the dense layer, M",
            "bound, ms",
            "reached, ms",
            "share",
        ]
        parts.append(f"### {count(threads, 'thread')}\n\n" + table(head, lines))
    return "\n".join(parts)


ABOUT = {
    "linear": (
        "Linear layers of DiT-XL/2",
        (
            "float32 activations. `best`: the faster of `lut fast` and `decode a16`, which take activations"
            " as they are; ratios are of that one, then of `decode a8` (activations at 8 bits). Errors: max|y"
            " - y64| / max|y64| and, in brackets, |y - y64| / |y64|, of `lut fast`, `decode a16`; then of"
            " `lut exact`."
        ),
    ),
    "conv": (
        "Convolutions of U-Nets (3 x 3 of stride 1 where nothing else is said), one image",
        "As above; float32 is the faster of two layouts.",
    ),
    "levels": (
        "Sets of instructions",
        (
            "The same calls with each that this processor has, one thread, activations at 8 bits. How many"
            " times as long AVX2 takes."
        ),
    ),
    "groups": (
        "Formats with a scale for each group of a row",
        (
            "`decode` alone, beside `usq` with as many bits a code and one scale a row; random codes. A group"
            " of n inputs takes n / 4 integer products and, on the same two ports of the processor, one"
            " product with its scale and one with its minimum where there is one: at best usq takes .94 of"
            " the time of groups of 64, .89 of 32 and .8 of 16; with a minimum"
            " .89, .8 and .67. `nf4` and `mxfp8` have levels that are no whole numbers of 8 bits, and are"
            " multiplied as 16: .5 at best. The machine had other work: ratios are within rounds. Errors:"
            " max|y - y64| / max|y64|."
        ),
    ),
    "attention": (
        "Attention with probabilities rounded to 8 bits",
        (
            "Random Q, K and V, heads side by side in each token. Errors are to float64, of the same rounding"
            " where there is one; a probability halfway between two points of its grid may go to the other"
            " one. The bound of a core is that of its float32 multiply-adds for the scores and of its integer"
            " dot products of 16 bits for the values (Bounds, below)."
        ),
    ),
    "peers": (
        "What a user could take today",
        (
            "torchao's Int8DynamicActivationInt8WeightConfig under torch.compile, float32 activations,"
            " compiled for each shape and number of threads."
        ),
    ),
    "models": (
        "Whole denoisers",
        (
            "Random codes. `difference`: of the output from that of the dense float32 model of the same"
            " codes, by norm (rounded activations included). `resident`: what layers' weights and biases"
            " hold, plans of the kernels included."
        ),
    ),
    "denoiser_peers": (
        "Whole denoisers in other programs",
        (
            "Each in a process of its own, called in turn with ours; its calls take so many times as long as"
            " ours at 2, 4 and 8 bits, with quartiles. All weights are random. torchao: Int8DynamicActivation"
            "Int8Weight, compiled. OpenVINO: NNCF's quantization after training, the rest in the type that it"
            " takes by itself. SDNQ: its own quantized products, which OpenVINO computes."
            " stable-diffusion.cpp: built for this machine with llamafile's products; a step"
            " without guidance, of files by `aquabit export --to gguf`."
        ),
    ),
    "bundled": ("Bundled denoisers", "As above, of their classes and sizes."),
    "sharing": (
        "Layers that read the same tensor",
        (
            "Three such layers, and q, k and v (of cross-attention k and v) of whole denoisers, at usq4 and"
            " a8: each by itself, which rounds the tensor each time, and as one product of all their outputs,"
            " which rounds it once. One thread, processor time."
        ),
    ),
    "functions": (
        "Functions in feed-forward blocks",
        (
            "Whole denoisers at usq4 and a8: GELU or GEGLU by torch, which writes float32, and by the kernel"
            " of the layer behind it, as it reads. One thread, processor time."
        ),
    ),
    "compiled": (
        "torch.compile",
        (
            "A packed denoiser at usq4 and a8, as it is and compiled by inductor (fullgraph=True). One"
            " thread, processor time."
        ),
    ),
    "roofline": (
        "Bounds",
        (
            "Loads of 64 bytes from tables with their adds, plus making the tables (the larger of"
            " multiply-adds and stores), at the rates measured here; or the integer dot products of the"
            " decoding kernel. The faster kernel with activations as they are; for usq also at 8 bits."
        ),
    ),
}
SECTIONS: dict[str, Callable[[Rows], str]] = {
    "linear": layer_tables,
    "conv": layer_tables,
    "groups": groups_section,
    "levels": levels_section,
    "attention": attention_section,
    "peers": peers_section,
    "models": models_section,
    "denoiser_peers": denoiser_peers_section,
    "bundled": models_section,
    "sharing": ways_section,
    "functions": ways_section,
    "compiled": ways_section,
    "roofline": roofline_section,
}


def markdown(found: dict[str, Any]) -> str:
    """The whole file; parts that were not measured are left out."""
    parts = [
        "# Kernels\n\nMedians of paired rounds; a ratio above 1 says how many times as long the other takes,"
        " with quartiles. Freed memory is kept for the next operation, in other programs too.\n"
    ]
    reached = figures(found)
    if reached:
        lines = [
            [
                f["claim"],
                f"{f['target']:.2f}",
                f"{f['reached']:.2f} ({f['low']:.2f} to {f['high']:.2f})",
                f["where"],
                "yes" if f["met"] else "no",
            ]
            for f in reached
        ]
        parts.append(
            "## Figures to reach\n\nThe worst of the cases that a figure speaks of, each with its best"
            " kernel.\n"
        )
        parts.append(table(["figure", "target", "reached", "worst case", "met"], lines))
    for part, section in SECTIONS.items():
        for name, of in sections_of(part, found).items():
            if not found[name].get("rows"):
                continue
            own, (title, text) = found[name], ABOUT[part]
            m = own["machine"]
            made = (
                f"Made by `{own['command']}` in {own['seconds']:.0f} s on {m['cpu']} ({m['level']}), torch"
                f" {m['torch']}; load before: {own['load']:.1f}."
            )
            parts += [f"## {title}{of}\n\n{text} {made}\n", section(own["rows"])]
    return "\n".join(parts).rstrip() + "\n"
