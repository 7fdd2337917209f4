"""Published sizes on the meta device: python -m benchmarks.published_sizes [NAME ...]

Each denoiser is built at its published size without memory, traced, and asked what quantizing it takes:
layers and weights, multiply-adds of a call with one sample at the published resolution (of layers, and of
attention beside them), operator types, bytes that uniform configurations would be stored in, `inspect
--memory`, the denoiser calls and FLOPs of a whole `run` at its defaults, and the CPU seconds that this takes.
No weights are there: nothing is measured. Rows go to benchmarks/results/published_sizes.{json,md}; those not
named are kept.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from math import prod
from typing import Any

import networkx as nx
import torch
from diffusers.utils import logging
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from aquabit.cost import CostModel
from aquabit.graph import dense_macs, example_inputs, layers, meta_denoiser, on_meta, trace
from aquabit.memory import peaks
from aquabit.scheme import Calibration, Protocol
from aquabit.sensitivity.plan import SampleOptions, operations, run_calls
from aquabit.space import make_space
from aquabit.workflows import FlowOptions
from benchmarks.common import RESULTS, about, read, write_results
from tests.families import FAMILIES

COMMAND = "python -m benchmarks.published_sizes"
# where a configuration comes from
DEFAULTS = "the class's own defaults"
SCRIPT = "diffusers' conversion script"
CARD = "the published config.json, from memory"
TEST = "tests/families.py, the published config.json"

_HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "caption_channels": [4096, 4096],
    "llama_layers": [*range(32), *[31] * 16],
    "axes_dims_rope": [64, 32, 32],
}
_KLEIN = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_COGVIEW4 = {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32}
_WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_COG_LARGE = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_SD35_LARGE = {
    "sample_size": 128,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
    "out_channels": 16,
}

Model = tuple[str, dict[str, Any], str, str]  # class, configuration, where from, what a call makes
IMAGE = "1024 x 1024"
MODELS: dict[str, Model] = {
    "SDXL": (*FAMILIES["sdxl"][:2], TEST, IMAGE),
    "SD3.5 medium": (*FAMILIES["sd3.5-medium"][:2], TEST, IMAGE),
    "SD3.5 large": ("SD3Transformer2DModel", _SD35_LARGE, CARD, IMAGE),
    "Flux.1 dev": (*FAMILIES["flux-dev"][:2], TEST, IMAGE),
    "Flux.2 dev": ("Flux2Transformer2DModel", {}, DEFAULTS, IMAGE),
    "Flux.2 klein 4B": ("Flux2Transformer2DModel", _KLEIN, CARD, IMAGE),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, DEFAULTS, IMAGE),
    "Z-Image": ("ZImageTransformer2DModel", {}, DEFAULTS, IMAGE),
    "Chroma": ("ChromaTransformer2DModel", {}, DEFAULTS, IMAGE),
    "CogView4": ("CogView4Transformer2DModel", _COGVIEW4, SCRIPT, IMAGE),
    "Lumina 2": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, CARD, IMAGE),
    "HiDream-I1": ("HiDreamImageTransformer2DModel", _HIDREAM, CARD, IMAGE),
    "Sana 1.6B": ("SanaTransformer2DModel", {}, DEFAULTS, IMAGE),
    "PRX": ("PRXTransformer2DModel", {"axes_dim": [32, 32]}, SCRIPT, "512 x 512"),
    "AuraFlow": ("AuraFlowTransformer2DModel", {"pos_embed_max_size": 9216}, CARD, IMAGE),
    "Wan 2.1 1.3B": ("WanTransformer3DModel", _WAN_SMALL, SCRIPT, "81 x 480 x 832"),
    "Wan 2.1 14B": ("WanTransformer3DModel", {}, SCRIPT, "81 x 480 x 832"),
    "LTX-Video 2B": ("LTXVideoTransformer3DModel", {}, DEFAULTS, "161 x 512 x 704"),
    "LTX-2": ("LTX2VideoTransformer3DModel", {}, DEFAULTS, "121 x 512 x 768, sound"),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}, DEFAULTS, "129 x 720 x 1280"),
    "CogVideoX 2B": ("CogVideoXTransformer3DModel", {}, DEFAULTS, "49 x 480 x 720"),
    "CogVideoX 5B": ("CogVideoXTransformer3DModel", _COG_LARGE, CARD, "49 x 480 x 720"),
}
SCHEMES = ("usq4", "usq3h")


class _AttentionMacs(TorchFunctionMode):
    """Counts the multiply-adds of torch's attention, and makes its output without scores."""

    macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value")
        given = [*args, *((kwargs or {}).get(k) for k in names[len(args) :])]
        query, key, value = given[:3]
        self.macs += prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def attention_macs(net: torch.nn.Module) -> int:
    def run(inputs: dict[str, Any]) -> int:
        with torch.no_grad(), torch.device("meta"), _AttentionMacs() as counter:
            net(**inputs)
        return counter.macs

    return on_meta(example_inputs(net), run)


