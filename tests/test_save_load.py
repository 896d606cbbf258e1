"""Adapter files: what is in them, what comes back, from where to where, and how PEFT's functions read them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    AutoPeftModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_fixtures import (
    BLOCKS,
    CONFIGS,
    MAIN,
    WIDTH,
    bare_vit,
    images,
    logits,
    needs_heads_to_load,
    randomize,
    trainable,
    vit,
)
from safetensors.torch import load_file, save_file
from torch import nn

from vpt_peft import VPTConfig
from vpt_peft.tuners.vpt.parameters import find_parameters


def attach(name: str, model: nn.Module | None = None, adapter_name: str = "default", **given: Any) -> PeftModel:
    attached = get_peft_model(vit() if model is None else model, CONFIGS[name](**given), adapter_name=adapter_name)
    return randomize(attached, 1, trainable_only=True).eval()  # type: ignore[return-value]


def save(folder: Path, name: str = "deep", **given: Any) -> torch.Tensor:
    """Save an adapter of `vit()` to `folder`; returns the logits with it."""
    model = attach(name, **given)
    model.save_pretrained(folder)
    return logits(model, images())


@pytest.fixture
def strict():
    """Missing or unexpected adapter keys are only warned of by PEFT: here they are failures."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        warnings.filterwarnings("error", ".*inconsistency.*")
        yield


def same_values(first: nn.Module, second: nn.Module) -> None:
    """Both hold the same adapter, bit by bit and in the same dtypes."""
    mine, theirs = get_peft_model_state_dict(first), get_peft_model_state_dict(second)
    assert list(mine) == list(theirs)
    for key in mine:
        assert mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]), key


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite the tensors of an adapter file."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_round_trip(name: str, low_cpu_mem_usage: bool, tmp_path: Path, strict):
    expected = save(tmp_path, name)
    loaded = PeftModel.from_pretrained(vit(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.is_meta for p in loaded.parameters()) and not trainable(loaded)
    assert torch.equal(logits(loaded.eval(), images()), expected)
    source = attach(name)
    same_values(loaded, source)


def file_keys() -> list[str]:
    """Keys of a file of deep prompts: prompts are named by block index."""
    prompts = [f"base_model.model.prompt_tuner.vpt_prompts.{index}" for index in range(BLOCKS)]
    return ["base_model.model.classifier.bias", "base_model.model.classifier.weight", *prompts]


@pytest.mark.parametrize("safe", [True, False])
def test_names_in_the_file(safe: bool, tmp_path: Path):
    """No path of a block is in the file, nor the adapter's name."""
    attach("deep", adapter_name="birds").save_pretrained(tmp_path, safe_serialization=safe)
    assert not (tmp_path / "adapter_config.json").exists()
    folder = tmp_path / "birds"
    file = folder / ("adapter_model.safetensors" if safe else "adapter_model.bin")
    held = load_file(file) if safe else torch.load(file, weights_only=True)
    assert sorted(held) == file_keys()
    loaded = PeftModel.from_pretrained(vit(), folder).eval()
    assert torch.equal(logits(loaded, images()), logits(attach("deep"), images()))


def test_several_adapters_in_one_folder(tmp_path: Path, strict):
    model = attach("deep")
    model.add_adapter("birds", CONFIGS["shallow"]())
    model.set_adapter("birds")
    randomize(model, 2, trainable_only=True)
    expected = {"birds": logits(model, images())}
    model.set_adapter("default")
    expected["default"] = logits(model, images())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "birds" / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(vit(), tmp_path).eval()
    result = loaded.load_adapter(tmp_path / "birds", "other")
    assert not result.missing_keys and not [key for key in result.unexpected_keys if "vpt_" in key]
    assert torch.equal(logits(loaded.eval(), images()), expected["default"])
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded, images()), expected["birds"])
    model.save_pretrained(tmp_path / "one", selected_adapters=["birds"])
    assert [path.name for path in (tmp_path / "one").iterdir() if path.is_dir()] == ["birds"]


