"""What an SDXL-sized model and the bundled ones cost on one GPU, and whether they say there what they say on
the CPU: python benchmarks/gpu.py [--device cuda] [--size sdxl|tiny] bundled sdxl

bundled  uniform configurations of both models measured on the CPU and on the device: the same images, up to
         rounding; seconds of a configuration; images of the packed model beside those of the decoded one
sdxl     a pipeline with the layers of SDXL (U-Net and VAE whole, text encoders of one layer) and random
         weights, in float16 at 512 pixels: seconds of fits, of configurations, of packing, of a denoiser call
         dense and packed, and peak memory of the device beside what `aquabit inspect --memory` expects.
         Random weights say nothing about quality; errors of packed images are those of the kernels.

Writes benchmarks/results/gpu.json and gpu.md. ``--size tiny --device cpu`` tries the same code without a GPU.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import aquabit
from aquabit.graph import layers as graph_layers
from aquabit.measuring.evaluator import Evaluator
from aquabit.memory import peaks
from aquabit.packing import quantize
from aquabit.pipelines import Adapter, denoiser_of, load, trace
from aquabit.quant.bank import Bank
from aquabit.quant.kernel_tuning import layers_of
from aquabit.quant.layers import resident_bytes
from aquabit.quant.model import fingerprint
from aquabit.scheme import Calibration, Protocol
from aquabit.space import make_space
from benchmarks.common import MODELS, RESULTS, parser, read, write_results

PROMPTS = ("a cat", "two dogs", "a red car", "the sea")
UNIFORM = ("usq4", "usq3", "usq2")
CALLS = 10
SCHEMES = ("usq4", "usq3h", "aq2x8g8")  # of which fits are timed
FITTED = {"usq4": 12, "usq3h": 12, "aq2x8g8": 2}  # layers a scheme
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY = SDXL | {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 2, 2),
    "cross_attention_dim": 48,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
WIDTHS = {"sdxl": (768, 1280), "tiny": (16, 32)}  # of the two text encoders
PIXELS = {"sdxl": 512, "tiny": 32}
IMAGES = {"sdxl": 128, "tiny": 4}


# ---- a pipeline of SDXL's size


def filled(make: Callable[[], nn.Module], device: str, dtype: torch.dtype, seed: int) -> nn.Module:
    """A network in one copy on the device, with random weights that keep the size of what goes through."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = make().eval()
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            spread, middle = (p[0].numel() ** -0.5, 0.0) if p.ndim > 1 else (0.05, float(name == "weight"))
            value = torch.empty(p.shape, device=device).normal_(middle, spread, generator=generator)
            module._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)
    return model.to(device)


