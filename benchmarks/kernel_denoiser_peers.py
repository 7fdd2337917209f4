"""Whole denoisers beside what else runs them on a CPU: torchao, OpenVINO, SDNQ and stable-diffusion.cpp, each
in a process of its own (``kernel_denoiser_peer.py``), called in turn with ours."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from aquabit.exports.exported import Exported
from aquabit.exports.files import WRITERS
from aquabit.graph import layers, trace
from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.kernel_tuning import layers_of, place_
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError, LayerChoice, Progress, QuantConfig, Scheme
from benchmarks.kernel_models import DIT, SD15, Maker, call_of, inputs_of
from benchmarks.kernel_timing import paired, ratio, threads

HELPER = Path(__file__).parent / "kernel_denoiser_peer.py"
PINS = (
    *("torchao==0.18.0", "sdnq==0.2.8", "openvino==2026.4.1", "nncf==3.4.0"),
    *("stable-diffusion-cpp-python==0.4.7", "diffusers", "accelerate", "transformers", "torch"),
)
SD_CPP = "stable-diffusion.cpp"
GGUF = ("q2_K", "q4_0", "q8_0")
OURS = {bits: f"usq{bits} a8" for bits in (2, 4, 8)}
UNET, TRANSFORMER = "SD 1.5's U-Net at 64 x 64", "DiT-XL/2, 28 blocks"
CONFIGS = {UNET: ("sd", SD15), TRANSFORMER: ("dit", DIT)}  # with the name of the folder of its files
DENSE = (("dense", "float32"), ("dense", "bfloat16"))
FAST = (("torchao", "float32"), ("openvino", "int8"), ("sdnq", "int8"))
CASES = {  # (model, threads) -> others that are called in turn with ours: as many as 20 GB hold, then more
    (UNET, 2): (FAST, (*DENSE, *((SD_CPP, form) for form in GGUF))),
    (UNET, 1): ((*FAST[:2], DENSE[0], (SD_CPP, "q4_0")),),  # SDNQ takes all cores
    (TRANSFORMER, 2): ((*DENSE, *FAST),),
}
SECONDS = 40.0  # for the rounds of those that are called in turn
ROUNDS = (3, 12)  # besides one that is not counted
PAUSE = 0.05  # threads of torch and of OpenMP spin for a while after a call


def cases(only: str = "") -> list[tuple[str, int]]:
    """(model, threads), those whose text holds ``only``."""
    return [(name, n) for name, n in CASES if only in f"{name}, {n} thread{'s' if n > 1 else ''}"]


def denoiser_peers(
    progress: Progress, quick: bool, python: Path, folder: Path, only: str = ""
) -> Iterator[list[dict[str, Any]]]:
    """The rows of a case after another: a row a variant, with how many times as long a call took as ours at
    2, 4 and 8 bits. Programs that ``python`` does not have are said and skipped. ``folder`` keeps what they
    read, and is made where it is missing."""
    if not python.exists():
        raise AquabitError(
            f"the Python of the other programs, {python}, is missing; name one with --python that has"
            f" {' '.join(PINS)} (pip install -c constraints.txt)"
        )
    made: dict[str, dict[str, nn.Module]] = {}  # of one model at a time
    for name, count in cases(only):
        own, config = CONFIGS[name]
        place = folder / own
        forms = {form for group in CASES[name, count] for program, form in group if program == SD_CPP}
        prepare(config, place, sorted(forms), progress)
        if name not in made:
            made = {name: _models(config, progress)}
        times: dict[str, list[float]] = {}
        pairs: dict[str, dict[str, list[float]]] = {}  # of every variant, with the times of ours beside it
        about: dict[str, dict[str, Any]] = {}
        with threads(count):
            calls = _calls(made[name], progress)
            for group in CASES[name, count]:
                with ExitStack() as running:
                    others = dict(started(running, python, place, group, count, progress))
                    progress(f"timing {name}, threads {count}", 0, 1)
                    found = paired(
                        {**calls, **others}, 0.0 if quick else SECONDS, (1, 1) if quick else ROUNDS, PAUSE
                    )
                    progress(f"timing {name}, threads {count}", 1, 1)
                about |= {n: other.about for n, other in others.items()}
                for variant, values in found.items():
                    times.setdefault(variant, []).extend(values)
                    beside = pairs.setdefault(variant, {ours: [] for ours in OURS.values()})
                    for ours, theirs in beside.items():
                        theirs.extend(found[ours])
        yield [
            {
                "model": name,
                "threads": count,
                "variant": variant,
                "ms": 1e3 * statistics.median(own),
                "rounds": len(own),
                **{f"slower_than_{bits}": ratio(own, pairs[variant][ours]) for bits, ours in OURS.items()},
                **about.get(variant, {}),
            }
            for variant, own in times.items()
        ]


# ---- what the others read
# ------------------------------------------------------------------------------------------------------------


def prepare(config: Mapping[str, Any], folder: Path, forms: list[str], progress: Progress) -> None:
    """The configuration, a call, and a GGUF file of random weights for each format."""
    folder.mkdir(parents=True, exist_ok=True)
    net = Maker(config).empty()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(inputs_of(net, 1, torch.float32), folder / "call.safetensors")
    for done, form in enumerate(forms):
        if not (folder / f"{form}.gguf").exists():
            progress("writing GGUF files", done, len(forms))
            write_gguf(config, form, folder / f"{form}.gguf")


def write_gguf(config: Mapping[str, Any], form: str, out: Path) -> None:
    """A denoiser whose Linear layers have that format, where its blocks divide their rows; everything else is
    stored at 16 bits, as stable-diffusion.cpp's own quantization leaves it. Weights are normal, the same for
    layers of one shape."""
    net, rng, scheme = Maker(config).empty(), torch.Generator().manual_seed(0), Scheme.parse(form)
    for name, parameter in list(net.named_parameters()):
        shape, (owner, _, leaf) = parameter.shape, name.rpartition(".")
        norm = parameter.ndim == 1 and leaf == "weight"
        value = torch.ones(shape) if norm else 0.02 * torch.randn(shape, generator=rng)
        setattr(net.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    graph = trace(net)
    coded: dict[tuple[int, ...], CodebookWeight] = {}
    weights: dict[str, CodebookWeight] = {}
    for name, node in layers(graph).items():
        sizes = tuple(node["shape"])
        if node["kind"] == "linear" and scheme.refuses(sizes) is None:
            if sizes not in coded:
                coded[sizes] = quantize_weight(0.02 * torch.randn(sizes, generator=rng), scheme)
            weights[name] = coded[sizes]
    config_ = QuantConfig("0" * 16, {name: LayerChoice(scheme) for name in weights}, "random")
    part = out.with_suffix(".part")
    WRITERS["gguf"].write(Exported(net, config_, graph, weights), part)
    part.replace(out)


# ---- who is called
# ------------------------------------------------------------------------------------------------------------


class Other:
    """Another program's denoiser in its own process; calling it waits for one call there."""

    def __init__(self, python: Path, folder: Path, program: str, form: str, count: int):
        self.log = folder / f"{program}-{form}-{count}.log"
        command = [str(python), str(HELPER), "--program", program, "--form", form]
        command += ["--threads", str(count), "--folder", str(folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.about: dict[str, Any] = json.loads(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            self.close()
            said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            raise AquabitError(f"{said[-1].strip() if said else 'it ended'} ({self.log})")
        return answer

    def __call__(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def started(
    running: ExitStack,
    python: Path,
    folder: Path,
    programs: tuple[tuple[str, str], ...],
    count: int,
    progress: Progress,
) -> Iterator[tuple[str, Other]]:
    """Those that can be called, two made at a time; the others are said."""

    def made(which: tuple[str, str]) -> Other | AquabitError:
        try:
            return Other(python, folder, *which, count)
        except AquabitError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        for done, ((program, form), other) in enumerate(
            zip(programs, pool.map(made, programs), strict=True), 1
        ):
            progress("starting other programs", done, len(programs))
            if isinstance(other, AquabitError):
                print(f"{program} {form} is skipped: {other}", flush=True)
            else:
                running.callback(other.close)
                yield f"{program} {form}", other


def _models(config: dict[str, Any], progress: Progress) -> dict[str, nn.Module]:
    """Packed at every number of bits, activations rounded to 8."""
    made, found = Maker(config), dict[str, nn.Module]()
    for done, (bits, name) in enumerate(OURS.items()):
        progress("making models", done, len(OURS))
        found[name] = made(f"usq{bits}", 8)
    progress("making models", len(OURS), len(OURS))
    return found


def _calls(models: dict[str, nn.Module], progress: Progress) -> dict[str, Callable[[], object]]:
    """Of ours, each with the kernels that are fastest on as many threads as there are now."""
    found: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        found[name] = call_of(model, 1, torch.float32)
        place_(layers_of(model), found[name], "packed", progress)
    return found
