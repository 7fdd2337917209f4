"""Files for ComfyUI, loaded and run by ComfyUI itself on a CPU: python benchmarks/comfyui.py run
--comfyui DIR [--python PATH] [--folder DIR]

run        a small Flux and a T5 with as many blocks, and as wide inside, as the one by which ComfyUI tells
           XXL: each layer at one of ComfyUI's formats in turn, int8 of Flux at i8, exported; what ComfyUI's
           loader makes of the file: numbers that differ from ours, and outputs
DIR is a clone of ComfyUI; the Python (default: this one) has what it imports to load a model: comfy-kitchen,
comfy-aimdo, einops, transformers. Results: benchmarks/results/comfyui.json and comfyui.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.exports import comfy
from aquabit.exports.exported import Exported
from aquabit.graph import layers, trace
from aquabit.kernels.fake_quant import fake_quantize
from aquabit.quant.model import fingerprint
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import LayerChoice, QuantConfig, Rounding, Scheme
from aquabit.targets import COMFY
from benchmarks.common import about, parsed, parser, write_results

ROOT = Path(__file__).parents[1]
SCHEMES = ("int8", "nvfp4", "fp8", "mxfp8")
SEED = 20_261_202
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 10240, "num_heads": 2, "num_layers": 24, "vocab_size": 32128}
ENCODER = "T5EncoderModel"
IDS = torch.arange(12).reshape(2, 6) + 100


def flux() -> tuple[Any, dict[str, torch.Tensor]]:
    from diffusers import FluxTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 128, "in_channels": 64, "num_layers": 2}
    more = {"num_single_layers": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32}
    generator = torch.Generator().manual_seed(SEED)
    call = {
        "x": torch.randn(2, 16, 8, 8, generator=generator),
        "context": torch.randn(2, 6, 64, generator=generator),
        "y": torch.randn(2, 32, generator=generator),
        "t": torch.tensor([0.9, 0.3]),
        "guidance": torch.tensor([3.5, 1.0]),
    }
    return FluxTransformer2DModel(**sizes, **more, guidance_embeds=True), call


def t5() -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")), {"ids": IDS}


def called(net: Any, call: dict[str, torch.Tensor]) -> torch.Tensor:
    """The dense network's output, as its own library computes it."""
    with torch.inference_mode():
        if "ids" in call:
            found: torch.Tensor = net(input_ids=call["ids"]).last_hidden_state
            return found
        x, size = call["x"], call["x"].shape[-1] // 2
        packed = x.reshape(len(x), 16, size, 2, size, 2).permute(0, 2, 4, 1, 3, 5).reshape(len(x), -1, 64)
        ids = torch.zeros(size, size, 3)
        ids[..., 1] += torch.arange(size)[:, None]
        ids[..., 2] += torch.arange(size)
        out = net(
            hidden_states=packed,
            encoder_hidden_states=call["context"],
            pooled_projections=call["y"],
            timestep=call["t"],
            guidance=call["guidance"],
            img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(call["context"].shape[1], 3),
        ).sample
        parts = out.reshape(len(x), size, size, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return parts.reshape(x.shape)


MODELS = {"flux": flux, "t5": t5}


def exported(net: Any, graph: Any) -> Exported:
    """Every Linear layer at the next of the formats that it can have; layers of one tensor at int8."""
    own, turn, choices = type(net).__name__, 0, dict[str, LayerChoice]()
    fused = COMFY.on(layers(graph), own, [Scheme.parse("int8")]).tied
    together = {name for group in fused for name in group}
    for name, node in layers(graph).items():
        for step in range(len(SCHEMES)):
            scheme = Scheme.parse("int8" if name in together else SCHEMES[(turn + step) % len(SCHEMES)])
            if COMFY.refusal(scheme, name, node, own) is None:
                act: Rounding = "i8" if scheme.kind == "int" and own != ENCODER else 16  # as ComfyUI has it
                choices[name], turn = LayerChoice(scheme, act), turn + step + 1
                break
    state = net.state_dict()
    weights = {n: quantize_weight(state[f"{n}.weight"].float(), c.weight) for n, c in choices.items()}
    return Exported(net, QuantConfig(fingerprint(net), choices), graph, weights)


def rounded(act: Rounding, layer: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A layer's inputs as it takes them."""
    return fake_quantize(args[0], act), *args[1:]


def run(folder: Path, python: Path, comfyui: Path) -> list[dict[str, Any]]:
    rows = []
    for name, make in MODELS.items():
        torch.manual_seed(SEED)
        net, call = make()
        net = net.eval().requires_grad_(False)
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
        graph = trace(net, {"input_ids": call["ids"]} if "ids" in call else None)
        one, out = exported(net, graph), folder / f"{name}.safetensors"
        comfy.check(one)
        out.unlink(missing_ok=True)
        said = comfy.write(one, out)
        for layer, choice in one.config.layers.items():
            net.get_submodule(layer).register_forward_pre_hook(partial(rounded, choice.act))
        decoded = {layer: weight.dequantize() for layer, weight in one.weights.items()}
        net.load_state_dict({f"{layer}.weight": w for layer, w in decoded.items()}, strict=False)
        rows_of = {f"rows.{place}": rows for place, rows in placed(net, decoded).items()}
        save_file({**rows_of, "output": called(net, call), **call}, folder / "wanted.safetensors")
        command = [str(python), str(ROOT / "benchmarks" / "comfyui_peer.py"), "--comfyui", str(comfyui)]
        command += ["--kind", name, "--file", str(out), "--wanted", str(folder / "wanted.safetensors")]
        command += ["--sizes", json.dumps(T5), "--out", str(folder / "out.json")]
        subprocess.run(command, check=True)
        found = json.loads((folder / "out.json").read_text())
        rows.append(
            {"model": name, "every": len(layers(graph)), "layers": len(decoded), **found, "said": said}
        )
        print(f"{name}: {found['wrong']} of {found['numbers']} numbers differ", flush=True)
    return rows


def placed(net: Any, decoded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The decoded weights as they lie in the file: by the names of its layers."""
    from aquabit.exports.comfy_names import plan_of

    found = {}
    for place in plan_of(net).places:
        layers_of = [part.removesuffix(".weight") for part in place.parts]
        if all(layer in decoded for layer in layers_of):
            rows = torch.cat([decoded[layer] for layer in layers_of])
            whole = torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows
            found[place.name.removesuffix(".weight")] = whole.clone()
    return found


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# Files for ComfyUI, loaded by ComfyUI\n",
        f"`{found['command']}` on {about(found['machine'])}. Every layer at one of ComfyUI's formats in turn,"
        " int8 of Flux with inputs at i8;"
        " the file read by ComfyUI's own loader on a CPU, which recognizes the model by names and sizes."
        " Numbers of the decoded weights (in float32) that differ from ours; the largest difference of its"
        " outputs beside those of diffusers and transformers with our weights, of the largest output. What it"
        " imports of torchvision and torchaudio is left out: neither model uses it.\n",
        "| model | recognized as | loaded by | layers | numbers | differ | weights in | outputs | of |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        by = ", ".join(f"{name} {number}" for name, number in r["versions"].items())
        lines.append(
            f"| {r['model']} | {r['known']} | {by} | {r['layers']} of {r['every']} | {r['numbers']:,} |"
            f" {r['wrong']} | {r['dtype']} | {r['change']:.1e} | {r['output']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    made = parser(__doc__, ["run"], folder="comfyui-runs")
    made.add_argument("--comfyui", type=Path, required=True)
    made.add_argument("--python", type=Path, default=Path(sys.executable))
    given = parsed(made)
    rows = run(given.folder, given.python, given.comfyui)
    write_results("comfyui", "python benchmarks/comfyui.py run --comfyui DIR", {"rows": rows}, markdown)


if __name__ == "__main__":
    main()
