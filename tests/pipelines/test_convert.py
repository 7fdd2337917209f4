"""LDM checkpoints: the converted pipeline against the original layout, computed here from the original
names; what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from aquabit.pipelines import Adapter, convert_ldm4, load
from aquabit.scheme import AquabitError, Protocol

CHANNELS, LAYERS, WIDTH, HEADS = (32, 64), 2, 12, 1
UNET, VQ = "model.diffusion_model.", "first_stage_model."


class Original(dict[str, Tensor]):
    """A state dict in the original naming that makes its tensors up as the reference asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def get_(self, name: str, *shape: int, mean: float = 0.0) -> Tensor:
        if name not in self:
            std = torch.Size(shape[1:]).numel() ** -0.5 if len(shape) > 1 else 0.1
            self[name] = mean + std * torch.randn(shape, generator=self.generator)
        return self[name]

    def linear(self, name: str, x: Tensor, out: int, bias: bool = True) -> Tensor:
        weight = self.get_(f"{name}.weight", out, x.shape[-1])
        return F.linear(x, weight, self.get_(f"{name}.bias", out) if bias else None)

    def conv(
        self, name: str, x: Tensor, out: int, size: int = 3, stride: int = 1, padding: int | None = None
    ) -> Tensor:
        weight, bias = (
            self.get_(f"{name}.weight", out, x.shape[1], size, size),
            self.get_(f"{name}.bias", out),
        )
        return F.conv2d(x, weight, bias, stride, size // 2 if padding is None else padding)

    def group_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.group_norm(
            x,
            32,
            self.get_(f"{name}.weight", x.shape[1], mean=1.0),
            self.get_(f"{name}.bias", x.shape[1]),
            eps,
        )

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(
            x,
            x.shape[-1:],
            self.get_(f"{name}.weight", x.shape[-1], mean=1.0),
            self.get_(f"{name}.bias", x.shape[-1]),
        )

    # ---- the U-Net, as openaimodel.UNetModel builds it
    def res_block(self, name: str, x: Tensor, time: Tensor, out: int) -> Tensor:
        h = self.conv(f"{name}.in_layers.2", F.silu(self.group_norm(f"{name}.in_layers.0", x, 1e-5)), out)
        h = h + self.linear(f"{name}.emb_layers.1", F.silu(time), out)[:, :, None, None]
        h = self.conv(f"{name}.out_layers.3", F.silu(self.group_norm(f"{name}.out_layers.0", h, 1e-5)), out)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.skip_connection", x, out, 1))

    def attention(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        width = x.shape[-1]
        q = self.linear(f"{name}.to_q", x, width, bias=False)
        k, v = (self.linear(f"{name}.to_{part}", context, width, bias=False) for part in "kv")
        return self.linear(f"{name}.to_out.0", torch.softmax(q @ k.mT / width**0.5, -1) @ v, width)

    def transformer(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = self.conv(f"{name}.proj_in", self.group_norm(f"{name}.norm", x, 1e-6), c, 1).flatten(2).mT
        block = f"{name}.transformer_blocks.0"
        normed = self.layer_norm(f"{block}.norm1", h)
        h = h + self.attention(f"{block}.attn1", normed, normed)
        h = h + self.attention(f"{block}.attn2", self.layer_norm(f"{block}.norm2", h), context)
        up, gate = self.linear(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", h), 8 * c).chunk(
            2, -1
        )
        h = h + self.linear(f"{block}.ff.net.2", up * F.gelu(gate), c)
        return x + self.conv(f"{name}.proj_out", h.mT.reshape(n, c, height, width), c, 1)

    def unet(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        half = CHANNELS[0] // 2
        angles = t[:, None].float() * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half) / half)
        time = self.linear(
            f"{UNET}time_embed.0", torch.cat([angles.cos(), angles.sin()], -1), 4 * CHANNELS[0]
        )
        time = self.linear(f"{UNET}time_embed.2", F.silu(time), 4 * CHANNELS[0])
        h, number = self.conv(f"{UNET}input_blocks.0.0", x, CHANNELS[0]), 1
        skips = [h]
        for level, c in enumerate(CHANNELS):  # attention in all levels but the first
            for _ in range(LAYERS):
                h = self.res_block(f"{UNET}input_blocks.{number}.0", h, time, c)
                h = self.transformer(f"{UNET}input_blocks.{number}.1", h, context) if level else h
                skips, number = [*skips, h], number + 1
            if level < len(CHANNELS) - 1:
                h = self.conv(f"{UNET}input_blocks.{number}.0.op", h, c, stride=2)
                skips, number = [*skips, h], number + 1
        h = self.res_block(f"{UNET}middle_block.0", h, time, CHANNELS[-1])
        h = self.transformer(f"{UNET}middle_block.1", h, context)
        h = self.res_block(f"{UNET}middle_block.2", h, time, CHANNELS[-1])
        number = 0
        for level, c in reversed(list(enumerate(CHANNELS))):
            for layer in range(LAYERS + 1):
                place = f"{UNET}output_blocks.{number}"
                h = self.res_block(f"{place}.0", torch.cat([h, skips.pop()], 1), time, c)
                h = self.transformer(f"{place}.1", h, context) if level else h
                if level and layer == LAYERS:
                    h = self.conv(
                        f"{place}.{2 if level else 1}.conv",
                        F.interpolate(h, scale_factor=2.0, mode="nearest"),
                        c,
                    )
                number += 1
        return self.conv(f"{UNET}out.2", F.silu(self.group_norm(f"{UNET}out.0", h, 1e-5)), 3)

    # ---- the first stage, as taming's Encoder and Decoder build it
    def vq_block(self, name: str, x: Tensor, out: int) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.group_norm(f"{name}.norm1", x, 1e-6)), out)
        h = self.conv(f"{name}.conv2", F.silu(self.group_norm(f"{name}.norm2", h, 1e-6)), out)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, 1))

    def vq_mid(self, name: str, x: Tensor) -> Tensor:
        c = x.shape[1]
        x = self.vq_block(f"{name}.block_1", x, c)
        normed = self.group_norm(f"{name}.attn_1.norm", x, 1e-6)
        q, k, v = (self.conv(f"{name}.attn_1.{part}", normed, c, 1).flatten(2) for part in "qkv")
        h = v @ torch.softmax(q.mT @ k / c**0.5, -1).mT
        x = x + self.conv(f"{name}.attn_1.proj_out", h.reshape(x.shape), c, 1)
        return self.vq_block(f"{name}.block_2", x, c)

    def encode(self, x: Tensor) -> Tensor:
        h = self.conv(f"{VQ}encoder.conv_in", x, CHANNELS[0])
        for level, c in enumerate(CHANNELS):
            for layer in range(LAYERS):
                h = self.vq_block(f"{VQ}encoder.down.{level}.block.{layer}", h, c)
            if level < len(CHANNELS) - 1:
                h = self.conv(
                    f"{VQ}encoder.down.{level}.downsample.conv",
                    F.pad(h, (0, 1, 0, 1)),
                    c,
                    stride=2,
                    padding=0,
                )
        h = F.silu(self.group_norm(f"{VQ}encoder.norm_out", self.vq_mid(f"{VQ}encoder.mid", h), 1e-6))
        return self.conv(f"{VQ}quant_conv", self.conv(f"{VQ}encoder.conv_out", h, 3), 3, 1)

    def decode(self, z: Tensor) -> Tensor:
        table = self.get_(f"{VQ}quantize.embedding.weight", 16, 3)
        nearest = (z.permute(0, 2, 3, 1)[..., None, :] - table).square().sum(-1).argmin(-1)
        h = self.conv(f"{VQ}post_quant_conv", table[nearest].permute(0, 3, 1, 2), 3, 1)
        h = self.vq_mid(f"{VQ}decoder.mid", self.conv(f"{VQ}decoder.conv_in", h, CHANNELS[-1]))
        for level, c in reversed(list(enumerate(CHANNELS))):
            for layer in range(LAYERS + 1):
                h = self.vq_block(f"{VQ}decoder.up.{level}.block.{layer}", h, c)
            if level:
                h = self.conv(
                    f"{VQ}decoder.up.{level}.upsample.conv",
                    F.interpolate(h, scale_factor=2.0, mode="nearest"),
                    c,
                )
        return self.conv(
            f"{VQ}decoder.conv_out", F.silu(self.group_norm(f"{VQ}decoder.norm_out", h, 1e-6)), 3
        )


