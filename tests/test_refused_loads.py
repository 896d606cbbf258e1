"""Adapter folders that cannot be loaded: a clear error before anything is changed, whichever way they are loaded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft_fixtures import CONFIGS, images, lora, randomize, vit
from safetensors.torch import load_file, save_file
from torch import nn

from vpt_peft.tuners.vpt.parameters import find_parameters


Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def attach(name: str) -> PeftModel:
    model = get_peft_model(vit(torch.float32), CONFIGS[name]())
    return randomize(model, 1, trainable_only=True).eval()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("deep", "gated", "gated_elementwise"):
        attach(name).save_pretrained(folder / name)
    get_peft_model(with_lora("deep"), CONFIGS["deep"](), adapter_name="default").save_pretrained(folder / "nested")
    return folder


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a refused load must leave alone."""
    with torch.no_grad():
        output = model(pixel_values=images(dtype=torch.float32)).logits
    configs = getattr(model, "peft_config", {})
    return {
        "output": output,
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "trains": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "configs": {name: (id(config), config.to_dict()) for name, config in configs.items()},
        "active": getattr(model, "active_adapter", None) if configs else None,
        "labels": dict(model.config.id2label),
        "hooks": [
            (name, list(held))
            for module in model.modules()
            for name, held in vars(module).items()
            if name.endswith("_hooks") and isinstance(held, dict)
        ],
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert torch.equal(before.pop("output"), after.pop("output"))
    mine, theirs = before.pop("values"), after.pop("values")
    assert list(mine) == list(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)
    for key, value in before.items():
        assert after[key] == value, key


def prompted(name: str) -> PeftModel:
    return attach("shallow" if name == "deep" else name)


def training_vit(_: str) -> nn.Module:
    model = vit(torch.float32).train()
    model.vit.embeddings.requires_grad_(False)
    return model


def with_lora(_: str) -> PeftModel:
    return get_peft_model(vit(torch.float32), lora()).eval()


# How a folder is loaded: a model, and the call
WAYS: dict[str, tuple[Callable[[str], Any], Callable[[Any, Path], Any]]] = {
    "base": (training_vit, PeftModel.from_pretrained),
    "second": (prompted, lambda model, folder: model.load_adapter(folder, "second")),
    "trained": (attach, lambda model, folder: model.load_adapter(folder, "default", is_trainable=True)),
    "with_lora": (
        with_lora,
        lambda model, folder: PeftModel.from_pretrained(model, folder, adapter_name="prompts"),
    ),
    "given": (
        training_vit,
        lambda model, folder: PeftModel.from_pretrained(model, folder, config=PeftConfig.from_pretrained(folder)),
    ),
}


def change(tensors: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        changed = tensors(held)
        save_file(held if changed is None else changed, folder / WEIGHTS)

    return apply


def fields(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def pipe(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def endless(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return apply


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/vpt_peft_pickle_was_run",)


def as_bin(content: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        if isinstance(content, Bomb):
            (folder / "adapter_model.bin").write_bytes(pickle.dumps(content))
        else:
            torch.save(content, folder / "adapter_model.bin")

    return apply


PROMPT, HEAD = f"{PREFIX}prompt_tuner.vpt_prompts.1", f"{PREFIX}classifier.weight"
BACKBONE = f"{PREFIX}vit.layers.0.attention.q_proj.weight"
GATES, TEMPERATURES = (f"{PREFIX}prompt_tuner.gated_prompt_{part}.0.weight" for part in ("gates", "temperatures"))


def put(key: str, value: Any) -> Callable[[Path], None]:
    """Set a whole tensor to a number, or to another tensor."""

    def tensors(held: Tensors) -> None:
        held[key] = value if isinstance(value, torch.Tensor) else torch.full_like(held[key], value)

    return change(tensors)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated": ("deep", lambda folder: os.truncate(folder / WEIGHTS, 900), "safetensors.* is damaged"),
    "empty": ("deep", write(WEIGHTS, b""), "safetensors.* is damaged"),
    "no weights": ("deep", lambda folder: (folder / WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
    "weights are a folder": (
        "deep",
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()) and None,
        "is not a regular file|Is a directory",
    ),
    "weights are a pipe": ("deep", pipe(WEIGHTS), "is not a regular file"),
    "weights never end": ("deep", endless(WEIGHTS), "is not a regular file"),
    "config is a pipe": ("deep", pipe(CONFIG), "is not a regular file"),
    "config never ends": ("deep", endless(CONFIG), "is not a regular file"),
    "config is null": ("deep", write(CONFIG, b"null"), "JSON NoneType, not an object"),
    "config is a list": ("deep", write(CONFIG, b"[]"), "JSON list, not an object"),
    "config is cut": ("deep", write(CONFIG, b'{"peft_type": "VPT"'), "is damaged"),
    "config is deep": ("deep", write(CONFIG, b"[" * 100_000), "is damaged"),
    "a pickle": ("deep", as_bin(Bomb()), "holds no plain tensors"),
    "a pickle of text": ("deep", as_bin("text"), "not a dict of tensors"),
    "a pickle of other tensors": ("deep", as_bin({"x": torch.ones(2)}), "vpt_prompts.0 is missing"),
    "a prompt is missing": ("deep", change(lambda held: [held.pop(PROMPT)] and None), "vpt_prompts.1 is missing"),
    "a prompt too many": ("deep", change(lambda held: {**held, PROMPT + "7": held[PROMPT].clone()}), "17 has no place"),
    "a prompt is shorter": ("deep", change(lambda held: {**held, PROMPT: held[PROMPT][1:].clone()}), "shape"),
    "no head": ("deep", change(lambda held: [held.pop(HEAD)] and None), "classifier.weight is missing"),
    "another head": ("deep", put(HEAD, torch.ones(9, 32)), r"classifier.weight has shape \(9, 32\), expected \(5, 32\)"),
    "integers": ("deep", put(PROMPT, torch.ones(4, 32, dtype=torch.int32)), "vpt_prompts.1 holds I32"),
    "integers in the head": ("deep", put(HEAD, torch.ones(5, 32, dtype=torch.int64)), "classifier.weight holds I64"),
    "NaN": ("deep", put(PROMPT, torch.nan), "vpt_prompts.1 holds NaN or infinite"),
    "infinity": ("deep", put(PROMPT, torch.inf), "vpt_prompts.1 holds NaN or infinite"),
    "NaN in the head": ("deep", put(HEAD, torch.nan), "classifier.weight holds NaN or infinite"),
    "backbone": ("deep", put(BACKBONE, torch.ones(32, 32)), "q_proj.weight is not a part of the adapter"),
    "the base's head": ("deep", put(f"{PREFIX}classifier.original_module.weight", torch.ones(5, 32)), "not a part"),
    "another's head": ("deep", put(f"{PREFIX}classifier.modules_to_save.default.weight", torch.ones(5, 32)), "not a part"),
    "a wrong type": ("deep", fields(num_virtual_tokens="4"), "adapter_config.json: num_virtual_tokens='4'"),
    "a wrong value": ("deep", fields(num_virtual_tokens=0), "adapter_config.json: num_virtual_tokens=0"),
    "another number": ("deep", fields(num_virtual_tokens=9), "shape|num_virtual_tokens"),
    "many prompts": ("deep", fields(num_virtual_tokens=100_000), "shape|num_virtual_tokens"),
    "a wide frame": ("deep", fields(num_virtual_tokens=100_000, prompt_location="pad", deep=False), "at most 1,024"),
    "many channels": ("deep", fields(num_virtual_tokens=100_000, prompt_location="channel"), "at most 1,024"),
    "a million blocks": ("deep", fields(layers_to_transform=list(range(10**6))), "at most 10,000"),
    "a block far off": ("deep", fields(layers_to_transform=[10**9]), "at most 10,000"),
    "a wide projection": ("deep", fields(projection_dim=65_536), "missing|projection_dim"),
    "more labels than values": ("deep", fields(id2label={str(i): "" for i in range(1000)}), "for 1,000 labels|1000 labels"),
    "a gap in the labels": ("deep", fields(id2label={"0": "a", "2": "b"}), "without gaps"),
    "labels in a list": ("deep", fields(id2label=["a"]), "id2label"),
    "a head elsewhere": ("deep", fields(modules_to_save=["vit"]), "missing|modules_to_save"),
    "gates that overflow": ("gated", put(GATES, 1e30), "gates.0.weight holds 1e"),
    "elementwise gates that overflow": (
        "gated_elementwise",
        put(f"{PREFIX}prompt_tuner.gated_prompt_gates.0.bias", -1e5),
        "gates.0.bias holds 100000",
    ),
    "temperatures that overflow": ("gated", put(TEMPERATURES, 1e5), "temperatures.0.weight holds 100000"),
    "no temperature": ("gated", put(TEMPERATURES, torch.nan), "temperatures.0.weight holds NaN"),
    "a start that overflows": ("gated", fields(gate_init=1e9), "gate_init=1000000000.0"),
    "a bound that overflows": ("gated", fields(temperature_min=1e-300), "temperature_min=1e-300"),
    "an infinite bound": ("gated", fields(temperature_max=float("inf")), "temperature_max=inf"),
    "many gates": ("gated", fields(num_gates=10**9), "num_gates=1000000000"),
    "another method": ("deep", fields(peft_type="GATED_PROMPT", deep=False), "missing|holds a GatedVPTConfig"),
}  # fmt: skip


CASES = [(damage, way) for damage in DAMAGES for way in ("base", "second", "trained")]
CASES += [(damage, "given") for damage in ("no weights", "NaN", "no head", "another head", "backbone")]
CASES += [(damage, "with_lora") for damage in ("no weights", "truncated", "no head", "many prompts")]
CASES.remove(("a head elsewhere", "trained"))  # which modules train is said by the adapter that is there
CASES.remove(("another method", "second"))  # PEFT combines no methods that way, file or not


@pytest.mark.parametrize(("damage", "way"), CASES)
def test_a_refused_load_changes_nothing(damage: str, way: str, saved: Path, tmp_path: Path):
    name, apply, message = DAMAGES[damage]
    folder = tmp_path / "adapter"
    shutil.copytree(saved / name, folder)
    apply(folder)
    make, load = WAYS[way]
    model = make(name)
    before = state(model)
    with pytest.raises((ValueError, OSError), match=message):
        load(model, folder)
    same(before, state(model))
    assert not os.path.exists("/tmp/vpt_peft_pickle_was_run")
    assert way != "base" or find_parameters(model) is None


@pytest.mark.parametrize("way", WAYS)
def test_the_undamaged_folder_loads(way: str, saved: Path):
    """Every way of the test above works, so that its refusals are for the damage."""
    make, load = WAYS[way]
    model = make("deep")
    loaded = load(model, saved / ("nested" if way == "with_lora" else "deep"))
    found = find_parameters(loaded if isinstance(loaded, nn.Module) else model)
    assert found is not None
    name = {"with_lora": "prompts", "second": "second"}.get(way, "default")
    tensors = load_file(saved / ("nested" if way == "with_lora" else "deep") / WEIGHTS)
    expected = next(value for key, value in tensors.items() if key.endswith("prompt_tuner.vpt_prompts.1"))
    assert torch.equal(found.vpt_prompts[name]["1"], expected)


@pytest.mark.parametrize("step", ["peft.peft_model.load_peft_weights", "peft.PeftModel.eval"])
def test_a_failure_after_attaching(saved: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    """What PEFT trips over once the adapter is on the model: at reading its values, or after the last step."""

    def fail(first: Any, *_: Any, **__: Any) -> None:
        if isinstance(first, nn.Module):
            nn.Module.eval(first)
        raise RuntimeError("no more memory")

    # An adapter that goes on training stays in training mode
    for way in ("base", "with_lora", "second", *(() if step.endswith("eval") else ("trained",))):
        make, load = WAYS[way]
        folder = saved / ("nested" if way == "with_lora" else "deep")
        model = make("deep").train()
        before = state(model)
        with monkeypatch.context() as patched:
            patched.setattr(step, fail)
            with pytest.raises(RuntimeError, match="no more memory"):
                load(model, folder)
        same(before, state(model))
        load(model, folder)


def test_other_methods_are_left_to_peft(tmp_path: Path):
    get_peft_model(vit(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    put(f"{PREFIX}vit.layers.0.attention.q_proj.lora_A.weight", torch.nan)(tmp_path)
    assert isinstance(PeftModel.from_pretrained(vit(), tmp_path), PeftModel)


def test_a_million_labels():
    with pytest.raises(ValueError, match="id2label has 1,000,001 entries; at most 1,000,000"):
        CONFIGS["deep"](id2label=dict.fromkeys(range(1_000_001), ""))


def test_nothing_large_is_allocated(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A configuration that asks for 4 GB beside a small file is refused by the file's shapes."""
    shutil.copytree(saved / "deep", tmp_path / "adapter")
    fields(num_virtual_tokens=100_000)(tmp_path / "adapter")
    made: list[torch.Tensor] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **given: made.append(empty(*args, **given)) or made[-1])
    with pytest.raises(ValueError, match="shape"):
        PeftModel.from_pretrained(vit(torch.float32), tmp_path / "adapter")
    assert sum(each.numel() for each in made if not each.is_meta) < 100_000
    assert any(each.is_meta and each.numel() == 3_200_000 for each in made)
