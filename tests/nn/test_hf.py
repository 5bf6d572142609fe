"""Models of `transformers`, built from a config: sparse, saved, loaded, equal to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shflnb.errors import FormatError
from shflnb.nn import ShflLinear, sparsify_
from shflnb.nn.hf import layer_records, restore_layers
from shflnb.nn.observe import observe

transformers = pytest.importorskip("transformers", reason="needs transformers (not installed)")

IDS = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def sparsified(make: Callable[[], Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = make()
    options = {"search": "identity", "measure_model": False}
    return model, sparsify_(model, 0.5, (16, 16), example_inputs={"input_ids": IDS}, **options)


@pytest.mark.parametrize("make", [bert, llama])
def test_which_layers_become_sparse(make: Callable[[], Any], fixed_times: Callable[..., None]) -> None:
    fixed_times()
    model, report = sparsified(make)
    per_layer = 6 if make is bert else 7
    assert sum("layer" in row.name for row in report.sparse) == 2 * per_layer
    head = report["cls.predictions.decoder" if make is bert else "lm_head"]
    assert head.decision == "dense" and ("tied" in head.reason or "output head" in head.reason)
    mlp = report["bert.encoder.layer.0.intermediate.dense" if make is bert else "model.layers.1.mlp.gate_proj"]
    assert mlp.layout.startswith("token -> feature") and mlp.fused == ("gelu" if make is bert else "silu")
    query = next(row.name for row in report.sparse if row.name.endswith(("query", "q_proj")))
    assert model.get_submodule(query).shared.readers == 3


@pytest.mark.parametrize("make", [bert, llama])
def test_residual_sums_are_seen(make: Callable[[], Any]) -> None:
    """Of attention and of the MLP, through dropout, in every layer; planned where results have to be turned."""
    model = make()
    linears = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    summed = {name.partition(".layer.")[2] or name.partition(".layers.")[2]
              for name in observe(model, {"input_ids": IDS}, linears).summed}  # fmt: skip
    ends = ("attention.output.dense", "output.dense") if make is bert else ("self_attn.o_proj", "mlp.down_proj")
    assert summed == {f"{layer}.{end}" for layer in range(2) for end in ends}


@pytest.mark.parametrize("make", [bert, llama])
def test_reload_is_bit_equal(make: Callable[[], Any], fixed_times: Callable[..., None], tmp_path: Path) -> None:
    fixed_times()
    model, report = sparsified(make)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "shflnb" and set(config["layers"]) == {row.name for row in report.sparse}
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, want)
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert layer_records(loaded) == layer_records(model)
    assert loaded.half().dtype == torch.float16
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert again == config


def test_generation_runs(fixed_times: Callable[..., None]) -> None:
    fixed_times()
    model, _ = sparsified(llama)
    out = model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 9)


def test_in_bfloat16(fixed_times: Callable[..., None], tmp_path: Path) -> None:
    fixed_times()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    # Not .to(bfloat16): that rounds the rotary frequencies too, which from_pretrained makes anew in float32.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    sparsify_(model, 0.5, (16, 16), example_inputs={"input_ids": IDS}, search="identity", measure_model=False)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        assert torch.equal(loaded(input_ids=IDS).logits, want)


def test_finetuned_models_are_saved_too(tmp_path: Path) -> None:
    import shflnb.nn

    torch.manual_seed(0)
    model = bert()
    shflnb.nn.prepare(model, 0.5, (16, 16), steps=0, search="identity").finalize()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_dequantize_gives_dense_layers_back(fixed_times: Callable[..., None], tmp_path: Path) -> None:
    fixed_times()
    model, _ = sparsified(llama)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        model.dequantize()
        assert not any(isinstance(m, ShflLinear) for m in model.modules())
        torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    "records",
    [
        {"nowhere": {"block": [16, 16], "kept": 3}},
        {"0": {"block": [16], "kept": 3}},
        {"0": {"block": [16, 16], "kept": 10**12}},
        {"1": {"block": [16, 16], "kept": 3}},
        {"0": {"kept": 3}},
    ],
)
def test_a_damaged_config_is_refused(records: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU())
    with pytest.raises(FormatError):
        restore_layers(model, records, [])