@pytest.mark.parametrize(
    "names", [("a", "aa"), ("vpt", "prompt"), ("vpt", "vpt_"), ("base", "base_2"), ("p", "t"), ("a-b", "a b")]
)
def test_names_within_names(names: tuple[str, str], tmp_path: Path):
    """Adapters may be called like each other's beginnings or like parts of the prefix."""
    model = attach("deep", adapter_name=names[0])
    model.add_adapter(names[1], CONFIGS["deep"](num_virtual_tokens=2))
    model.set_adapter(names[1])
    randomize(model, 2, trainable_only=True)
    expected = {names[1]: logits(model, images())}
    model.set_adapter(names[0])
    expected[names[0]] = logits(model, images())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path / names[0], adapter_name=names[0])
    missing = loaded.load_adapter(tmp_path / names[1], names[1]).missing_keys
    # PEFT looks for the name anywhere in a key, so it may count other adapters' keys as missing.
    assert not [key for key in missing if f".vpt_prompts.{names[1]}." in key]
    for name in names:
        assert sorted(load_file(tmp_path / name / "adapter_model.safetensors")) == file_keys()
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval(), images()), expected[name])
    loaded.delete_adapter(names[0])
    loaded.set_adapter(names[1])
    assert torch.equal(logits(loaded, images()), expected[names[1]])


@pytest.mark.parametrize("name", ["0", "vpt_prompts", "vit", "prompt_tuner"])
def test_names_of_parts(name: str, tmp_path: Path):
    """PEFT drops keys with ".0." where another adapter is called "0": such a name is refused, or nothing is lost."""
    model = attach("deep", adapter_name="first")
    try:
        model.add_adapter(name, CONFIGS["deep"](num_virtual_tokens=2))
    except ValueError as error:
        assert repr(name) in str(error)
        assert list(model.peft_config) == ["first"]
        return
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "first" / "adapter_model.safetensors")) == file_keys()
    assert sorted(load_file(tmp_path / name / "adapter_model.safetensors")) == file_keys()


@pytest.mark.parametrize("name", MAIN)
def test_is_trainable(name: str, tmp_path: Path):
    save(tmp_path, name)
    loaded = PeftModel.from_pretrained(vit(), tmp_path, is_trainable=True)
    assert trainable(loaded) == trainable(attach(name))
    loaded.load_adapter(tmp_path, "frozen")
    loaded.load_adapter(tmp_path, "free", is_trainable=True)
    assert not [n for n in trainable(loaded) if ".frozen." in n] and [n for n in trainable(loaded) if ".free." in n]


@pytest.mark.parametrize("name", ["deep", "shallow", "gated", "channel"])
@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)])
def test_half_precision(name: str, dtype: torch.dtype, autocast: bool, tmp_path: Path):
    """Prompts of a half-precision encoder are float32 unless told otherwise, in memory and in the file."""
    wanted = torch.float32 if autocast else dtype
    model = get_peft_model(vit(dtype), CONFIGS[name](), autocast_adapter_dtype=autocast)
    randomize(model, 1, trainable_only=True).eval()
    prompts = [p for n, p in model.named_parameters() if "prompt_tuner" in n]
    assert {p.dtype for p in prompts} == {wanted}
    x = images(dtype=dtype)
    expected = logits(model, x)
    assert expected.isfinite().all()
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            vit(dtype), tmp_path, autocast_adapter_dtype=autocast, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert {p.dtype for n, p in loaded.named_parameters() if "prompt_tuner" in n} == {wanted}
        assert torch.equal(logits(loaded.eval(), x), expected)
        same_values(loaded, model)


@pytest.mark.parametrize("name", ["deep", "gated"])
def test_between_bare_and_classifier(name: str, tmp_path: Path):
    """A file holds no path above or below the encoder that would tie it to the model it was trained in."""
    save(tmp_path / "classifier", name)
    with_head = attach(name)
    expected = logits(with_head.base_model.model.vit, images())
    bare = PeftModel.from_pretrained(bare_vit(), tmp_path / "classifier").eval()
    assert torch.equal(logits(bare, images()), expected)
    attach(name, bare_vit()).save_pretrained(tmp_path / "bare")
    encoder = logits(attach(name, bare_vit()), images())
    onto = vit()
    head = {key: value.clone() for key, value in onto.classifier.state_dict().items()}
    loaded = PeftModel.from_pretrained(onto, tmp_path / "bare").eval()
    assert torch.equal(logits(loaded.base_model.model.vit, images()), encoder)
    for key, value in head.items():
        assert torch.equal(onto.classifier.state_dict().get(key, value), value)


