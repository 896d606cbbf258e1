"""Prompts over frozen weights of 8 and 4 bits: keys and values come from the quantised maps, prompts stay float32."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_fixtures import (
    BLOCKS,
    CONFIGS,
    gradients,
    hook_count,
    images,
    logits,
    own_attributes,
    randomize,
    trainable,
    vit,
)
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments, ViTForImageClassification

from vpt_peft import EncoderError, VPTConfig
from vpt_peft.tuners.vpt.parameters import find_parameters


KINDS = ("torchao_int8", "torchao_int4", "bitsandbytes_int8", "bitsandbytes_nf4")
# Largest difference of logits from the float model, as a part of the largest logit
CLOSE = {"torchao_int8": 0.06, "torchao_int4": 0.6, "bitsandbytes_int8": 0.1, "bitsandbytes_nf4": 0.6}
# bitsandbytes rounds activations to 8 bits too, where a rounding error can tip one over to the next step
ROUNDING = {"bitsandbytes_int8": 1e-2}


def quantization(kind: str, keep: list[str]) -> Any:
    """transformers' configuration of a kind; the modules `keep` stay as they are."""
    package, _, bits = kind.partition("_")
    pytest.importorskip(package)
    if package == "bitsandbytes":
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        return BitsAndBytesConfig(llm_int8_skip_modules=keep, **({"load_in_8bit": True} if bits == "int8" else four))
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    made = {
        "int8": lambda: Int8WeightOnlyConfig(),
        "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "dynamic": lambda: Int8DynamicActivationInt8WeightConfig(),
    }
    return TorchAoConfig(made[bits](), modules_to_not_convert=keep)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of width 64: bitsandbytes quantises in groups of 64."""
    path = tmp_path_factory.mktemp("backbone")
    vit(torch.float32, hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def load(folder: Path, kind: str | None, keep: tuple[str, ...] = ("classifier",), **given: Any) -> nn.Module:
    config = {} if kind is None else {"quantization_config": quantization(kind, list(keep))}
    return ViTForImageClassification.from_pretrained(folder, **config, **given).eval()


def attach(base: nn.Module, name: str = "deep", **given: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "prompts as keys and values differ")
        model = get_peft_model(base, CONFIGS[name](**given))
    return randomize(model, 5, trainable_only=True).eval()  # type: ignore[return-value]


def modes(model: nn.Module) -> list[str | None]:
    return [layer.layouts["default"].mode for layer in find_parameters(model).layers]  # type: ignore[union-attr]


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """What must not change, as bytes are kept: quantised weights and everything else that does not train."""
    names = set(trainable(model))
    return {
        n: (v.dequantize() if hasattr(v, "dequantize") and type(v).__module__.startswith("torchao") else v).clone()
        for n, v in model.state_dict().items()
        if isinstance(v, torch.Tensor) and n not in names
    }


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_through_quantised_maps(kind: str, folder):
    """The same function as prompts as tokens, in value and gradient, on the same quantised weights."""
    pixels, rounding = images(3, torch.float32), ROUNDING.get(kind, 1e-5)
    as_keys = attach(load(folder, kind), implementation="kv")
    as_tokens = attach(load(folder, kind), implementation="token")
    assert modes(as_keys) == ["kv"] * BLOCKS and modes(as_tokens) == ["token"] * BLOCKS
    first, second = logits(as_keys, pixels), logits(as_tokens, pixels)
    assert (first - second).abs().max() < rounding * first.abs().max()
    found, wanted = gradients(as_keys, pixels), gradients(as_tokens, pixels)
    assert found.keys() == wanted.keys() == set(trainable(as_keys))
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() < 5 * rounding * gradient.abs().max()
    with as_keys.disable_adapter():
        assert (logits(as_keys, pixels) - first).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_close_to_the_float_model(kind: str, folder):
    pixels = images(4, torch.float32)
    wanted = logits(attach(load(folder, None)), pixels)
    difference = (logits(attach(load(folder, kind)), pixels) - wanted).abs().max() / wanted.abs().max()
    assert 0 < difference < CLOSE[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_stay_float32(kind: str, dtype: torch.dtype, folder):
    model = attach(load(folder, kind, dtype=dtype))
    store = find_parameters(model)
    assert {parameter.dtype for parameter in store.parameters()} == {torch.float32}  # type: ignore[union-attr]
    assert {name.rsplit(".default", 1)[0].rsplit(".", 1)[-1] for name in trainable(model)} == {
        "vpt_prompts", "modules_to_save",
    }  # fmt: skip
    assert logits(model, images(2, dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["deep", "gated"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_with_evaluation_between(kind: str, name: str, folder):
    """Only prompts and head move, also after a forward pass without gradients (bitsandbytes repacks weights then)."""
    model, pixels, labels = attach(load(folder, kind), name), images(4, torch.float32), torch.tensor([0, 1, 2, 3])
    before, start = frozen(model), {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        logits(model.eval(), pixels)
        loss = model.train()(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for key, parameter in model.named_parameters():
        assert not parameter.requires_grad or not torch.equal(parameter, start[key]), key
    after = frozen(model)
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_merge(kind: str, folder, tmp_path):
    """The file holds float values only, fits a fresh quantised model exactly, and a float one."""
    model, pixels = attach(load(folder, kind)), images(3, torch.float32)
    wanted = logits(model, pixels)
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == BLOCKS + 2 and {value.dtype for value in saved.values()} == {torch.float32}
    again = PeftModel.from_pretrained(load(folder, kind), str(tmp_path)).eval()
    assert torch.equal(logits(again, pixels), wanted)
    plain = PeftModel.from_pretrained(load(folder, None), str(tmp_path)).eval()
    assert (logits(plain, pixels) - wanted).abs().max() < CLOSE[kind] * wanted.abs().max()
    again.merge_adapter()
    assert (logits(again, pixels) - wanted).abs().max() < 1e-6
    again.unmerge_adapter()
    assert torch.equal(logits(again, pixels), wanted)


@pytest.mark.parametrize("kind", ["torchao_int8", "bitsandbytes_nf4"])
def test_trainer(kind: str, folder, tmp_path):
    model = attach(load(folder, kind))
    rows = [{"pixel_values": images(1, torch.float32, seed=i)[0], "labels": i % 5} for i in range(8)]
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=1e-2, label_names=["labels"], **options)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows).train()
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters() if p.requires_grad)


def refused(base: nn.Module, error: type[Exception], message: str, **given: Any) -> None:
    """Attaching raises and leaves the model as it was."""
    pixels = images(2, torch.float32)
    before = logits(base, pixels)
    keys, hooks, attributes = list(base.state_dict()), hook_count(base), own_attributes(base)
    with pytest.raises(error, match=message):
        get_peft_model(base, VPTConfig(num_virtual_tokens=2, **given))
    assert list(base.state_dict()) == keys and hook_count(base) == hooks and own_attributes(base) == attributes
    assert torch.equal(logits(base, pixels), before)


@pytest.mark.parametrize("kind", ["torchao_int8", "bitsandbytes_int8"])
def test_a_quantised_head_is_refused(kind: str, folder):
    base = load(folder, kind, keep=("nothing",))
    refused(base, ValueError, "classifier.*modules_to_not_convert")
    model = attach(base, modules_to_save=[])
    assert all("vpt_prompts" in name for name in trainable(model)) and gradients(model, images(2, torch.float32))


def test_weights_without_gradient_are_refused(folder, tmp_path):
    """torchao's 8-bit activations let no gradient pass; for inference they will do."""
    refused(load(folder, "torchao_dynamic"), EncoderError, "q_proj.*no gradient.*weights only")
    trained, pixels = attach(load(folder, None)), images(3, torch.float32)
    trained.save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(load(folder, "torchao_dynamic"), str(tmp_path)).eval()
    wanted = logits(trained, pixels)
    assert modes(model) == ["kv"] * BLOCKS
    assert 0 < (logits(model, pixels) - wanted).abs().max() < 0.1 * wanted.abs().max()


