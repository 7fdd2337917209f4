"""A denoiser as another program runs it, called when asked; started by benchmarks/kernel_denoiser_peers.py
with the Python that has the program.

Reads a folder with the denoiser's config.json and a call (call.safetensors). Its weights are random: no time
depends on them. Writes a line of JSON once it can be called, then, for every line of standard input, an empty
line after a call. It imports nothing of aquabit.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

Call = Callable[[], Any]
Ready = Callable[[Call, dict[str, Any]], None]  # given a call and what is to be said, answers until the end


def inputs(folder: Path, dtype: Any) -> dict[str, Any]:
    from safetensors.torch import load_file

    call = load_file(folder / "call.safetensors")
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in call.items()}


def reuse_memory() -> None:
    """What aquabit asks of glibc in its own process: freed activations stay for the next operation."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)
        mallopt(-1, 256 << 20)


def denoiser(folder: Path, dtype: Any) -> Any:
    """Of that configuration; weights are normal, of a size that keeps outputs finite."""
    import diffusers
    import torch
    from accelerate import init_empty_weights

    config = json.loads((folder / "config.json").read_text())
    kind = getattr(diffusers, config.pop("class"))
    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        net = kind(**config)
    for name, parameter in list(net.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        shape = parameter.shape
        value = torch.ones(shape) if parameter.ndim == 1 and leaf == "weight" else 0.02 * torch.randn(shape)
        setattr(net.get_submodule(owner), leaf, torch.nn.Parameter(value.to(dtype), requires_grad=False))
    return net.eval()


def dense(folder: Path, form: str, threads: int, ready: Ready) -> None:
    """As diffusers has it, in that type."""
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, form)
    net, call = denoiser(folder, dtype), inputs(folder, dtype)
    with torch.inference_mode():
        ready(lambda: net(**call, return_dict=False)[0], {"quantized": "nothing"})