def timed(seconds: dict[str, float], what: str, make: Callable[[], Any]) -> Any:
    began = time.process_time()
    found = make()
    seconds[what] = round(time.process_time() - began, 1)
    return found


def row(name: str) -> dict[str, Any]:
    kind, config, source, size = MODELS[name]
    seconds: dict[str, float] = {}
    net = timed(seconds, "build", lambda: meta_denoiser(kind, config).eval())
    graph: nx.DiGraph = timed(seconds, "trace", lambda: trace(net))
    nodes = layers(graph)
    protocol = Protocol()
    space = timed(
        seconds, "space", lambda: make_space(graph, "0" * 16, name, calibration=Calibration.of(protocol))
    )
    uniform = make_space(graph, "0" * 16, name, schemes=list(SCHEMES))
    cost = CostModel(graph, uniform)
    macs = sum(n["macs"] for n in nodes.values()) + dense_macs(graph)
    found = timed(seconds, "memory", lambda: peaks(graph, micro_batch=1))
    calls = run_calls(space, protocol, SampleOptions(), FlowOptions().swaps)
    return {
        "model": name,
        "class": kind,
        "source": source,
        "makes": size,
        "layers": len(nodes),
        "weights": graph.graph["weights"],
        "elements": graph.graph["weights"] + graph.graph["other_elements"],
        "macs": macs,
        "attention_macs": attention_macs(net),
        "operators": len({n["operator"] for n in nodes.values()}),
        "other": sum(n["operator"] == "other" for n in nodes.values()),
        "notes": {
            k: len(graph.graph[k]) for k in ("dense", "unread", "uncalled", "tied") if k in graph.graph
        },
        "bytes": {s: cost(uniform.uniform(s, 8)).bytes for s in SCHEMES},
        "bits": {s: round(cost(uniform.uniform(s, 8)).bits_per_weight, 3) for s in SCHEMES},
        "peaks": {f"{p.task}, {p.dtype}": p.total for p in found},
        "fits": sum(str(s) != "fp" for r in space.choices.values() for s in r),
        "calls": sum(calls.values()),
        "operations": operations(calls, macs),
        "seconds": seconds,
    }


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    kept = {r["model"]: r for r in read(RESULTS / "published_sizes.json", {}).get("rows", [])}
    for name in names or list(MODELS):
        kept[name] = row(name)
        print(kept[name], file=sys.stderr, flush=True)
        rows = [kept[n] for n in MODELS if n in kept]
        write_results("published_sizes", COMMAND, {"rows": rows}, markdown)


def gb(value: float) -> str:
    return f"{value / 1e9:,.1f}"


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# Published sizes, on the meta device",
        "",
        f"{about(found['machine'])}; CPU seconds of one thread. Made by `{found['command']}`. No weights are"
        " there: everything is counted or predicted, nothing measured.",
        "",
        "| denoiser | configuration | a call makes | layers | weights, G | operator types (other) | layers,"
        " TMAC a call | attention, TMAC | stored 16 bits, GB | `usq4`, GB | `usq3h`, GB | trace, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['source']} | {r['makes']} | {r['layers']} | {r['weights'] / 1e9:.2f} |"
        f" {r['operators']} ({r['other']}) | {r['macs'] / 1e12:,.1f} | {r['attention_macs'] / 1e12:,.1f} |"
        f" {gb(2 * r['elements'])} | {gb(r['bytes']['usq4'])} | {gb(r['bytes']['usq3h'])} |"
        f" {r['seconds']['trace']:.1f} |"
        for r in found["rows"]
    ]
    lines += [
        "",
        "Peaks of `inspect --memory --micro-batch 1` in bfloat16, of the denoiser alone (its pipeline's"
        " text encoders and VAE come on top), and what a `run` at its defaults (120 configurations, 128"
        " samples, 10 steps, no guidance) computes: PFLOP of layers, without attention.",
        "",
        "| denoiser | measure, GB | quantize, GB | run packed (`usq4h`), GB | fits | denoiser calls of a"
        " run | PFLOP of a run | memory, s | space, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {gb(r['peaks']['measure, bfloat16'])} | {gb(r['peaks']['quantize, bfloat16'])} |"
        f" {gb(r['peaks']['run packed, bfloat16'])} | {r['fits']:,} | {r['calls']:,} |"
        f" {r['operations'] / 1e15:,.0f} | {r['seconds']['memory']:.1f} | {r['seconds']['space']:.1f} |"
        for r in found["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
