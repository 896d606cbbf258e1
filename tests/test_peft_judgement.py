"""The checks that PEFT's own tests make of every method (its tests/testing_common.py and test_custom_models.py).

Written anew, for prompts of five kinds on four encoders. What does not apply:

- generate, its positional arguments, half precision and beam search; passing `inputs_embeds`; tasks of prompt learning:
  encoders of images make no text, and prompts here are no `PromptLearningConfig`.
- merge_and_unload (plain, several adapters, float16, NaN, LayerNorm): prompts are inputs and cannot become weights, which
  is refused (tested here); `merge_adapter` freezes keys and values instead (tested here).
- weighted combinations, conversion to LoRA, hot swapping, DoRA, embeddings of words, trainable tokens, `in_features` and
  `out_features`, `target_modules` and layer patterns, `weight` and `bias` of wrapped layers: of methods that change
  weights of layers.
- "a second adapter with bias is refused": biases are offsets of their own adapter, so several may have some (tested here).
- "disabling with bias warns": there is nothing to warn of, the base is given exactly (test_biases.py).
- `enable_input_require_grads` on Swin: transformers' own fails there without any adapter, as its embeddings return a
  tuple; checkpointing is tested without it.
- half precision on the CPU, `torch.compile`, mixed models, sharding, devices: test_save_load.py, test_training.py,
  test_together.py, test_sharding.py, test_device_map.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from judged_models import KINDS, PIXELS, REFUSED, attach, base, every, output, still
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)
from peft_fixtures import hook_count, own_attributes, randomize

from vpt_peft import EncoderError


@pytest.mark.parametrize(("encoder", "kind"), REFUSED)
def test_refused_with_the_reason(encoder: str, kind: str):
    with pytest.raises(EncoderError, match=REFUSED[encoder, kind]):
        attach(encoder, kind)


@every
def test_names_and_attributes(encoder: str, kind: str):
    model = attach(encoder, kind, "test-adapter")
    assert all(hasattr(model, name) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))
    assert any("test-adapter" in name for name, _ in model.named_parameters())
    assert model.active_adapter == "test-adapter" and model.active_adapters == ["test-adapter"]
    trained, total = model.get_nb_trainable_parameters()
    assert 0 < trained < total


@every
def test_prepared_for_training_on_few_bits(encoder: str, kind: str):
    model = get_peft_model(prepare_model_for_kbit_training(base(encoder)), KINDS[kind]())
    assert all(p.requires_grad == ("prompt_tuner" in n or "modules_to_save" in n) for n, p in model.named_parameters())
    if encoder == "swin":
        return
    model.enable_input_require_grads()
    embedded = model.get_input_embeddings()(PIXELS)
    assert (embedded[0] if isinstance(embedded, tuple) else embedded).requires_grad


@every
def test_low_cpu_mem_usage(encoder: str, kind: str, tmp_path: Path):
    model = attach(encoder, kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(encoder), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert torch.equal(still(loaded), still(model))
    injected = base(encoder)
    inject_adapter_in_model(KINDS[kind](), injected, low_cpu_mem_usage=True)
    assert "meta" in {p.device.type for p in injected.parameters()}


@every
def test_training(encoder: str, kind: str):
    """All of the adapter gets a gradient and moves, and nothing else does."""
    model = attach(encoder, kind).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    output(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        own = model.prefix in name or "modules_to_save" in name
        assert parameter.requires_grad == own and (parameter.grad is not None) == own, name
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


@every
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(encoder: str, kind: str, reentrant: bool):
    model = attach(encoder, kind).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        output(model).square().sum().backward()
        return {name: p.grad.clone() for name, p in trained.items()}  # type: ignore[union-attr]

    expected = gradients()
    if encoder != "swin":
        model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and encoder == "swin" and kind in ("shallow", "partly deep", "gated"):
        # Prompts beside windows are not inputs of their blocks, so their gradient would be lost
        with pytest.raises(ValueError, match="use_reentrant"):
            gradients()
        return
    for name, value in gradients().items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5), name


@every
def test_delete(encoder: str, kind: str):
    model = attach(encoder, kind)
    expected = still(model)
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        model.delete_adapter("unknown")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", KINDS[kind]())
    for active in (True, False):
        model.add_adapter("gone", KINDS[kind]())
        model.set_adapter("gone" if active else "default")
        model.delete_adapter("gone")
        assert "gone" not in model.peft_config and model.active_adapters == ["default"]
        assert not any("gone" in name for name, _ in model.named_modules())
        assert not any(
            "gone" in held
            for module in model.modules()
            for held in vars(module).values()
            if isinstance(held, (dict, list, set))
        )
        assert torch.equal(still(model.eval()), expected)


@every
def test_unload(encoder: str, kind: str):
    model = base(encoder)
    keys, hooks, attributes, expected = (
        list(model.state_dict()),
        hook_count(model),
        own_attributes(model),
        still(model),
    )
    prompted = get_peft_model(model, KINDS[kind]())
    with pytest.raises(ValueError, match="cannot put them into the model"):
        prompted.merge_and_unload()
    back = prompted.unload()
    assert back is model and list(back.state_dict()) == keys and hook_count(back) == hooks
    assert own_attributes(back) == attributes and not hasattr(back, "peft_config")
    assert torch.equal(still(back.eval()), expected)


@every
def test_disable(encoder: str, kind: str):
    expected = still(base(encoder))
    model = attach(encoder, kind)
    prompted = still(model)
    assert not torch.allclose(prompted, expected)
    with model.disable_adapter():
        assert torch.equal(still(model), expected)
    assert torch.equal(still(model), prompted)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        assert torch.equal(still(model), expected)
    # What was disabled before stays so
    assert torch.equal(still(model), expected)
    model.base_model.enable_adapter_layers()
    assert torch.equal(still(model), prompted)


@every
def test_merged_keys_and_values(encoder: str, kind: str):
    model = attach(encoder, kind)
    expected = still(model)
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError as error:
        assert "no deep prompts that run as keys and values" in str(error)
        return
    assert torch.allclose(still(model), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="merged already"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert torch.equal(still(model), expected)


@every
def test_mixed_batches(encoder: str, kind: str):
    model = attach(encoder, kind, "first")
    model.add_adapter("second", KINDS[kind]())
    model.set_adapter("second")
    randomize(model, 2, trainable_only=True)
    rows = {"second": still(model.eval())}
    model.set_adapter("first")
    rows["first"] = still(model)
    with model.disable_adapter():
        rows["__base__"] = still(model)
    names = ["__base__", "first", "second"]
    if encoder == "swin" and kind in ("shallow", "partly deep", "gated"):
        with pytest.raises(ValueError, match="prompts that run beside windows cannot share a batch"):
            still(model, adapter_names=names)
        return
    mixed = still(model, adapter_names=names)
    for row, name in enumerate(names):
        assert torch.allclose(mixed[row], rows[name][row], rtol=1e-4, atol=1e-5), name
        assert all(not torch.allclose(mixed[row], rows[other][row]) for other in names if other != name)


@every
def test_the_bases_own_weights(encoder: str, kind: str):
    plain = base(encoder)
    expected = {key: value.clone() for key, value in plain.state_dict().items()}
    model = get_peft_model(plain, KINDS[kind]())
    found = get_base_model_state_dict(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(0.1)
    result = set_base_model_state_dict(model, expected, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    found = get_base_model_state_dict(model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_adapters(encoder: str, kind: str, dtype: torch.dtype):
    """Adapters of a half-precision model are in float32, or in its own type without autocast."""
    for autocast in (True, False):
        model = get_peft_model(base(encoder).to(dtype), KINDS[kind](), autocast_adapter_dtype=autocast)
        model.add_adapter("other", KINDS[kind](), autocast_adapter_dtype=autocast)
        types = {p.dtype for name, p in model.named_parameters() if model.prefix in name}
        assert types == {torch.float32 if autocast else dtype}


@every
def test_requires_grad_follows_the_active_adapter(encoder: str, kind: str):
    model = attach(encoder, kind)

    def trained() -> set[bool]:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return {".other." in name for name in names}

    model.add_adapter("other", KINDS[kind]())
    assert trained() == {False}
    model.set_adapter("other")
    assert trained() == {True}
    model.set_adapter("default", inference_mode=True)
    assert trained() == set()
    model.set_requires_grad(["default", "other"])
    assert trained() == {True, False}
    model.set_requires_grad("other", requires_grad=False)
    assert trained() == {False}


@every
def test_two_adapters_with_biases(encoder: str, kind: str):
    model = attach(encoder, kind, bias="all")
    expected = still(model)
    model.add_adapter("other", KINDS[kind](bias="all"))
    model.set_adapter("other")
    randomize(model, 3, trainable_only=True)
    assert not torch.allclose(still(model.eval()), expected)
    model.set_adapter("default")
    assert torch.equal(still(model), expected)


@every
def test_a_refused_adapter_leaves_nothing(encoder: str, kind: str):
    model = attach(encoder, kind)
    expected, keys = still(model), list(model.state_dict())
    with pytest.raises(ValueError, match="backbone='elsewhere'"):
        model.add_adapter("refused", KINDS[kind](backbone="elsewhere"))
    assert "refused" not in model.peft_config and "refused" not in model.base_model.peft_config
    assert list(model.state_dict()) == keys and torch.equal(still(model), expected)


@every
def test_the_name_makes_no_difference(encoder: str, kind: str):
    outputs = []
    for name in ("default", "another", "x_y-z"):
        torch.manual_seed(0)
        outputs.append(still(get_peft_model(base(encoder), KINDS[kind](), adapter_name=name).eval()))
    assert all(torch.equal(outputs[0], each) for each in outputs)


@every
def test_status(encoder: str, kind: str):
    model = attach(encoder, kind)
    status = model.get_model_status()
    assert status.enabled and status.active_adapters == ["default"] and not status.merged_adapters
    assert status.trainable_params > 0 and status.requires_grad == {"default": True}
    assert model.targeted_module_names
