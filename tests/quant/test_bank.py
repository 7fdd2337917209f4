"""The bank's working set: bounded on disk, never at the cost of what is in use, here or in another
process; 16-bit models fit in float32."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aquabit.pipelines import recorder, trace
from aquabit.quant.bank import Bank, Fit, FullWeights, default_limit, weight_hash
from aquabit.quant.model import QuantizedDenoiser, fingerprint
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError, Calibration, Scheme
from aquabit.space import make_space
from tests.conftest import tiny_pipeline

USQ4 = Scheme.parse("usq4")


def weights(n: int) -> list[torch.Tensor]:
    return list(torch.randn(n, 16, 64, generator=torch.Generator().manual_seed(0)))


def put(bank: Bank, weight: torch.Tensor):
    bank.put(weight_hash(weight), USQ4, "", Fit(quantize_weight(weight, USQ4), 0.0))
    return bank.path(weight_hash(weight), USQ4)


def size(folder) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def test_writing_keeps_the_limit_and_evicts_what_was_used_longest_ago(tmp_path) -> None:
    each = put(Bank(tmp_path / "one"), weights(1)[0]).stat().st_size
    bank, every = Bank(tmp_path, limit=5 * each), weights(40)
    first = put(bank, every[0])
    for i, weight in enumerate(every[1:], 1):
        path = put(bank, weight)
        os.utime(path, (i, i))
        assert bank.get(weight_hash(every[0]), USQ4) is not None, "what is used again and again stays"
        assert size(tmp_path) <= 6 * each
    assert (
        first.exists()
        and bank.get(weight_hash(every[-1]), USQ4) is not None
        and bank.get(weight_hash(every[1]), USQ4) is None
    )


def test_what_is_in_use_is_neither_evicted_nor_lost_when_others_evict_it(tmp_path) -> None:
    bank, every = Bank(tmp_path, limit=1), weights(4)
    with bank.using():
        paths = [put(bank, w) for w in every]
        assert bank.trim() == 0 and all(p.exists() for p in paths), (
            "one configuration may be more than the limit"
        )
        held = [bank.get(weight_hash(w), USQ4) for w in every]
        code = "import sys; from aquabit.quant.bank import Bank; print(Bank(sys.argv[1], limit=1).trim())"
        said = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout
        assert said.strip() == "4" and not any(p.exists() for p in paths)
        for weight, fit in zip(every, held, strict=True):
            again = bank.get(weight_hash(weight), USQ4)
            assert fit is not None and again is not None, "it is still mapped"
            assert torch.equal(fit.coded.dequantize(), quantize_weight(weight, USQ4).dequantize())
            assert torch.equal(again.coded.packed, fit.coded.packed)
    assert bank.get(weight_hash(every[0]), USQ4) is None


def test_a_bank_smaller_than_one_configuration_gives_the_same_model(tmp_path) -> None:
    found = []
    for limit in (1, 1 << 30):
        pipe, bank = tiny_pipeline("dit"), Bank(tmp_path / str(limit), limit=limit)
        graph, own = trace(pipe), fingerprint(pipe.denoiser)
        options = {"schemes": ["usq2", "usq3h", "vq2"], "calibration": Calibration(images=2, steps=1)}
        config = make_space(graph, own, **options).sample(1, 3)[0]
        assert {str(c.weight) for c in config.layers.values()} == {"usq2", "usq3h", "vq2"}
        model = QuantizedDenoiser(pipe.denoiser, graph, bank, own, recorder(pipe))
        model.apply(config)
        dense = {n: layer.weight.clone() for n, layer in model.layers.items()}
        bank.trim()
        assert (size(bank.folder) == 0) == (limit == 1)
        model.apply_packed(config)
        assert all(
            torch.equal(layer.coded.dequantize(), dense[n])
            for n, layer in model.layers.items()
            if layer.coded is not None
        )
        found.append(dense)
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_are_fitted_in_float32(tmp_path, dit, dtype) -> None:
    narrow = copy.deepcopy(dit.denoiser).to(dtype)
    graph, schemes = trace(dit), ("usq2", "usq4g8", "vq3", "vq2c", "aq2x4g4")
    wide = copy.deepcopy(narrow).float()
    a, b = (
        QuantizedDenoiser(m, graph, Bank(tmp_path / n), "f") for n, m in (("narrow", narrow), ("wide", wide))
    )
    for scheme in schemes:
        name = "transformer_blocks.0.ff.net.0.proj"
        assert a.full(name).dtype == dtype and torch.equal(a.full(name).float(), b.full(name)), (
            "the same values"
        )
        one, two = (quantize_weight(m.full(name), scheme) for m in (a, b))
        assert all(
            torch.equal(x, y) for x, y in zip(one.tensors().values(), two.tensors().values(), strict=True)
        ), scheme


def test_orphaned_files_are_removed_and_bad_limits_named(tmp_path, monkeypatch) -> None:
    old, new = tmp_path / ".x.safetensors.1", tmp_path / ".y.safetensors.2"
    old.write_text("")
    new.write_text("")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    Bank(tmp_path).trim()
    assert not old.exists() and new.exists()
    monkeypatch.setenv("AQUABIT_BANK_LIMIT", "1.5")
    assert default_limit() == Bank(tmp_path).limit == 3 << 29
    for bad in ("0", "-3", "much", "nan"):
        monkeypatch.setenv("AQUABIT_BANK_LIMIT", bad)
        with pytest.raises(AquabitError, match=f"AQUABIT_BANK_LIMIT is {bad!r}"):
            default_limit()


def test_full_weights_know_their_keys_and_keep_them() -> None:
    weights = FullWeights()
    weights["a"], weights["b"] = torch.ones(2, 3), torch.ones(3, 2)
    key = weights.key("a")
    assert key == weight_hash(torch.ones(2, 3)) != weights.key("b")
    del weights["a"]  # as packing does
    assert weights.key("a") == key


def test_full_weights_know_which_are_equal_whatever_was_let_go() -> None:
    weights = FullWeights()
    weights["a"], weights["b"], weights["c"] = torch.ones(40), torch.ones(40), torch.ones(40)
    weights["c"][1] = 2.0  # the same where it is looked at first
    assert weights.twins("a") == ["a", "b"] and weights.twins("c") == ["c"]
    del weights["b"]
    assert weights.twins("a") == ["a", "b"]


def test_what_a_file_stores_is_owned_by_its_layer(tmp_path) -> None:
    whole = torch.arange(12, dtype=torch.float32)
    given = {"whole": whole, "again": whole, "part": whole[4:8], "other": torch.ones(3)}
    path = tmp_path / "a.safetensors"
    Bank(tmp_path).write(path, given)
    stored = load_file(path)
    assert stored.keys() == given.keys() and all(torch.equal(stored[n], t) for n, t in given.items())


def test_a_file_that_was_changed_or_is_another_s_is_no_fit(tmp_path: Path) -> None:
    bank, scheme = Bank(tmp_path), Scheme.parse("usq4")
    weight = torch.randn(8, 16)
    coded = quantize_weight(weight, scheme)
    bank.put("a", scheme, "", Fit(coded, 0.25))
    bank.put("b", scheme, "", Fit(quantize_weight(-weight, scheme), 0.5))
    path, other = bank.path("a", scheme), bank.path("b", scheme)
    whole = path.read_bytes()
    body = 8 + int.from_bytes(whole[:8], "little")
    for at in (*range(body, len(whole), 7), whole.index(b"0.25"), whole.index(b"[8, 16]") + 1):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.unlink()  # fits are mapped: not written over
        path.write_bytes(bytes(changed))
        assert Bank(tmp_path).get("a", scheme) is None, at
    path.unlink()
    path.write_bytes(other.read_bytes())
    assert bank.get("a", scheme) is None
    path.unlink()
    path.write_bytes(whole)
    found = bank.get("a", scheme)
    assert found is not None and found.error == 0.25
    assert torch.equal(found.coded.dequantize(), coded.dequantize())