def torchao(folder: Path, form: str, threads: int, ready: Ready) -> None:
    """Linear layers with int8 weights and activations; convolutions as they are; the whole compiled."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    dtype = getattr(torch, form)
    torch.set_num_threads(threads)
    net = denoiser(folder, dtype)
    quantize_(net, Int8DynamicActivationInt8WeightConfig())
    call, run = inputs(folder, dtype) | {"return_dict": False}, torch.compile(net, dynamic=False)
    layers = sum(type(m.weight).__name__ != "Parameter" for m in net.modules() if type(m) is torch.nn.Linear)
    with torch.no_grad():
        run(**call)  # compiles
        ready(lambda: run(**call), {"quantized": f"{layers} Linear layers, weights and activations"})


def sdnq(folder: Path, form: str, threads: int, ready: Ready) -> None:
    """Linear layers and convolutions, with its own int8 product of quantized activations; OpenVINO, which
    computes it, takes every core there is."""
    import torch

    torch.set_num_threads(threads)
    from sdnq import sdnq_post_load_quant

    net = sdnq_post_load_quant(
        denoiser(folder, torch.float32),
        weights_dtype=form,
        group_size=-1,
        quant_conv=True,
        use_quantized_matmul=True,
        use_quantized_matmul_conv=True,
        add_skip_keys=False,
    )
    call = inputs(folder, torch.float32)
    layers = sum(type(m).__name__.startswith("SDNQ") for m in net.modules())
    with torch.no_grad():
        net(**call)  # compiles
        ready(
            lambda: net(**call, return_dict=False)[0],
            {"quantized": f"{layers} layers, weights and activations"},
        )


def openvino(folder: Path, form: str, threads: int, ready: Ready) -> None:
    """``int8``: weights and activations by NNCF after a few random calls; the file is kept in the folder."""
    import openvino as ov

    core, file = ov.Core(), folder / f"openvino-{form}.xml"
    if not file.exists():
        _convert(folder, form, file)
    model = core.read_model(file)
    quantized = sum(op.get_type_name() == "FakeQuantize" for op in model.get_ops())
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    compiled = core.compile_model(model, "CPU", settings)
    del model
    import torch

    call = {n: t.numpy() for n, t in inputs(folder, torch.float32).items()}
    given = {port: call[port.get_any_name()] for port in compiled.inputs}
    request = compiled.create_infer_request()
    ready(
        lambda: request.infer(given, share_inputs=True, share_outputs=True),
        {
            "quantized": f"{quantized} places quantized, weights and activations" if quantized else "nothing",
            "precision": str(compiled.get_property("INFERENCE_PRECISION_HINT")),
        },
    )


def _convert(folder: Path, form: str, file: Path) -> None:
    import openvino as ov
    import torch

    net, call = denoiser(folder, torch.float32), inputs(folder, torch.float32)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return self.net(**dict(zip(call, given, strict=True)), return_dict=False)[0]

    with torch.no_grad():
        model = ov.convert_model(
            Positional(), example_input=tuple(call.values()), input=[list(t.shape) for t in call.values()]
        )
    for port, name in zip(model.inputs, call, strict=True):
        port.get_tensor().set_names({name})
    if form == "int8":
        import nncf

        torch.manual_seed(1)
        several = [
            {n: (torch.randn(t.shape) if t.is_floating_point() else t).numpy() for n, t in call.items()}
            for _ in range(CALIBRATION)
        ]
        model = nncf.quantize(
            model,
            nncf.Dataset(several),
            subset_size=CALIBRATION,
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )  # it changes values alone, and takes minutes
    ov.save_model(model, file.with_suffix(".part.xml"), compress_to_fp16=False)
    file.with_suffix(".part.bin").replace(file.with_suffix(".bin"))
    file.with_suffix(".part.xml").replace(file)


CALIBRATION = 2


def sdcpp(folder: Path, form: str, threads: int, ready: Ready) -> None:
    """One long generation of 512 x 512 pixels without guidance, a step each time it is asked: it waits in the
    function that it reports a step to, so that neither its text encoder nor its decoder is timed."""
    import stable_diffusion_cpp as sd

    for network in ("clip", "vae"):
        if not (folder / f"{network}.safetensors").exists():
            _beside(folder, network)
    model = sd.StableDiffusion(
        diffusion_model_path=str(folder / f"{form}.gguf"),
        model_path=str(folder / "clip.safetensors"),
        vae_path=str(folder / "vae.safetensors"),
        n_threads=threads,
        vae_decode_only=True,
        verbose=True,
    )
    asked, done = threading.Semaphore(0), threading.Semaphore(0)

    def reported(step: int, steps: int, seconds: float) -> None:
        done.release()
        asked.acquire()

    generation = threading.Thread(
        target=model.generate_image,
        kwargs={"prompt": "a cat", "sample_steps": 1000, "cfg_scale": 1.0, "sample_method": "euler"}
        | {"width": 512, "height": 512, "progress_callback": reported},
        daemon=True,
    )
    generation.start()
    done.acquire()  # before the first step

    def step() -> None:
        asked.release()
        done.acquire()

    ready(step, {"quantized": "Linear layers' weights, and activations in products of them"})


def _beside(folder: Path, network: str) -> None:
    """A text encoder and a decoder of Stable Diffusion's sizes, of random weights."""
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    if network == "clip":
        net = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        prefix = "cond_stage_model.transformer.text_model."  # as a whole checkpoint has it
    else:
        prefix = ""
        net = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
    state = net.state_dict()
    state = {prefix + n.removeprefix("text_model."): t.half().contiguous() for n, t in state.items()}
    save_file(state, folder / f"{network}.part")
    (folder / f"{network}.part").replace(folder / f"{network}.safetensors")


# program -> how it is run, the packages that count
PROGRAMS: dict[str, tuple[Callable[[Path, str, int, Ready], None], tuple[str, ...]]] = {
    "dense": (dense, ("diffusers", "torch")),
    "torchao": (torchao, ("torchao", "torch")),
    "openvino": (openvino, ("openvino", "nncf")),
    "sdnq": (sdnq, ("sdnq", "openvino", "torch")),
    "stable-diffusion.cpp": (sdcpp, ("stable-diffusion-cpp-python",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", required=True, choices=PROGRAMS)
    parser.add_argument("--form", required=True, help="its type or format")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what programs print is no answer
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(given.folder / "inductor")  # compiled once
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    run, packages = PROGRAMS[given.program]

    def ready(call: Call, about: dict[str, Any]) -> None:
        versions = {p: version(p) for p in packages}
        answers.write(json.dumps({"versions": versions, **about}) + "\n")
        for _ in sys.stdin:
            call()
            answers.write("\n")

    reuse_memory()
    run(given.folder, given.form, given.threads, ready)
    os._exit(0)  # a generation that waits is not ended


if __name__ == "__main__":
    main()