def four_bit_maps(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "Linear4bit"]


def test_weights_packed_for_inference_are_refused(folder):
    """bitsandbytes repacks 4-bit weights for some CPUs in a pass without gradients, and its kernel has none then."""
    base = load(folder, "bitsandbytes_nf4")
    logits(base, images(2, torch.float32))
    if not any(getattr(each.weight.quant_state, "packing_format_for_cpu", False) for each in four_bit_maps(base)):
        pytest.skip("this CPU has no AVX512 for bfloat16, so nothing is packed")
    # Not by `refused`: it reads the state dictionary, for which bitsandbytes unpacks
    hooks, before = hook_count(base), logits(base, images(2, torch.float32))
    with pytest.raises(EncoderError, match="layers.0.attention.q_proj.*packed its weights.*Load the model again"):
        get_peft_model(base, VPTConfig(num_virtual_tokens=2))
    assert hook_count(base) == hooks and find_parameters(base) is None
    assert torch.equal(logits(base, images(2, torch.float32)), before)


def test_unload_lets_weights_be_packed_again(folder):
    base = load(folder, "bitsandbytes_nf4")
    before = [each.support_avx512bf16_for_cpu for each in four_bit_maps(base)]
    model = attach(base)
    assert len(before) == 6 * BLOCKS and not any(each.support_avx512bf16_for_cpu for each in four_bit_maps(model))
    base = model.unload()
    assert [each.support_avx512bf16_for_cpu for each in four_bit_maps(base)] == before


