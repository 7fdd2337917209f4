"""Options of the command line, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aquabit.budget import OTHERS
from aquabit.cli.progress import tell
from aquabit.scheme import LOWER_IS_BETTER, SCHEDULERS
from aquabit.targets import TARGETS
from aquabit.user_code import names_function


def _announced(model: str | None) -> str | None:
    """Say on standard error that a model is code, which runs now."""
    if model is not None and names_function(model):
        tell(None, f"running your code: {model}")
    return model


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=(
            "A bundled name (see `aquabit models`), a diffusers directory, a hub id, a file of weights"
            " (--base), or module:function, a function of yours that returns an aquabit.Model."
        ),
        callback=_announced,
    ),
]
Variant = Annotated[
    str | None,
    typer.Option("--variant", help="Which files of MODEL are meant, as fp16 for *.fp16.safetensors."),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="DIR|ID",
        help="The pipeline that MODEL, a file of weights (.safetensors, .gguf), belongs to.",
    ),
]
OwnModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FUNCTION",
        help=(
            "The function that returns the aquabit.Model which was measured or packed: no file says what code"
            " to run."
        ),
        callback=_announced,
    ),
]
Component = Annotated[
    str | None,
    typer.Option(
        "--component",
        metavar="NAME[,NAME]",
        help="What of MODEL is quantized, as text_encoder; by default its denoiser, or all of them.",
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="A LoRA (.safetensors) that is fused with the model's weights first; may be repeated.",
    ),
]
StudyFile = Annotated[Path, typer.Argument(metavar="S.db", help="A study made by `aquabit measure`.")]
Json = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", help="Write JSON for machines to FILE, or to standard output for -."
    ),
]
Bits = Annotated[float, typer.Option("--bits", help="Budget in bits per weight; codebooks and scales count.")]
Samples = Annotated[
    int,
    typer.Option(
        "--samples",
        min=0,
        help="Configurations of the design, in total; 0: probes alone, which search needs.",
    ),
]
Images = Annotated[int, typer.Option("--images", min=2, help="Images per configuration.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Denoising steps.")]
Scheduler = Annotated[str, typer.Option("--scheduler", help=f"{', '.join(('default', *SCHEDULERS))}.")]
MicroBatch = Annotated[
    int,
    typer.Option("--micro-batch", min=1, help="Most images that are made together; fewer take less memory."),
]
Eta = Annotated[float, typer.Option("--eta", help="DDIM's noise: 0 is deterministic.")]
Seed = Annotated[
    int, typer.Option("--seed", help="Seed of the first image, and of the random configurations.")
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Processes; default: the processor's cores on a CPU, else 1."),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")]
Damages = Annotated[
    str | None,
    typer.Option(
        "--damages",
        help=(
            "Where what each (layer, scheme) does alone comes from: gradients (a few backward passes through"
            " the sampler, whatever the number of layers and schemes), or probes (images of each); default:"
            " what the study has, else gradients."
        ),
    ),
]
Within = Annotated[
    str | None,
    typer.Option(
        "--within",
        metavar="TIME",
        help=(
            "A time to fit, as 20min or 2h: samples, swaps, images, steps and formats that were not given"
            " are lowered until the plan fits."
        ),
    ),
]
Fits = Annotated[
    str | None,
    typer.Option(
        "--fits",
        help=(
            "Which additive formats are fitted: all, or wanted (only to layers where a configuration near"
            " --bits is expected to want them; half of the time of fits). Default: as begun, else all."
        ),
    ),
]
Prompts = Annotated[Path | None, typer.Option("--prompts", help="One prompt a line (UTF-8).")]
Guidance = Annotated[float, typer.Option("--guidance", help="Classifier-free guidance; 1 is off.")]
SpaceFile = Annotated[
    Path | None,
    typer.Option(
        "--space",
        help=(
            "JSON: schemes, levels (code bits of additive formats), formats, activations, pinned, excluded,"
            " correction, step_groups, tied."
        ),
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help=(
            f"Only what this program can hold of each layer: {', '.join(TARGETS)} (everything); what it"
            " keeps dense stays so, layers that it fuses choose together."
        ),
    ),
]
Objective = Annotated[
    str,
    typer.Option(
        "--objective",
        help=(
            f"{', '.join(LOWER_IS_BETTER)}, or a --metric; what it needs is said. Without real images fid"
            " becomes mse."
        ),
    ),
]
Bank = Annotated[
    Path | None,
    typer.Option("--bank", help="Folder of fitted weights; default: AQUABIT_BANK, or ~/.cache/aquabit/bank."),
]
Correction = Annotated[
    str | None,
    typer.Option(
        "--correction",
        help=(
            "Measure every configuration after this correction of its noise, as cnc+bc; twice the time."
            " Default: none, or as the study was begun."
        ),
    ),
]
StepGroups = Annotated[
    str | None,
    typer.Option(
        "--step-groups",
        help=(
            "First steps of 2 to 5 groups of steps, as 0,5: activation bits may change between them (search"
            " --bops)."
        ),
    ),
]
Front = Annotated[
    int,
    typer.Option(
        "--front",
        min=0,
        max=OTHERS,
        help="Other budgets that are answered and measured, too, the nearest first; 0: this one alone.",
    ),
]
Swap = Annotated[
    str | None,
    typer.Option(
        "--swap",
        help="A:B, the two schemes a layer is swapped between; default: usq4h:usq2h, or what the space has.",
    ),
]
Estimator = Annotated[
    str,
    typer.Option(
        "--estimator",
        help=(
            "What is fitted: gbdt (boosted trees), ridge_one_hot, sum_of_damages, average_bits, graph_network"
            " (minutes)."
        ),
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        "--reference",
        metavar="DIR",
        help="Folder of real images, for fid and its like; their statistics are kept in the bank.",
    ),
]
Features = Annotated[
    list[str] | None,
    typer.Option(
        "--features",
        metavar="NAME=PATH",
        help=(
            "inception=FILE (inception-2015-12-05.pt, or FILE@SHA256; default: AQUABIT_INCEPTION), clip=DIR,"
            " dinov2=DIR (transformers), lpips=FILE (safetensors), effnet (needs the extra `effnet`); may be"
            " repeated."
        ),
    ),
]
Resolution = Annotated[
    int | None,
    typer.Option("--resolution", min=1, help="Side of the images in pixels; default: the model's own."),
]
Frames = Annotated[
    int | None, typer.Option("--frames", min=1, help="Frames of each video; default: the model's own.")
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        metavar="DIR",
        help=(
            "Folder of pictures that images are made from, image i from picture i; cat.mask.png and cat.txt"
            " (its prompt) belong to cat.png."
        ),
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength", help="How far from its picture an image may be, up to 1; default: the pipeline's own."
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Settings of a paper's table (see `aquabit models`), where no option is given for them.",
    ),
]
Metric = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="MODULE:FUNCTION",
        help=(
            "A function of images, full-precision images [n, 3, h, w] and conditions, one number an image;"
            " its .direction is min or max. May be repeated, and be the --objective."
        ),
    ),
]
ConfigFile = Annotated[
    Path, typer.Argument(metavar="config.json", help="A configuration, as `aquabit search --out` writes it.")
]
MemoryPeaks = Annotated[
    bool, typer.Option("--memory", help="Peak memory of measuring, quantizing and running packed instead.")
]
Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="The original checkpoint: .ckpt (read as tensors alone) or .safetensors."
    ),
]
Contexts = Annotated[
    int,
    typer.Option(
        "--contexts",
        min=0,
        help=(
            "Good configurations in which every layer's swap is run on stored inputs, a fifteenth of a"
            " measurement each: truer effects."
        ),
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Measure on a Ray cluster: auto, local, host:port; a worker for each GPU, or CPU slot.",
    ),
]
MLflow = Annotated[
    str | None,
    typer.Option("--mlflow", metavar="URI", help="Log to this MLflow server, too (the extra mlflow)."),
]
PlanOnly = Annotated[
    bool,
    typer.Option(
        "--plan",
        help=(
            "Say what there is to measure and fit, and time and disk it takes (an estimate); measure nothing."
        ),
    ),
]
PackedMemory = Annotated[
    str,
    typer.Option(
        "--memory",
        help="packed: no dense weights; auto: up to a quarter of them, where that saves most time.",
    ),
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Components wait on the CPU and are on the GPU only while they run.")
]
BenchFolder = Annotated[
    Path | None,
    typer.Argument(metavar="[DIR]", help="A packed artifact: whole denoiser calls instead of single layers."),
]
Formats = Annotated[str | None, typer.Option("--formats", help="Comma-separated schemes, as usq4,aq2x8g8.")]
Shapes = Annotated[
    str | None, typer.Option("--shapes", help="Comma-separated OUTxIN@TOKENS and OUTxINxKHxKW@SIDE.")
]
Correct = Annotated[
    bool,
    typer.Option(
        "--correct",
        help="Correct the noise of quantization (PTQD), as the configuration or --correction says.",
    ),
]