@pytest.mark.parametrize(
    "old, new",
    [("base_model.model.vit.", "base_model.model.vit_of_2021.body."), ("base_model.model.vit.", "base_model.model."),
     ("base_model.model.vit.", "base_model.model.vision_tower.vision_model.")],
)  # fmt: skip
def test_other_paths_to_the_encoder(old: str, new: str, tmp_path: Path, strict):
    """Files of a transformers version in which the encoder has another name."""
    expected = save(tmp_path)
    edit(tmp_path, lambda held: {(key.replace(old, new) if "vpt_" in key else key): v for key, v in held.items()})
    loaded = PeftModel.from_pretrained(vit(), tmp_path).eval()
    assert torch.equal(logits(loaded, images()), expected)


@needs_heads_to_load
@pytest.mark.parametrize("path", ["vit.", "", "vision_tower.vision_model."])
def test_other_paths_in_transformers(path: str, tmp_path: Path):
    expected = save(tmp_path)
    prefix = "base_model.model."
    edit(
        tmp_path,
        lambda held: {
            (key.replace(prefix + "vit.", prefix + path) if "vpt_" in key else key): v for key, v in held.items()
        },
    )
    model = vit()
    assert not model.load_adapter(str(tmp_path)).missing_keys
    assert torch.equal(logits(model.eval(), images()), expected)


def other_depth(**given: Any) -> nn.Module:
    return vit(num_hidden_layers=2, **given)


def deeper(**given: Any) -> nn.Module:
    return vit(num_hidden_layers=4, **given)


def wider(**given: Any) -> nn.Module:
    return vit(hidden_size=48, **given)


def of_other_grid(**given: Any) -> nn.Module:
    return vit(image_size=16, **given)


def change_config(folder: Path, **fields: Any) -> None:
    config = PeftConfig.from_pretrained(folder)
    for name, value in fields.items():
        setattr(config, name, value)
    config.save_pretrained(folder)


UNFIT: list[tuple[str, Callable[..., nn.Module], dict[str, Any], str]] = [
    ("deep", wider, {}, "width|size|shape"),
    ("deep", other_depth, {}, "block|depth|missing|2"),
    ("deep", deeper, {}, "block|depth|missing|3"),
    ("deep", vit, {"num_virtual_tokens": 9}, "num_virtual_tokens|size|shape"),
    ("deep", vit, {"layers_to_transform": [0, 1]}, "block|vpt_prompts|2"),
    ("gated", vit, {"gate": "elementwise"}, "gate"),
    ("gated", vit, {"attention_temperature": False}, "temperature"),
    ("added", of_other_grid, {}, "size|shape|token"),
]


def is_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    x = images(size=model.config.image_size)
    assert torch.equal(logits(model, x), before["logits"])
    assert list(model.state_dict()) == before["keys"]
    assert find_parameters(model) is None


@pytest.mark.parametrize("name, make, fields, reason", UNFIT)
def test_unfit_adapters_are_refused(
    name: str, make: Callable[..., nn.Module], fields: dict[str, Any], reason: str, tmp_path: Path
):
    """An adapter of another width, depth, length, kind or patch grid: an error, and the model is left as it was."""
    save(tmp_path, name, modules_to_save=[])
    if fields:
        change_config(tmp_path, **fields)
    base = make()
    before = {"logits": logits(base, images(size=base.config.image_size)), "keys": list(base.state_dict())}
    with pytest.raises((ValueError, RuntimeError), match=f"(?i){reason}"):
        PeftModel.from_pretrained(base, tmp_path)
    is_untouched(base, before)