@pytest.fixture(scope="module")
def made() -> tuple[Original, dict[str, Tensor]]:
    """A checkpoint, and what the original layout makes of some inputs."""
    state, draw = Original(), torch.Generator().manual_seed(1)
    x, t, image = (
        torch.randn(2, 3, 8, 8, generator=draw),
        torch.tensor([10, 700]),
        torch.randn(1, 3, 16, 16, generator=draw),
    )
    context = state.get_("cond_stage_model.embedding.weight", 6, WIDTH)[[1, 5]][:, None]
    results = {
        "x": x,
        "t": t,
        "image": image,
        "noise": state.unet(x, t, context),
        "z": state.encode(image),
        "decoded": state.decode(x),
    }
    state["betas"] = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    return state, results


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_the_converted_pipeline_computes_what_the_original_does(
    made: tuple[Original, dict[str, Tensor]], tmp_path: Path, ending: str
) -> None:
    state, results = made
    file = tmp_path / f"model.{ending}"
    (
        torch.save({"state_dict": dict(state), "global_step": 3}, file)
        if ending == "ckpt"
        else save_file(dict(state), file)
    )
    convert_ldm4(file, tmp_path / "pipe", sample_size=8)
    pipe = load(tmp_path / "pipe")
    assert pipe.config.classes == 5 and pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert float(pipe.scheduler.betas[0]) == pytest.approx(0.0015) and float(
        pipe.scheduler.betas[-1]
    ) == pytest.approx(0.0195)
    with torch.no_grad():
        noise = pipe.unet(
            results["x"], results["t"], encoder_hidden_states=pipe.class_embedder(torch.tensor([1, 5]))
        ).sample
        assert torch.allclose(noise, results["noise"], atol=1e-4) and noise.std() > 0.1
        assert torch.allclose(pipe.vqvae.encode(results["image"]).latents, results["z"], atol=1e-4)
        assert torch.allclose(pipe.vqvae.decode(results["x"]).sample, results["decoded"], atol=1e-4)
    made_images = Adapter(pipe).images(Protocol(images=2, steps=2, micro_batch=2, guidance=3.0), range(2))
    assert made_images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop(f"{UNET}input_blocks.1.0.in_layers.2.weight"),
            r"1 tensors missing: down_blocks\.0\.resnets\.0\.conv1\.weight",
        ),
        (
            lambda s: s.update({f"{VQ}encoder.down.0.attn.0.q.weight": torch.ones(2, 2)}),
            r"1 tensors without a place: encoder\.down_blocks\.0\.attn",
        ),
        (
            lambda s: s.update({f"{UNET}out.0.bias": torch.ones(5)}),
            r"1 tensors of another shape: conv_norm_out\.bias \(5,\) for \(32,\)",
        ),
        (
            lambda s: s.update({"cond_stage_model.transformer.x": torch.ones(5)}),
            "it holds cond_stage_model.transformer.x",
        ),
        (
            lambda s: s.update({"betas": torch.linspace(0.1, 0.2, 1000)}),
            "betas that are not linear in their roots",
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if "attn2" in k],
            "lacks 'middle_block.1.transformer_blocks.0.attn2.to_k.weight'",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    made: tuple[Original, dict[str, Tensor]], tmp_path: Path, change, message: str
) -> None:  # type: ignore[no-untyped-def]
    state = dict(made[0])
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(AquabitError, match=message):
        convert_ldm4(tmp_path / "model.safetensors", tmp_path / "pipe", sample_size=8)
    assert not (tmp_path / "pipe").exists()