def test_export_is_refused(folder, tmp_path):
    from vpt_peft.export import export_model

    with pytest.raises(ValueError, match="quantised.*quantization_config"):
        export_model(attach(load(folder, "torchao_int8")), tmp_path / "a", "torch")
    assert not list(tmp_path.iterdir())


class Packed(nn.Module):
    """A linear map whose weights are integers of one step per row, as quantisation libraries keep them.

    Args:
        linear: The map.
        name: Attribute of the weights.
        flaw: "" for none, "broken" raises, "opaque" shows no weights, "detached" lets no gradient pass.
    """

    def __init__(self, linear: nn.Linear, name: str = "weight", flaw: str = "") -> None:
        super().__init__()
        self.in_features, self.name, self.flaw = linear.in_features, name, flaw
        steps = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        weights = (linear.weight.detach() / steps).round().to(torch.int8)
        # A list hides tensors from `buffers()`
        self.hidden = [weights]
        if flaw != "opaque":
            self.register_buffer(name, weights)
        self.register_buffer("steps", steps)
        self.register_buffer("offset", linear.bias.detach().clone())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.flaw == "broken" and tokens.shape[1] < 5:
            raise RuntimeError("rows must be divisible by five")
        weights = self.hidden[0]
        tokens = tokens.detach() if self.flaw == "detached" else tokens
        return nn.functional.linear(tokens, weights.to(self.steps.dtype) * self.steps, self.offset)


def packed(name: str = "weight", flaw: str = "") -> nn.Module:
    """A ViT in which the maps of queries, keys and values are packed; all but the first block's without the flaw."""
    base = vit(torch.float32)
    for index, block in enumerate(base.vit.layers):
        for part in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(block.attention, part)
            setattr(block.attention, part, Packed(linear, name, flaw if index == 0 or flaw == "opaque" else ""))
    return base


@pytest.mark.parametrize("name", ["weight", "qweight", "W_q"])
def test_packed_maps_are_found(name: str):
    """Whatever a library calls its packed weights."""
    pixels = images(2, torch.float32)
    model, tokens = attach(packed(name)), attach(packed(name), implementation="token")
    assert modes(model) == ["kv"] * BLOCKS
    assert (logits(model, pixels) - logits(tokens, pixels)).abs().max() < 1e-5
    assert {n for n, g in gradients(model, pixels).items() if g.any()} == set(trainable(model))


@pytest.mark.parametrize(
    ("flaw", "message", "given"),
    [
        ("broken", "layers.0.attention.k_proj.*Packed.*divisible by five.*modules_to_not_convert", {}),
        ("detached", "layers.0.attention.q_proj.*Packed.*no gradient", {}),
        ("opaque", "implementation='kv'.*not known", {"implementation": "kv"}),
    ],
)
def test_layers_that_cannot_be_read(flaw: str, message: str, given: dict[str, Any]):
    refused(packed(flaw=flaw), EncoderError, message, **given)


def test_unknown_maps_run_as_tokens():
    model = attach(packed(flaw="opaque"))
    assert modes(model) == ["token"] * BLOCKS
    assert (
        logits(model, images(2, torch.float32)) - logits(attach(vit(torch.float32)), images(2, torch.float32))
    ).abs().max() < 0.1
