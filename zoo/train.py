"""Train the bundled models: python zoo/train.py [classifier|digits-unet|digits-dit ...] [--checkpoints DIR]

Everything is seeded and runs on one CPU thread per model. To resume an interrupted training, run the same
command again. The classifier and the denoisers see the training half of scikit-learn's digits only; the other
half is the reference of every FID. `python zoo/evaluate.py` measures what the training reached.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

BUNDLED = Path(__file__).parents[1] / "aquabit" / "pipelines" / "bundled"
CLASSES = 10
NULL_CLASS = CLASSES  # the label that stands for "no condition"
CLASS_DROPOUT = 0.1
BATCH = 128
STEPS = {"digits-dit": 3000, "digits-unet": 2600}
HORIZON = {"digits-dit": 6000, "digits-unet": 4200}  # the cosine's length; it is cut short by a cooldown
COOLDOWN = 800  # last steps, over which the rate falls linearly to zero
LEARNING_RATE = {"digits-dit": 5e-4, "digits-unet": 6e-4}
EMA_DECAY = 0.999
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "clip_sample": False,
    "timestep_spacing": "leading",
}


def digits_halves(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stratified halves: training images [898, 1, 8, 8] in [-1, 1], their labels, held-out images and
    labels."""
    data = load_digits()
    images = (data.images / 8.0 - 1.0).astype(np.float32)[:, None]
    x, xh, y, yh = train_test_split(
        images, data.target, test_size=0.5, stratify=data.target, random_state=seed
    )
    return torch.from_numpy(x), torch.from_numpy(y).long(), torch.from_numpy(xh), torch.from_numpy(yh).long()


def build(name: str) -> nn.Module:
    """The untrained denoiser: 57 layers of 4.6 M weights (DiT) or 51 layers of 2.8 M weights (U-Net)."""
    torch.manual_seed(0)
    if name == "digits-unet":
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=CLASSES + 1,
            attention_head_dim=32,
            norm_num_groups=16,
        )
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_elementwise_affine=False,
    )
    for (
        block
    ) in model.transformer_blocks:  # adaLN-Zero (DiT, section 3.2): every block starts as the identity
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for head in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return model


class Checkpoint:
    """Model, EMA and Adam moments as one safetensors file, written atomically."""

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.path, self.model, self.optimizer = path, model, optimizer
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def update_ema(self, step: int) -> None:
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for key, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.ema[key].lerp_(value, 1 - decay)

    def save(self, step: int) -> None:
        tensors = {f"ema.{k}": v.contiguous() for k, v in self.ema.items()}
        tensors |= {f"model.{k}": v.contiguous().clone() for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter)
            if state:
                tensors |= {f"adam.{k}.{name}": v for k, v in state.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        save_file(tensors, temporary, {"step": str(step)})
        temporary.replace(self.path)

    def load(self) -> int:
        """The next step to take: 0 where there is no checkpoint."""
        if not self.path.exists():
            return 0
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            step = int(file.metadata()["step"])
        tensors = load_file(self.path)
        self.ema = {k: tensors[f"ema.{k}"] for k in self.ema}
        self.model.load_state_dict({k: tensors[f"model.{k}"] for k in self.ema})
        for name, parameter in self.model.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            if f"adam.step.{name}" in tensors:
                self.optimizer.state[parameter] = {k: tensors[f"adam.{k}.{name}"] for k in keys}
        return step


def learning_rate(step: int, name: str) -> float:
    """Linear warm-up over 200 steps, a cosine, and a linear cooldown over the last steps."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / HORIZON[name]))
    return (
        LEARNING_RATE[name] * min(1.0, (step + 1) / 200) * cosine * min(1.0, (STEPS[name] - step) / COOLDOWN)
    )


def training_loss(
    model: nn.Module, scheduler: DDIMScheduler, x: torch.Tensor, y: torch.Tensor, generator
) -> torch.Tensor:
    """Mean squared error of the predicted noise at stratified timesteps."""
    n = len(x)
    offset = torch.rand(n, generator=generator)
    t = ((torch.randperm(n, generator=generator) + offset) / n * scheduler.config.num_train_timesteps).long()
    noise = torch.randn(x.shape, generator=generator)
    y = torch.where(torch.rand(n, generator=generator) < CLASS_DROPOUT, NULL_CLASS, y)
    prediction = model(scheduler.add_noise(x, noise, t), timestep=t, class_labels=y).sample
    return nn.functional.mse_loss(prediction, noise)


def train_denoiser(name: str, checkpoints: Path) -> None:
    x, y, _, _ = digits_halves()
    model, scheduler = build(name).train(), DDIMScheduler(**SCHEDULER)
    if (
        name == "digits-dit"
    ):  # our own class dropout serves both models; diffusers' embedding would drop again
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    checkpoint = Checkpoint(checkpoints / f"{name}.safetensors", model, optimizer)
    started, losses = time.time(), []
    for step in range(checkpoint.load(), STEPS[name]):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(0, len(x), (BATCH,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, name)
        loss = training_loss(model, scheduler, x[batch], y[batch], generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        checkpoint.update_ema(step)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(
                f"{name} step {step + 1}/{STEPS[name]} loss {np.mean(losses):.4f}"
                f" {time.time() - started:.0f} s",
                flush=True,
            )
            losses = []
            checkpoint.save(step + 1)
    export_denoiser(name, checkpoint.ema)


def export_denoiser(name: str, ema: dict[str, torch.Tensor]) -> None:
    """Write the EMA weights in fp16 as a diffusers pipeline directory."""
    folder, model = BUNDLED / name, build(name)
    model.load_state_dict(ema)
    model.half().save_pretrained(folder / "denoiser")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ClassConditionalPipeline",
        "_diffusers_version": "0.42.1",
        "denoiser": ["diffusers", type(model).__name__],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "classes": CLASSES,
        "real_images": "digits",
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def build_classifier() -> nn.Sequential:
    """Convolutions 1-32-64-64 to a 32-dimensional feature and ten logits; layer names are the state dict's
    keys."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 32),
        nn.SiLU(),
        nn.Linear(32, CLASSES),
    )


def shifted(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by at most one pixel in each direction."""
    moves = torch.randint(-1, 2, (len(x), 2), generator=generator)
    padded = nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)
    return torch.stack(
        [p[:, 1 + dy : 9 + dy, 1 + dx : 9 + dx] for p, (dy, dx) in zip(padded, moves.tolist(), strict=True)]
    )


def train_classifier(_: Path, epochs: int = 60) -> None:
    x, y, xh, yh = digits_halves()
    model = build_classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(0)
    for _epoch in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            images = shifted(x[batch], generator) + 0.1 * torch.randn(
                len(batch), 1, 8, 8, generator=generator
            )
            loss = nn.functional.cross_entropy(model(images), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        held_out = (model.eval()(xh).argmax(1) == yh).float().mean()
    print(f"classifier: held-out accuracy {held_out:.4f}")
    path = BUNDLED / "classifier.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, path)
    save_file(
        {"images": ((xh + 1) * 8).round().to(torch.uint8), "labels": yh.to(torch.uint8)},
        BUNDLED / "held_out.safetensors",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["classifier", "digits-unet", "digits-dit"]
    parser.add_argument("names", nargs="*", default=names, choices=names)
    parser.add_argument("--checkpoints", type=Path, default=Path("zoo/checkpoints"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        (
            train_classifier(options.checkpoints)
            if name == "classifier"
            else train_denoiser(name, options.checkpoints)
        )


if __name__ == "__main__":
    main()