def test_a_checkpoint_and_others_files_are_not_written_over(
    made: tuple[Original, dict[str, Tensor]], tmp_path: Path
) -> None:
    (tmp_path / "other" / "unet").mkdir(parents=True)
    (tmp_path / "other" / "unet" / "config.json").write_text("somebody's")
    checkpoint = tmp_path / "model.safetensors"
    save_file(dict(made[0]), checkpoint)
    before = checkpoint.read_bytes()
    for out, said in (
        (checkpoint, "is what it is made from"),
        (tmp_path / "other", "holds unet/config.json"),
    ):
        with pytest.raises(AquabitError, match=said):
            convert_ldm4(checkpoint, out, sample_size=8)
    assert checkpoint.read_bytes() == before
    assert [p.name for p in (tmp_path / "other").rglob("*")] == ["unet", "config.json"]
    for _ in range(2):  # over an older one
        convert_ldm4(checkpoint, tmp_path / "pipe", sample_size=8)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(AquabitError, match="is not there"):
        convert_ldm4(tmp_path / "none.ckpt", tmp_path / "pipe")
    torch.save({"state_dict": {}, "callbacks": {Path: 3}}, tmp_path / "objects.ckpt")
    with pytest.raises(AquabitError, match="holds more than tensors"):
        convert_ldm4(tmp_path / "objects.ckpt", tmp_path / "pipe")
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    with pytest.raises(AquabitError, match="cannot be read as a checkpoint"):
        convert_ldm4(tmp_path / "damaged.safetensors", tmp_path / "pipe")
