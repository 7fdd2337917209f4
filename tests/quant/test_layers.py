"""Models with odd weights, packed: shared, unread, of no layer. What is predicted is what is stored, both
places of a weight run from its codes, and what would not load again is refused."""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aquabit
from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.graph import fixed_layers, layers, repeated_names, to_json, trace
from aquabit.packing import quantize
from aquabit.pipelines import trace as trace_pipeline
from aquabit.quant.artifact import Contents, load_packed_denoiser, save_packed_denoiser
from aquabit.quant.bank import Bank
from aquabit.quant.diffusers_quantizer import attach_
from aquabit.quant.layers import QuantLinear, Tied, replace_layer_
from aquabit.quant.model import QuantizedDenoiser, fingerprint
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError, Budget, Protocol, QuantConfig, Scheme
from aquabit.search.options import Options
from aquabit.search.search_options import ladder
from aquabit.space import make_space
from tests.test_following import MODELS, Ends, TiedMlp
from tests.tiny_pipelines import tiny

X = {"x": torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0))}


def packed(
    model: nn.Module, inputs: dict[str, Any], folder: Path, scheme: str = "usq4", act: int = 16
) -> Any:
    """The quantized denoiser with its layers coded, its graph and its configuration."""
    graph, own = trace(model, inputs), fingerprint(model)
    config = make_space(graph, own).uniform(scheme, act)
    quantized = QuantizedDenoiser(model, graph, Bank(folder / "bank"), own)
    quantized.apply(config)
    return quantized, graph, config


def stored_bytes(quantized: QuantizedDenoiser, config: QuantConfig, file: Path) -> int:
    """Bytes of the tensors on disk."""
    model = quantized.denoiser
    contents = Contents(config, quantized.layers, repeated=repeated_names(model))
    save_file(contents.tensors(model.state_dict()), file)
    return file.stat().st_size - 8 - struct.unpack("<Q", file.read_bytes()[:8])[0]