@pytest.mark.parametrize("name, make, fields, reason", [UNFIT[0], UNFIT[2], UNFIT[3]])
def test_unfit_second_adapter(
    name: str, make: Callable[..., nn.Module], fields: dict[str, Any], reason: str, tmp_path: Path
):
    save(tmp_path, name, modules_to_save=[])
    if fields:
        change_config(tmp_path, **fields)
    model = attach("shallow", make())
    x = images()
    before, keys = logits(model, x), list(model.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=f"(?i){reason}"):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(logits(model, x), before)
    assert list(model.peft_config) == ["default"] and list(model.state_dict()) == keys
    model.add_adapter("second", VPTConfig(num_virtual_tokens=2))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "absent", "no_prompts"])
def test_damaged_files(damage: str, tmp_path: Path):
    """A damaged file is an error, never random prompts; the good file loads into the same model afterwards."""
    expected = save(tmp_path / "good")
    save(tmp_path / "bad")
    path = tmp_path / "bad" / "adapter_model.safetensors"
    whole = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "no_prompts":
        edit(tmp_path / "bad", lambda held: {key: value for key, value in held.items() if "classifier" in key})
    else:
        path.write_bytes(
            {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a file of tensors"}[damage]
        )
    base = vit()
    with pytest.raises(Exception) as raised, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(base, tmp_path / "bad")
    assert not isinstance(raised.value, (AttributeError, IndexError, KeyError)), raised.value
    loaded = PeftModel.from_pretrained(vit(), tmp_path / "good").eval()
    with pytest.raises(Exception), warnings.catch_warnings():  # noqa: B017
        warnings.simplefilter("ignore")
        loaded.load_adapter(tmp_path / "bad", "second")
    assert torch.equal(logits(loaded.eval(), images()), expected)
    again = PeftModel.from_pretrained(vit(), tmp_path / "good").eval()
    assert torch.equal(logits(again, images()), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_functional_interface(name: str, strict):
    """inject_adapter_in_model with and without a state dict, get_/set_peft_model_state_dict."""
    source = attach(name)
    state = get_peft_model_state_dict(source)
    expected = logits(source, images())
    for given in ({}, {"state_dict": state}, {"low_cpu_mem_usage": True}):
        model = inject_adapter_in_model(CONFIGS[name](), vit(), **given)
        plain = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        result = set_peft_model_state_dict(model, plain, low_cpu_mem_usage="low_cpu_mem_usage" in given)
        assert not [key for key in result.missing_keys if "prompt_tuner" in key] and not result.unexpected_keys
        assert torch.equal(logits(model.eval(), images()), expected)
        assert set(get_peft_model_state_dict(model)) == set(plain)


@needs_heads_to_load
@pytest.mark.parametrize("name", ["deep", "gated"])
def test_auto_classes(name: str, tmp_path: Path, strict):
    from transformers import AutoModelForImageClassification

    vit(torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = attach(name, base)
    model.save_pretrained(tmp_path / "adapter")
    x = images(dtype=torch.float32)
    expected = logits(model, x)
    auto = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert type(auto.base_model) is type(model.base_model) and torch.equal(logits(auto, x), expected)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter").eval()
    assert plain.active_adapters() == ["default"] and torch.equal(logits(plain, x), expected)


def test_width_is_named_in_the_error(tmp_path: Path):
    save(tmp_path, modules_to_save=[])
    with pytest.raises((ValueError, RuntimeError), match=f"{WIDTH}.*48|48.*{WIDTH}"):
        PeftModel.from_pretrained(wider(), tmp_path)


@pytest.mark.skipif(not hasattr(peft, "get_base_model_state_dict"), reason="this PEFT does not have the function")
@pytest.mark.parametrize("name", MAIN)
def test_state_dict_of_the_base(name: str):
    """PEFT gives the backbone's weights under their own names and takes them again, with prompts attached."""
    plain = vit(seed=8).state_dict()
    model = attach(name, modules_to_save=[])
    found = peft.get_base_model_state_dict(model)
    assert list(found) == list(plain) and all(torch.equal(found[key], v) for key, v in vit().state_dict().items())
    peft.set_base_model_state_dict(model, plain)
    assert torch.equal(logits(model, images()), logits(attach(name, vit(seed=8), modules_to_save=[]), images()))