def encoder(width: int, projected: bool) -> nn.Module:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def save_pipeline(folder: Path, size: str, device: str) -> None:
    """A StableDiffusionXLPipeline in float16, with the tokenizer of the tests (letters)."""
    import diffusers

    from tests.tiny_pipelines import clip_tokenizer, ddim

    dtype = half_of(device)
    unet = SDXL if size == "sdxl" else TINY
    vae = VAE if size == "sdxl" else VAE | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    first, second = WIDTHS[size]
    pipe = diffusers.StableDiffusionXLPipeline(
        filled(lambda: diffusers.AutoencoderKL(**vae), device, dtype, 1),
        encoder(first, False).to(device, dtype),
        encoder(second, True).to(device, dtype),
        clip_tokenizer(),
        clip_tokenizer(),
        filled(lambda: diffusers.UNet2DConditionModel(**unet), device, dtype, 0),
        ddim(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder, max_shard_size="2GB")


def half_of(device: str) -> torch.dtype:
    """float16 where it is fast."""
    return torch.float32 if device == "cpu" else torch.float16


# ---- time and memory


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds and the device's peak of what is done inside."""

    seconds = 0.0
    bytes = 0


@contextmanager
def timed(device: str) -> Iterator[Clock]:
    clock = Clock()
    synchronize(device)
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    yield clock
    synchronize(device)
    clock.seconds = time.perf_counter() - began
    clock.bytes = 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Median of calls, after one that is not counted."""
    call()
    times = []
    for _ in range(CALLS):
        with timed(device) as clock:
            call()
        times.append(1e3 * clock.seconds)
    return median(times)


def psnr(a: Tensor, b: Tensor) -> float:
    error = float((a.double() - b.double()).square().mean())
    return 200.0 if error == 0 else -10 * torch.tensor(error).log10().item()


# ---- the parts


def bundled(device: str, size: str, folder: Path) -> list[dict[str, Any]]:
    """One row a model and dtype."""
    rows = []
    half = [] if device == "cpu" else [(device, "float16")]
    for name in MODELS:
        opened = load(name)
        graph, own = trace(opened), fingerprint(denoiser_of(opened))
        space, bank = make_space(graph, own, name, schemes=UNIFORM), Bank(folder / f"bank-{name}")
        configs = [space.full_precision(), *(space.uniform(s) for s in UNIFORM)]
        found: dict[str, Any] = {}
        for where, dtype in (("cpu", "float32"), (device, "float32"), *half):
            protocol = Protocol(images=IMAGES[size], steps=10, objective="psnr", dtype=dtype)
            evaluator = Evaluator(name, graph, bank, own, where, dtype)
            measured = [evaluator.measure(c, protocol).measurement for c in configs]
            found[f"{where} {dtype}"] = {
                "psnr": [m.metrics["psnr"] for m in measured[1:]],
                "fid": [m.metrics["fid"] for m in measured],
                "seconds": median(m.seconds for m in measured),
            }
        packed, images = str(folder / f"packed-{name}"), {}
        quantize(name, space.uniform("usq4"), bank=str(bank.folder)).save(packed)
        for where in ("cpu", device):
            with timed(where) as clock:
                made = aquabit.generate(packed, IMAGES[size], steps=10, device=where)
            images[where] = made.cpu()
            found[f"packed {where}"] = {"seconds": clock.seconds}
        rows.append(
            {
                "model": name,
                "configurations": ["fp", *UNIFORM],
                "measured": found,
                "packed_psnr": psnr(images["cpu"], images[device]),
            }
        )
        print(rows[-1], flush=True)
    return rows


def sdxl(device: str, size: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"size": size}
    where, bank = str(folder / "model"), Bank(folder / "bank")
    save_pipeline(Path(where), size, device)
    dtype = half_of(device)
    protocol = Protocol(
        images=4,
        steps=4,
        micro_batch=4,
        objective="psnr",
        guidance=5.0,
        conditions=PROMPTS,
        resolution=PIXELS[size],
        dtype=str(dtype).split(".")[1],
    )
    with timed(device) as clock:
        pipe = load(where)
        graph, own = trace(pipe), fingerprint(denoiser_of(pipe))
    del pipe
    found["tracing"] = clock.seconds  # loaded on the CPU
    space = make_space(graph, own, where, schemes=SCHEMES, calibration=Calibration.of(protocol))
    found |= {"layers": len(graph_layers(graph)), "weights": graph.graph["weights"]}
    expected = peaks(graph, guided=True, micro_batch=1)  # four images of half the side
    found["expected"] = [p.to_dict() for p in expected if p.dtype == protocol.dtype]
    with timed(device) as clock:
        evaluator = Evaluator(where, graph, bank, own, device, protocol.dtype)
    found["loading"] = {"seconds": clock.seconds, "bytes": clock.bytes}
    print(found, flush=True)
    full = space.full_precision()
    call = evaluator.adapter.first_call(protocol)
    found["call_ms"] = {"dense": milliseconds(call, device)}
    found["fits"] = [fits(evaluator, space, s, protocol, device) for s in SCHEMES[:2]]
    configs = {
        "full precision": full,
        "usq4, a16": space.uniform("usq4", 16),
        "usq4, a8": space.uniform("usq4", 8),
    }
    images: dict[str, Tensor] = {}
    with timed(device) as clock:
        evaluator.quantized.prepare(configs["usq4, a16"])
    found["fitting_all"] = {"scheme": "usq4", "seconds": clock.seconds, "bytes": clock.bytes}
    found["configurations"] = []
    for name, config in configs.items():
        with timed(device) as clock:
            images[name] = evaluator.generate(config, protocol).cpu()
        found["configurations"].append({"name": name, "seconds": clock.seconds, "bytes": clock.bytes})
        print(found["configurations"][-1], flush=True)
    with timed(device) as clock:
        evaluator.generate(configs["usq4, a16"], protocol)  # every layer changes from a8 to a16: weights stay
    found["configurations"].append(
        {"name": "usq4, a16 again", "seconds": clock.seconds, "bytes": clock.bytes}
    )
    if device != "cpu":
        torch.cuda.empty_cache()
    with timed(device) as clock:
        packed = quantize(where, configs["usq4, a16"], bank=str(bank.folder), device=device)
    found["quantize"] = {"seconds": clock.seconds, "bytes": clock.bytes}
    with timed(device) as clock:
        packed.save(folder / "packed")
    found["quantize"]["saving"] = clock.seconds
    found["quantize"]["artifact"] = sum(
        f.stat().st_size for f in (folder / "packed" / "unet").glob("*.safetensors")
    )
    print(found["quantize"], flush=True)
    del packed
    adapter = Adapter(load(str(folder / "packed"), device, dtype))
    with timed(device) as clock:
        images["packed"] = adapter.images(protocol, range(4)).cpu()
    found["packed"] = {"first_images": clock.seconds}  # kernels are compiled and tuned
    with timed(device) as clock:
        adapter.images(protocol, range(4))
    found["packed"] |= {"images": clock.seconds, "bytes": clock.bytes}
    found["call_ms"]["packed"] = milliseconds(adapter.first_call(protocol), device)
    found["packed"]["weights"] = resident_bytes(layers_of(adapter.network).values())
    found["finite"] = {name: bool(x.isfinite().all()) for name, x in images.items()}
    for name in ("full precision", "usq4, a16"):
        found[f"packed beside {name}"] = psnr(images[name], images["packed"])
    found["usq4 beside full precision"] = psnr(images["full precision"], images["usq4, a16"])
    print(found, flush=True)
    del adapter
    found["fits"].append(fits(evaluator, space, SCHEMES[2], protocol, device))
    return found


def fits(evaluator: Evaluator, space: Any, scheme: str, protocol: Protocol, device: str) -> dict[str, Any]:
    """Seconds of fitting FITTED layers, spread over the model, with a scheme, and of one probe."""
    names = [n for n, row in space.choices.items() if scheme in map(str, row)]
    apart = len(names) // FITTED[scheme]
    names = names[apart // 2 :: apart][: FITTED[scheme]]
    uniform = space.uniform(scheme, 16)
    config = replace(uniform, layers={n: uniform.layers[n] for n in names})
    with timed(device) as clock:
        evaluator.quantized.prepare(config)
    weights = sum(evaluator.quantized.layers[n].weight.numel() for n in names)
    row = {"scheme": scheme, "layers": len(names), "weights": weights, "seconds": clock.seconds}
    evaluator.fit({names[0]: [scheme]}, {names[0]: ()}, (16,), protocol, space.calibration)
    with timed(device) as clock:
        asked = {n: [scheme] for n in names}
        evaluator.fit(asked, dict.fromkeys(names, ()), (16,), protocol, space.calibration)
    row |= {"probe": clock.seconds / len(names), "bytes": clock.bytes}
    print(row, flush=True)
    return row


PARTS: dict[str, Callable[[str, str, Path], Any]] = {"bundled": bundled, "sdxl": sdxl}


def markdown(found: dict[str, Any]) -> str:
    lines = [f"# On a GPU\n\n{found['device']}. Made by `{found['command']}`.\n"]
    if "bundled" in found:
        lines += [
            "## Bundled models\n",
            "128 images, 10 steps; median seconds of a configuration. PSNR to full precision of the same"
            " dtype and device.\n",
            f"| model | where | seconds | PSNR of {', '.join(UNIFORM)} |",
            "|---|---|---|---|",
        ]
        for row in found["bundled"]:
            for where, value in row["measured"].items():
                quality = ", ".join(f"{v:.2f}" for v in value.get("psnr", ()))
                lines.append(f"| {row['model']} | {where} | {value['seconds']:.2f} | {quality} |")
            lines.append(f"| {row['model']} | packed images, CPU to device | | {row['packed_psnr']:.1f} dB |")
        lines.append("")
    if "sdxl" in found:
        s = found["sdxl"]
        packed, calls = s["packed"], s["call_ms"]
        lines += [
            f"## {s['layers']} layers, {s['weights'] / 1e9:.2f} billion weights ({s['size']})\n",
            "float16, four images of 512 pixels at a time, guidance, 4 steps; random weights.\n",
            "| what | seconds | peak GB on the device |",
            "|---|---|---|",
            f"| load | {s['loading']['seconds']:.1f} | {s['loading']['bytes'] / 1e9:.1f} |",
            f"| fit usq4 to every layer | {s['fitting_all']['seconds']:.1f} |"
            f" {s['fitting_all']['bytes'] / 1e9:.1f} |",
            *(
                f"| four images, {c['name']} | {c['seconds']:.2f} | {c['bytes'] / 1e9:.1f} |"
                for c in s["configurations"]
            ),
            f"| quantize (loaded in float32) | {s['quantize']['seconds']:.1f} |"
            f" {s['quantize']['bytes'] / 1e9:.1f} |",
            f"| save the artifact, {s['quantize']['artifact'] / 1e9:.2f} GB"
            f" | {s['quantize']['saving']:.1f} | |",
            f"| four images, packed | {packed['images']:.2f} | {packed['bytes'] / 1e9:.1f} |",
            f"| the first packed ones (kernels compiled and tuned) | {packed['first_images']:.1f} | |",
            "",
            f"One denoiser call (8 samples): dense {calls['dense']:.1f} ms, packed {calls['packed']:.1f} ms"
            f" ({calls['dense'] / calls['packed']:.2f} times as fast); weights resident"
            f" {2 * s['weights'] / 1e9:.2f} and {packed['weights'] / 1e9:.2f} GB.",
            f"Packed images differ from those of the same weights decoded by"
            f" {s['packed beside usq4, a16']:.1f} dB, those from full precision by"
            f" {s['usq4 beside full precision']:.1f} dB.\n",
            "| scheme | layers fitted | million weights | seconds | all weights at that rate | a probe, s |",
            "|---|---|---|---|---|---|",
            *(
                f"| {f['scheme']} | {f['layers']} | {f['weights'] / 1e6:.1f} | {f['seconds']:.1f} |"
                f" {f['seconds'] / f['weights'] * s['weights']:.0f} | {f['probe']:.2f} |"
                for f in s["fits"]
            ),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    made = parser(__doc__, list(PARTS))
    made.add_argument("--device", default="cuda")
    made.add_argument("--size", default="sdxl", choices=list(PIXELS))
    made.add_argument("--results", type=Path, default=RESULTS)
    given = made.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; --device cpu --size tiny tries the code without one")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else "CPU"
    for part in given.parts:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[part](given.device, given.size, Path(folder))
        whole = read(given.results / "gpu.json") | {part: found, "device": name}
        write_results("gpu", f"python {' '.join(sys.argv)}", whole, markdown, given.results)
    print(markdown(read(given.results / "gpu.json")))


if __name__ == "__main__":
    main()