class Buffers(nn.Module):
    """A buffer of whole numbers keeps its type."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.register_buffer("order", torch.arange(7))
        self.register_buffer("flag", torch.tensor([True] * 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        return y


ODD = {"tied": (TiedMlp, X), "ends": (Ends, X), "buffers": (Buffers, X)}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [*ODD, *(n for n in MODELS if n != "weight_norm")])
def test_predicted_bytes_are_stored_bytes(name: str, tmp_path: Path) -> None:
    model, inputs = (ODD[name][0](), ODD[name][1]) if name in ODD else MODELS[name][:2]
    model = deepcopy(model)  # it is packed where it stands, and others trace the same
    quantized, graph, config = packed(model, inputs, tmp_path)
    cost = CostModel(graph, make_space(graph, config.fingerprint))
    with torch.no_grad():
        dense = quantized.denoiser(**inputs)
        quantized.pack(config, "exact")
        torch.testing.assert_close(quantized.denoiser(**inputs), dense, rtol=1e-3, atol=1e-4)
    assert any(layer.packed is not None for layer in quantized.layers.values())
    assert stored_bytes(quantized, config, tmp_path / "weights.safetensors") == cost(config).bytes
    low, high = cost.limits()["bytes"]
    assert low <= cost(config).bytes <= high


def test_both_places_of_a_weight_run_from_its_codes(tmp_path: Path) -> None:
    model = TiedMlp()
    quantized, _, config = packed(model, X, tmp_path, "usq3", 8)
    assert isinstance(model.a, QuantLinear) and model.c is model.a
    assert isinstance(model.b, Tied) and list(model.b.state_dict()) == ["bias"]
    weight, bias = quantized.decoded("a", "usq3", config), model.b.bias
    assert not torch.equal(weight, quantized.full("a"))
    with torch.no_grad():
        model.a.act = 16
        torch.testing.assert_close(model.b(X["x"]), nn.functional.linear(X["x"], weight, bias))
        model.a.act = 8
        assert not torch.allclose(model.b(X["x"]), nn.functional.linear(X["x"], weight, bias), atol=1e-6)
    seen = []
    model.a.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**X)
    assert len(seen) == 3, "calibration sees what enters the weight at all its places"
    assert to_json(trace(model, X)) == to_json(trace(TiedMlp(), X)), "traced as what it stands for"


def test_what_must_stay_full_precision_is_refused_by_name(tmp_path: Path) -> None:
    quantized, graph, config = packed(Ends(), X, tmp_path)
    assert set(fixed_layers(graph)) == {"spare", "never"} and {"spare", "never"} <= set(quantized.layers)
    space = make_space(graph, config.fingerprint)
    assert [len(space.choices[n]) for n in ("spare", "never")] == [1, 1]
    with pytest.raises(AquabitError, match="'spare' cannot be usq4: nothing that the model returns depends"):
        quantized.apply(config.with_layer("spare", "usq4"))


def test_operations_count_dense_products_at_full_precision() -> None:
    graph = trace(*MODELS["x @ P"][:2])
    space = make_space(graph, "f", schemes=["usq4"])
    cost, config = CostModel(graph, space), space.uniform("usq4", 8)
    assert cost(config).bops == cost.totals_of(config)["bops"] == 320 * 4 * 8 + 5 * 24 * 32 * 32
    rows = Choices.of(space, [config])
    assert cost.totals(rows)["bops"] == [cost(config).bops]
    budget = Budget(bops=cost(config).bops)
    options = Options.of(cost, budget)
    assert options.caps == pytest.approx([320 * 4 * 8]), "what is left for layers"
    assert ladder(cost, budget, (0.5,)) == [] and cost.within(cost.totals(rows), budget).all()
    assert cost(space.full_precision()).multiply_adds == 320 + 5 * 24
    assert all(value > 5 * 24 * 32 * 32 for value in cost.limits()["bops"])


def test_hooks_of_a_layer_stay_with_its_place(tmp_path: Path) -> None:
    model = Ends()
    handle = model.first.register_forward_hook(lambda module, args, y: 3 * y)
    with torch.no_grad():
        expected = model(**X)
        quantized, _, config = packed(model, X, tmp_path, "usq8")
        quantized.pack(config, "exact")
        assert (model(**X) - expected).norm() < 0.02 * expected.norm()
        handle.remove()
        assert (model(**X) - expected).norm() > 0.1 * expected.norm()


# ---- the artifact


class Everything(ModelMixin, ConfigMixin):
    """A model of diffusers' kind with tied layers, one layer in two places, a block in two places, a layer
    that nothing reads, and a transposed convolution."""

    @register_to_config
    def __init__(self, width: int = 8, tie: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.spare = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 6)
        self.one = nn.Sequential(nn.Linear(width, 8), nn.LayerNorm(8))
        self.up = nn.ConvTranspose1d(5, 4, 2, 2)
        self.two = self.one if tie else nn.Sequential(nn.Linear(width, 8), nn.LayerNorm(8))
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.two(self.b(self.one(self.a(x)))))
        self.spare(y[..., :8])
        return y


@pytest.mark.parametrize("scheme", ["usq4", "fp"])
@pytest.mark.parametrize("tie", [True, False])
def test_an_artifact_comes_back(
    scheme: str, tie: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers, "Everything", Everything, raising=False)
    quantized, graph, config = packed(Everything(tie=tie), X, tmp_path, scheme)
    assert graph.graph.get("tied", {}) == ({"b": "a", "two.0": "one.0"} if tie else {})
    quantized.pack(config, "exact")
    model, again = quantized.denoiser, repeated_names(quantized.denoiser)
    attach_(
        model,
        Contents(
            config,
            quantized.layers,
            inputs=quantized.inputs,
            tied=quantized.tied,
            repeated=again,
            about=quantized.about,
        ),
    )
    written = save_packed_denoiser(model, tmp_path / "packed")
    assert written == CostModel(graph, make_space(graph, config.fingerprint))(config).bytes
    stored = load_file(tmp_path / "packed" / "diffusion_pytorch_model.safetensors")
    assert any(name.startswith("two.") for name in stored) is not tie
    assert sum(t.numel() * t.element_size() for t in stored.values()) == written
    loaded = load_packed_denoiser(tmp_path / "packed")
    assert (loaded.two is loaded.one) is tie
    with torch.no_grad():
        torch.testing.assert_close(loaded(**X), model(**X), rtol=0, atol=1e-2)


@pytest.mark.parametrize("change", ["fused", "replaced", "tied"])
def test_a_changed_model_runs_packed_and_is_saved_where_it_loads_again(change: str, tmp_path: Path) -> None:
    pipe = tiny("sd" if change == "fused" else "dit")
    if change == "fused":
        pipe.unet.fuse_qkv_projections()
        net = pipe.unet
    else:
        net = pipe.transformer
        block = net.transformer_blocks[0]
        if change == "tied":
            block.attn1.to_k.weight = block.attn1.to_q.weight
        else:
            block.ff.net[0].proj, block.ff.net[2] = nn.Linear(16, 24), nn.Linear(24, 16)
    graph, own = trace_pipeline(pipe), fingerprint(net)
    space = make_space(graph, own)
    config = space.uniform("usq8", 16)
    protocol = Protocol(
        images=2,
        steps=2,
        micro_batch=2,
        conditions=("a cat",) if change == "fused" else None,
        resolution=None,
    )
    made = quantize(pipe, config, bank=str(tmp_path / "bank"))
    adapters = [aquabit.pipelines.Adapter(p) for p in (pipe, made.pipe)]
    full, coded = (a.images(protocol, range(2)) for a in adapters)
    assert 10 * torch.log10(1 / (full - coded).square().mean()) > 25
    coded_layers = {n for n, layer in made.model.layers.items() if layer.packed is not None}
    assert coded_layers == set(layers(graph)) - set(fixed_layers(graph))
    if change == "tied":  # the artifact says which layers share a weight
        made.save(tmp_path / "packed")
        again = aquabit.pipelines.Adapter(aquabit.load(str(tmp_path / "packed")))
        torch.testing.assert_close(again.images(protocol, range(2)), coded, rtol=0, atol=1e-2)
        attention = again.network.transformer_blocks[0].attn1
        assert isinstance(attention.to_k, Tied) and attention.to_k.layer is attention.to_q
        return
    with pytest.raises(AquabitError, match=r"was changed after it was built \(.*would not load again"):
        made.save(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


class Measured(ModelMixin, ConfigMixin):
    """Its sizes depend on data: it does not run without."""

    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(8, width), "to_v": nn.Linear(width, 8)})

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        y: Tensor = self.attn["to_v"](self.attn["to_q"](x)[:, : int(length)])
        return y


def test_an_artifact_of_a_model_that_needs_data_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers, "Measured", Measured, raising=False)
    inputs = {**X, "length": torch.tensor(3)}
    quantized, _, config = packed(Measured(), inputs, tmp_path, "usq4", 8)
    quantized.pack(config, "exact")
    about = quantized.about
    attach_(quantized.denoiser, Contents(config, quantized.layers, inputs=quantized.inputs, about=about))
    folder = tmp_path / "packed"
    save_packed_denoiser(quantized.denoiser, folder)
    loaded: Any = load_packed_denoiser(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs), quantized.denoiser(**inputs), rtol=0, atol=1e-2)
    assert loaded.attn["to_q"].act_output == quantized.layers["attn.to_q"].act_output == 8, (
        "Q is quantized too"
    )
    facts = json.loads((folder / "config.json").read_text())
    facts["quantization_config"]["layers"]["names"].append("to_k")
    del facts["quantization_config"]["digest"]
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(AquabitError, match="'to_k' is no Linear or Conv2d layer of Measured"):
        load_packed_denoiser(folder)


def test_a_packed_layer_says_what_to_compute_in_and_stores_nothing_for_it() -> None:
    """Pipelines draw noise in the dtype of the first parameter, models cast to that of a layer's weight;
    both called layers by the name of their argument, too."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    layer = replace_layer_(net, "0", None)
    layer.set_packed_(quantize_weight(torch.randn(8, 8), Scheme.parse("usq4")), Scheme.parse("usq4"))
    layer.shrink_()
    first = next(net.parameters())
    assert first.dtype == torch.float32 and first.numel() == 0 and layer.weight.dtype == torch.float32
    known = Contents(QuantConfig("", {}), {"0": layer}).known(net.state_dict())
    assert set(known) == {"0.weight", "0.bias"}, "the rest is what the layer runs from"
    net.load_state_dict(net.state_dict())
    assert next(net.to(torch.bfloat16).parameters()).dtype == torch.bfloat16
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert torch.equal(layer(input=x), layer(x))
