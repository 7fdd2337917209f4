"""Train the bundled models: python zoo/train.py [NAME ...] [--checkpoints DIR] [--data DIR] [--device cuda]

Everything is seeded; on a CPU a model takes one thread. To resume an interrupted training, run the same
command again. A constant rate can be cooled down at any time: stop the training, and run it again with as
many --steps as it has taken plus those of --cooldown. --start begins with the weights of a file and a fresh
optimizer: with those of a bundled model, to train it further. Nothing sees the held-out images;
`python zoo/evaluate.py` measures what the training reached.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.scheme import AquabitError
from zoo.classifiers import CLASSIFIERS, train_classifier
from zoo.data import DATA, Data
from zoo.muon import Float32Muon
from zoo.recipes import RECIPES, Recipe, build

BUNDLED = Path(__file__).parents[1] / "aquabit" / "pipelines" / "bundled"
CLASSIFIER = "classifier-"
CLASS_DROPOUT = 0.1
EMA_DECAY = 0.999
KEPT_EVERY = 100  # steps between checkpoints, and between lines of the log


class Training:
    """Model, EMA and the optimizers' state; a checkpoint is one safetensors file, written whole or not at
    all."""

    def __init__(self, name: str, recipe: Recipe, path: Path, device: torch.device) -> None:
        self.name, self.recipe, self.path, self.device = name, recipe, path, device
        self.model = build(name).train().to(device)
        self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimizers = optimizers_of(self.model, recipe)
        self.step = 0  # the next one

    def update(self) -> None:
        """One step of the optimizers from the gradients, and of the EMA."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.rate_at(self.step)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        state = self.model.state_dict()
        keys = [k for k, v in state.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.ema[k] for k in keys], [state[k] for k in keys], 1 - decay)
        self.step += 1

    def save(self) -> None:
        tensors = {f"ema.{k}": v for k, v in self.ema.items()}
        tensors |= {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, optimizer, parameter in self._states():
            tensors |= {f"optimizer.{k}.{name}": v for k, v in optimizer.state.get(parameter, {}).items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        facts = {"step": str(self.step), "recipe": self.recipe.digest}
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, temporary, facts)
        temporary.replace(self.path)

    def load(self) -> None:
        """Go on where the checkpoint is; raises AquabitError for one of other settings."""
        with safe_open(self.path, "pt") as file:
            facts = file.metadata() or {}
        if facts.get("recipe") != self.recipe.digest:
            raise AquabitError(
                f"{self.path} is of a training with other settings ({facts.get('recipe')}, here"
                f" {self.recipe.digest}); give another folder with --checkpoints"
            )
        tensors = load_file(self.path, str(self.device))
        self.step = int(facts["step"])
        self.ema = {k: tensors[f"ema.{k}"] for k in self.ema}
        self.model.load_state_dict({k: tensors[f"model.{k}"] for k in self.ema})
        for name, optimizer, parameter in self._states():
            kept = {key.split(".", 2)[1]: key for key in tensors if key.split(".", 2)[2:] == [name]}
            state = {k: tensors[v] for k, v in kept.items() if v.startswith("optimizer.")}
            if state:
                optimizer.state[parameter] = state | (
                    {"step": state["step"].cpu()} if "step" in state else {}
                )

    def start(self, path: Path) -> None:
        """From the weights of a file, at step 0 with a fresh optimizer."""
        try:
            self.model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        except (OSError, RuntimeError) as error:
            raise AquabitError(f"{path} does not hold the weights of {self.name}: {error}") from error
        self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def _states(self) -> list[tuple[str, torch.optim.Optimizer, nn.Parameter]]:
        names = {id(p): n for n, p in self.model.named_parameters()}
        return [(names[id(p)], o, p) for o in self.optimizers for g in o.param_groups for p in g["params"]]


def optimizers_of(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, beside Muon for the matrices between the embeddings and the heads where the recipe has it."""
    hidden = [
        p
        for n, p in model.named_parameters()
        if recipe.muon and p.ndim == 2 and n.startswith("transformer_blocks.") and "embedding_table" not in n
    ]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    ]
    if hidden:
        found.append(
            torch.optim.Muon(hidden, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            if recipe.bfloat16
            else Float32Muon(hidden)
        )
    return found


def training_loss(
    model: nn.Module,
    scheduler: DDIMScheduler,
    x: torch.Tensor,
    y: torch.Tensor,
    generator: torch.Generator,
    min_snr: float | None,
    classes: int,
) -> torch.Tensor:
    """Mean squared error of the predicted noise or velocity at stratified timesteps; label ``classes`` stands
    for "no class". Random numbers are drawn on the CPU, whatever the device of ``x``."""
    n, device, total = len(x), x.device, scheduler.config.num_train_timesteps
    offset = torch.rand(n, generator=generator)
    t = ((torch.randperm(n, generator=generator) + offset) / n * total).long().to(device)
    noise = torch.randn(x.shape, generator=generator).to(device)
    y = torch.where(torch.rand(n, generator=generator).to(device) < CLASS_DROPOUT, classes, y)
    prediction = model(scheduler.add_noise(x, noise, t), timestep=t, class_labels=y).sample.float()
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(x, noise, t) if velocity else noise
    if min_snr is None:
        return nn.functional.mse_loss(prediction, target)
    alpha = scheduler.alphas_cumprod.to(device)[t]
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=min_snr) / (snr + 1 if velocity else snr)
    return (weight * (prediction - target).square().mean((1, 2, 3))).mean()


def arithmetic(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where the recipe has it. Attention by plain products: on a CPU torch's fused one takes half
    of a step in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16)


def train(training: Training, data: Data, compiled: bool) -> None:
    """To the recipe's last step; a checkpoint every KEPT_EVERY steps, and where the process is asked to
    end."""
    recipe, device = training.recipe, training.device
    model = torch.compile(training.model) if compiled else training.model
    scheduler, stopped = DDIMScheduler(**recipe.scheduler), []
    classes = DATA[recipe.data].classes
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    started, losses = time.time(), []
    while training.step < recipe.steps:
        generator = torch.Generator().manual_seed(training.step)
        batch = data.drawn(recipe.batch, generator)
        x, y = data.pixels(data.images[batch]).to(device), data.labels[batch].to(device)
        with arithmetic(recipe, device), sdpa_kernel(SDPBackend.MATH):
            loss = training_loss(model, scheduler, x, y, generator, recipe.min_snr, classes)
            loss.backward()
        training.update()
        losses.append(loss.item())
        if training.step % KEPT_EVERY == 0 or stopped:
            print(
                f"{training.name} step {training.step}/{recipe.steps} loss {np.mean(losses):.4f}"
                f" {time.time() - started:.0f} s, of a core {time.process_time():.0f} s",
                flush=True,
            )
            losses = []
            training.save()
        if stopped:
            sys.exit(f"{training.name} stopped at step {training.step}; run it again to go on")


def export_denoiser(name: str, ema: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the EMA weights in fp16 as a diffusers pipeline directory."""
    recipe, model = RECIPES[name], build(name)
    model.load_state_dict({k: v.cpu() for k, v in ema.items()})
    model.half().save_pretrained(folder / "denoiser")
    DDIMScheduler(**recipe.scheduler).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ClassConditionalPipeline",
        "_diffusers_version": "0.42.1",
        "denoiser": ["diffusers", type(model).__name__],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "classes": DATA[recipe.data].classes,
        "real_images": recipe.data,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def train_denoiser(name: str, options: argparse.Namespace) -> None:
    recipe = RECIPES[name]
    given = {k: getattr(options, k) for k in ("steps", "cooldown") if getattr(options, k) is not None}
    training = Training(
        name,
        replace(recipe, **given),
        options.checkpoints / f"{name}.safetensors",
        torch.device(options.device),
    )
    if training.path.exists():
        training.load()
    elif options.start:
        training.start(options.start)
    train(training, DATA[recipe.data].read(options.data), options.compile)
    export_denoiser(name, training.ema, options.out / name)


def train_features(name: str, options: argparse.Namespace) -> None:
    """The classifier of ``classifier-NAME``."""
    of = name.removeprefix(CLASSIFIER)
    accuracy = train_classifier(of, DATA[of].read(options.data), options.out / "real_images" / of)
    print(f"{name}: held-out accuracy {accuracy:.4f}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*(CLASSIFIER + name for name in CLASSIFIERS), *RECIPES]
    add = parser.add_argument
    add("names", nargs="*", default=names, choices=names, metavar="NAME", help=", ".join(names))
    add("--checkpoints", type=Path, default=Path("zoo/checkpoints"), help="folder of what to resume from")
    add("--data", type=Path, help="folder of the set's files; default: where its package is installed")
    add("--out", type=Path, default=BUNDLED, help="folder of the finished models")
    add("--start", type=Path, help="a safetensors file of weights to begin with, where no checkpoint is")
    add("--steps", type=int, help="how many to train in all; default: the recipe's")
    add(
        "--cooldown",
        type=int,
        help="the last steps, over which the rate falls to zero; default: the recipe's",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="by torch.compile: a third faster on a CPU, after a minute")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        for name in options.names:
            (train_features if name.startswith(CLASSIFIER) else train_denoiser)(name, options)
    except AquabitError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
