"""Peak memory of quantizing a large model: python benchmarks/scale.py [--dtypes float32 bfloat16] [--ways
model folder memory stream] [--blocks 28] [--scheme usq4]

model    every layer of a random DiT-XL/2 (255 layers, 675 M weights; built in place, in one copy) is fitted
         into an empty bank and packed
memory   peaks of measuring, quantizing and running packed on the bundled models, beside what `aquabit inspect
         --memory` says (no target)
folder   the same model saved as a pipeline of bfloat16 shards, quantized and saved by what `aquabit quantize`
         calls, which loads it in float32
stream   a random DiT of --blocks blocks of a DiT-XL/2, written to bfloat16 and to float32 shards tensor by
         tensor, so that it is nowhere in memory; then quantized and saved by what `aquabit quantize` calls

Each in a fresh process, one thread; the peak is ru_maxrss, all of the process: libraries, model, mapped
files. Target: below the model's size in memory + 2 GB. Of ``stream`` it is the most of RssAnon, looked at 50
times a second: memory that the system cannot take back, which the pages of mapped files are not. Target:
below the largest block + 1 GB. Tables go to benchmarks/results/scale.json and scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.memory import elements
from benchmarks.common import RESULTS, about, parser, read, write_results

DIT_XL_2 = {
    "sample_size": 32,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "norm_elementwise_affine": False,
}
ALLOWED = 2e9  # bytes above the model's size
ALLOWED_STREAM = 1e9  # bytes above its largest block in float32
SHARD = 500e6  # bytes
ASKED = ("dtype", "scheme", "blocks")  # what a row of ``stream`` is of


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def denoiser(dtype: torch.dtype, blocks: int) -> nn.Module:
    """A random DiT-XL/2 in one copy: parameters are made in their own dtype."""
    from accelerate import init_empty_weights
    from diffusers import DiTTransformer2DModel

    with init_empty_weights(include_buffers=False):
        model = DiTTransformer2DModel(**DIT_XL_2, num_layers=blocks).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=dtype).normal_(0, 0.02, generator=generator)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    return model


def size_of(model: nn.Module) -> int:
    return sum(t.nbytes for t in model.state_dict().values())


def in_memory(dtype: torch.dtype, blocks: int, scheme: str, bank: Path) -> dict[str, Any]:
    from aquabit.pipelines import trace
    from aquabit.quant.bank import Bank
    from aquabit.quant.layers import resident_bytes
    from aquabit.quant.model import QuantizedDenoiser, fingerprint
    from aquabit.runtime import single_thread
    from aquabit.space import make_space

    libraries, model = peak(), denoiser(dtype, blocks)
    size, built, began = size_of(model), peak(), time.perf_counter()
    with single_thread("cpu"):
        graph, own = trace(model), fingerprint(model)
        quantized = QuantizedDenoiser(model, graph, Bank(bank), own)
        quantized.pack(make_space(graph, own).uniform(scheme, 16))
    return {
        "libraries": libraries,
        "model": size,
        "built": built,
        "peak": peak(),
        "seconds": time.perf_counter() - began,
        "layers": len(quantized.layers),
        "packed": resident_bytes(quantized.layers.values()),
    }


def save_folder(folder: Path, blocks: int) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    DiTPipeline(denoiser(torch.bfloat16, blocks), vae, DDIMScheduler()).save_pretrained(
        folder, max_shard_size="500MB"
    )


def from_folder(folder: Path, scheme: str, bank: Path) -> dict[str, Any]:
    from aquabit.packing import quantize
    from aquabit.pipelines import denoiser_of, load, trace
    from aquabit.quant.model import fingerprint
    from aquabit.space import make_space

    libraries, config = peak(), folder / "config.json"
    if not config.exists():
        pipe = load(str(folder))
        config.write_text(
            make_space(trace(pipe), fingerprint(denoiser_of(pipe))).uniform(scheme, 16).to_json()
        )
        return {}
    from aquabit.scheme import QuantConfig

    began = time.perf_counter()
    packed = quantize(str(folder), QuantConfig.load(config), bank=str(bank))
    packed.save(folder / "packed")
    graph = trace(packed.pipe)
    size = 4 * (graph.graph["weights"] + graph.graph["other_elements"])
    return {
        "libraries": libraries,
        "model": size,
        "built": None,
        "peak": peak(),
        "seconds": time.perf_counter() - began,
        "layers": len(packed.model.layers),
        "packed": sum(f.stat().st_size for f in (folder / "packed" / "transformer").glob("*.safetensors")),
    }


def write_shards(folder: Path, dtype: torch.dtype, blocks: int) -> None:
    """A pipeline folder with a random denoiser, a shard at a time."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    from safetensors.torch import save_file

    with init_empty_weights():
        model = DiTTransformer2DModel(**DIT_XL_2, num_layers=blocks)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = DiTPipeline(model, vae, DDIMScheduler())
    pipe.save_config(folder)
    for name in ("vae", "scheduler"):
        getattr(pipe, name).save_pretrained(folder / name)
    own = folder / "transformer"
    model.save_config(own)
    generator, shards, size = torch.Generator().manual_seed(0), [[]], 0
    for name, tensor in model.state_dict().items():
        if size > SHARD:
            shards, size = [*shards, []], 0
        shards[-1].append((name, tensor.shape))
        size += tensor.numel() * dtype.itemsize
    places = {}
    for i, part in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{i:05}-of-{len(shards):05}.safetensors"
        made = {n: torch.empty(s, dtype=dtype).normal_(0, 0.02, generator=generator) for n, s in part}
        save_file(made, own / file, {"format": "pt"})
        places |= dict.fromkeys(made, file)
    index = {"metadata": {}, "weight_map": places}
    (own / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def name_config(folder: Path, scheme: str) -> dict[str, Any]:
    """Write the configuration; the float32 bytes of the model and of its largest block."""
    from aquabit.pipelines import denoiser_of, load, trace
    from aquabit.quant.model import fingerprint
    from aquabit.space import make_space

    pipe = load(str(folder))
    config = make_space(trace(pipe), fingerprint(denoiser_of(pipe))).uniform(scheme, 16)
    (folder / "config.json").write_text(config.to_json())
    blocks = denoiser_of(pipe).transformer_blocks
    return {"model": 4 * elements([denoiser_of(pipe)]), "block": 4 * max(elements([b]) for b in blocks)}


def streamed(folder: Path, bank: Path) -> dict[str, Any]:
    from aquabit.packing import quantize
    from aquabit.scheme import QuantConfig

    began = time.perf_counter()
    packed = quantize(str(folder), QuantConfig.load(folder / "config.json"), bank=str(bank))
    written = packed.save(folder / "packed")
    return {"seconds": time.perf_counter() - began, "packed": written}


TASKS = ("measure", "quantize", "run packed")


def bundled(name: str, task: str, bank: Path) -> dict[str, Any]:
    """One task on a bundled model, with the protocol's micro-batch of 64, beside what is expected."""
    from aquabit.measuring.evaluator import Evaluator
    from aquabit.measuring.model import open_model
    from aquabit.memory import peaks
    from aquabit.packing import quantize
    from aquabit.pipelines import Adapter
    from aquabit.quant.bank import Bank
    from aquabit.runtime import single_thread
    from aquabit.scheme import Calibration, Protocol
    from aquabit.space import make_space

    libraries, opened, protocol = peak(), open_model(name), Protocol(images=64, steps=2)
    space = make_space(opened.graph, opened.fingerprint, name, calibration=Calibration.of(protocol))
    if task == "measure":
        evaluator = Evaluator(name, opened.graph, Bank(bank), opened.fingerprint)
        for config in [space.full_precision(), space.uniform("usq4"), space.uniform("usq3h")]:
            evaluator.measure(config, protocol)
    else:
        packed = quantize(name, space.uniform("usq4"), bank=str(bank))
        if task == "run packed":
            with single_thread("cpu"):
                Adapter(packed.pipe).images(protocol, range(64))
    reached = peak()
    expected = next(p for p in peaks(opened.graph) if p.task == task and p.dtype == "float32")
    return {
        "libraries": libraries,
        "peak": reached,
        "expected": expected.total,
        "parts": dict(expected.parts),
    }


def child(*words: str) -> dict[str, Any]:
    """What a process found, and the most that it held in memory of its own ("anonymous")."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command, held = [sys.executable, __file__, "--child", *words], 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        done = subprocess.Popen(command, stdout=out, stderr=said, text=True, env=environment)
        while done.poll() is None:
            held = max(held, anonymous(done.pid))
            time.sleep(0.02)
        out.seek(0), said.seek(0)
        if done.returncode:
            raise SystemExit(said.read())
        return {**json.loads(out.read().splitlines()[-1]), "anonymous": held}


def anonymous(process: int) -> int:
    """Bytes of a process that the system cannot take back; 0 where it is gone or the system does not say."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def beside(rows: list[dict[str, Any]]) -> list[str]:
    """What is expected beside what was measured."""
    lines = ["| model | task | measured GB | expected GB | expected / measured |", "|---|---|---|---|---|"]
    return lines + [
        f"| {r['model_name']} | {r['task']} | {r['peak'] / 1e9:.2f} | {r['expected'] / 1e9:.2f} |"
        f" {r['expected'] / r['peak']:.2f} |"
        for r in rows
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    known = [r for r in rows if r["way"] == "memory"]
    rows = [r for r in rows if r["way"] != "memory"]
    lines = [
        "| way | dtype | scheme | layers | model GB | peak GB | above the model | target | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        above = r["peak"] - r["model"]
        lines.append(
            f"| {r['way']} | {r['dtype']} | {r['scheme']} | {r['layers']} | {r['model'] / 1e9:.2f} |"
            f" {r['peak'] / 1e9:.2f} | {above / 1e9:.2f} GB, of these libraries {r['libraries'] / 1e9:.2f} |"
            f" {'kept' if above < ALLOWED else 'MISSED'} | {r['seconds'] / 60:.1f} |"
        )
    said = ["# Peak memory of quantizing a DiT-XL/2", "", *lines, ""] if rows else []
    return "\n".join(
        [*said, *(["# inspect --memory on the bundled models", "", *beside(known), ""] if known else [])]
    )


def pages(found: dict[str, Any]) -> str:
    made = markdown(found["rows"]) if found.get("rows") else ""
    if "stream" in found:
        said = ["# A model that is never in memory", "", *stream_table(found["stream"]), ""]
        said += ["Peak: memory that the system cannot take back (RssAnon), libraries included.", ""]
        made += "\n".join(said)
    return f"{made}\n{about(found['machine'])}\n"


def stream_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| stored as | scheme | blocks | model in float32, GB | largest block GB | peak GB | target |"
        " minutes | artifact GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {r['dtype']} | {r['scheme']} | {r['blocks']} | {r['model'] / 1e9:.2f} | {r['block'] / 1e9:.2f} |"
        f" {r['anonymous'] / 1e9:.2f} |"
        f" {'kept' if r['anonymous'] < r['block'] + ALLOWED_STREAM else 'MISSED'} |"
        f" {r['seconds'] / 60:.1f} | {r['packed'] / 1e9:.2f} |"
        for r in rows
    ]


def stream(dtypes: list[str], blocks: int, scheme: str, place: Path | None) -> list[dict[str, Any]]:
    rows = []
    for dtype in dtypes:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            words = (dtype, str(blocks), scheme, folder)
            child("write", *words)
            sizes = child("name", *words)
            found = {**sizes, **child("stream", *words)}
        rows.append({"dtype": dtype, "scheme": scheme, "blocks": blocks, **found})
        print(stream_table(rows[-1:])[-1], flush=True)
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments.add_argument(
        "--ways",
        nargs="+",
        default=["model", "folder", "memory", "stream"],
        choices=["model", "folder", "memory", "stream"],
    )
    arguments.add_argument("--folder", type=Path, help="where large models are written; on a disk")
    arguments.add_argument("--blocks", type=int, default=28)
    arguments.add_argument("--scheme", default="usq4")
    arguments.add_argument("--results", type=Path, default=RESULTS)
    arguments.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        way, dtype, blocks, scheme, folder = given.child
        if way == "save":
            save_folder(Path(folder), int(blocks))
            print("{}")
        elif way == "write":
            write_shards(Path(folder), getattr(torch, dtype), int(blocks))
            print("{}")
        elif way == "name":
            print(json.dumps(name_config(Path(folder), scheme)))
        elif way == "stream":
            print(json.dumps(streamed(Path(folder), Path(folder) / "bank")))
        elif way == "memory":
            print(json.dumps(bundled(dtype, scheme, Path(folder) / "bank")))
        elif way == "model":
            print(json.dumps(in_memory(getattr(torch, dtype), int(blocks), scheme, Path(folder) / "bank")))
        else:
            print(json.dumps(from_folder(Path(folder), scheme, Path(folder) / "bank")))
        return
    rows, found = [], read(given.results / "scale.json", {})
    if "stream" in given.ways:
        made = stream(given.dtypes, given.blocks, given.scheme, given.folder)
        again = [[r[k] for k in ASKED] for r in made]
        found["stream"] = [r for r in found.get("stream", ()) if [r[k] for k in ASKED] not in again] + made
    for way in [w for w in given.ways if w != "stream"]:
        for name in ("digits-dit", "digits-unet") if way == "memory" else ():
            for task in TASKS:
                with tempfile.TemporaryDirectory() as folder:
                    found = child("memory", name, "0", task, folder)
                rows.append({"way": way, "model_name": name, "task": task, "dtype": "float32", **found})
                print(beside(rows[-1:])[-1], flush=True)
        if way == "memory":
            continue
        for dtype in given.dtypes if way == "model" else ["float32"]:
            with tempfile.TemporaryDirectory() as folder:
                words = (dtype, str(given.blocks), given.scheme, folder)
                if way == "folder":
                    child("save", *words)
                    child("folder", *words)  # names the configuration: a process of its own
                rows.append(
                    {
                        "way": way,
                        "dtype": dtype,
                        "scheme": given.scheme,
                        "blocks": given.blocks,
                        **child(way, *words),
                    }
                )
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    command = f"python {' '.join(sys.argv)}"
    found |= {"rows": rows} if rows else {}
    write_results("scale", command, found, pages, given.results)


if __name__ == "__main__":
    main()
