"""Configurations: every field refuses what it cannot use, says why, and survives every way of being copied."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, TaskType, get_peft_model
from peft_fixtures import CONFIGS, bare_vit, vit

from vpt_peft import GatedVPTConfig, VPTConfig


NOT_FLAGS: list[Any] = [1, 0, "yes", None, 1.0]
NOT_LAYERS: list[Any] = ["0", 1.5, [0.5], ["0"], True, [True], [None], {0: 1}, b"0"]

WRONG_TYPES: list[tuple[str, Any]] = [
    *(("num_virtual_tokens", value) for value in ("10", 10.0, True, None, {10}, ["10"], torch.tensor(3))),
    *((name, value) for name in ("deep", "propagate", "share_prompts", "pool_before_norm") for value in NOT_FLAGS),
    *((name, value) for name in ("project_patches", "base_in_eval", "self_check", "init_weights", "layers_from_end")
      for value in NOT_FLAGS),
    *(("layers_to_transform", value) for value in NOT_LAYERS),
    *(("prompt_dropout", value) for value in ("0.1", None, True, [0.1])),
    *(("projection_dim", value) for value in ("8", 8.0, True, [8])),
    *(("backbone", value) for value in (3, ["vit"], True)),
    *(("modules_to_save", value) for value in ("classifier", [1], [None], 5, {"classifier": True})),
]  # fmt: skip
WRONG_VALUES: list[tuple[str, Any]] = [
    *(("num_virtual_tokens", value) for value in (0, -1, -(10**9), 10**9, 2**63, 10**30)),
    *(("layers_to_transform", value) for value in (-1, [-1], [0, -2], [])),
    *(("prompt_dropout", value) for value in (-0.1, 1.0, 1.5, math.nan, math.inf, -math.inf)),
    *(("projection_dim", value) for value in (0, -8, 10**9, 10**30)),
    *(("prompt_location", value) for value in ("before", "", "PREPEND", None, 3, ["prepend"])),
    *(("token_type", value) for value in ("cls", None, 0)),
    *(("pooling", value) for value in ("mean", "", 1, ["image"])),
    *(("init_prompts", value) for value in ("xavier", None, 0)),
    *(("implementation", value) for value in ("fast", None, True)),
    *(("bias", value) for value in ("lora_only", None, True)),
]
GATED_TYPES: list[tuple[str, Any]] = [
    *(("gate_init", value) for value in ("5", None, True)),
    *(("num_gates", value) for value in ("3", 1.5, True, [2])),
    *(("attention_temperature", value) for value in NOT_FLAGS),
    *((name, value) for name in ("temperature_min", "temperature_max") for value in ("0.1", None, True)),
]
GATED_VALUES: list[tuple[str, Any]] = [
    *(("gate", value) for value in ("vector", None, 1)),
    *(("gate_init", value) for value in (math.nan, math.inf)),
    ("num_gates", -1),
    *(("temperature_min", value) for value in (0.0, -0.1, math.nan, 11.0)),
    *(("temperature_max", value) for value in (0.0, -1.0, math.inf, 0.001)),
]
COMBINATIONS: list[tuple[dict[str, Any], str]] = [
    ({"projection_dim": 8, "project_patches": True}, "projection_dim.*project_patches"),
    ({"projection_dim": 8, "prompt_location": "add"}, "projection_dim.*'add'"),
    ({"project_patches": True, "prompt_location": "pad"}, "project_patches.*'pad'"),
    ({"implementation": "kv", "prompt_location": "add"}, "implementation.*'add'"),
    ({"implementation": "kv", "prompt_location": "channel"}, "implementation.*'channel'"),
    ({"pooling": "prompt", "prompt_location": "add"}, "pooling='prompt'.*prompt_location='add'"),
    ({"pooling": "image_prompt", "prompt_location": "pad"}, "pooling='image_prompt'.*prompt_location='pad'"),
    ({"token_type": "class", "prompt_location": "add_shared"}, "token_type.*'add_shared'"),
    ({"token_type": "class", "pooling": "image"}, "token_type.*pooling='image'"),
    ({"pool_before_norm": True}, "pool_before_norm.*pooling"),
    ({"pool_before_norm": True, "pooling": "class"}, "pool_before_norm.*pooling"),
    ({"share_prompts": True, "deep": False}, "share_prompts.*deep"),
    ({"layers_to_transform": [0], "prompt_location": "pad"}, "layers_to_transform.*'pad'"),
    ({"layers_to_transform": 1, "prompt_location": "prepend_pixel"}, "layers_to_transform.*'prepend_pixel'"),
    ({"propagate": False, "prompt_location": "add"}, "propagate.*'add'"),
    ({"propagate": False, "prompt_location": "pad"}, "propagate.*'pad'"),
    ({"layers_from_end": True}, "layers_from_end.*layers_to_transform"),
]
GATED_COMBINATIONS: list[tuple[dict[str, Any], str]] = [
    ({"deep": True}, "deep"),
    ({"layers_to_transform": [0]}, "layers_to_transform"),
    ({"propagate": False}, "propagate"),
    ({"share_prompts": True}, "share_prompts"),
    ({"prompt_location": "add"}, "prompt_location='add'"),
    ({"implementation": "kv"}, "implementation='kv'"),
    ({"temperature_min": 2.0, "temperature_max": 1.0}, "temperature_min=2.0.*temperature_max=1.0"),
    ({"gate": "none", "num_gates": 2}, "num_gates.*gate"),
]


def short(value: Any) -> str:
    return re.sub(r"\W+", "_", repr(value))[:24]


def mentions(message: str, name: str, value: Any) -> bool:
    """The message names the field and shows the value (of a list: the offender in it is enough)."""
    shown = [value] if not isinstance(value, list) or not value else [value, *value]
    return name in message and any(repr(v) in message or str(v) in message for v in shown)


@pytest.mark.parametrize("name, value", WRONG_TYPES, ids=short)
def test_wrong_types(name: str, value: Any):
    with pytest.raises(TypeError) as raised:
        VPTConfig(**{name: value})
    assert mentions(str(raised.value), name, value), raised.value


@pytest.mark.parametrize("name, value", WRONG_VALUES, ids=short)
def test_wrong_values(name: str, value: Any):
    with pytest.raises(ValueError) as raised:
        VPTConfig(**{name: value})
    assert mentions(str(raised.value), name, value), raised.value


@pytest.mark.parametrize(
    "name, value, error",
    [*((*case, TypeError) for case in GATED_TYPES), *((*case, ValueError) for case in GATED_VALUES)],
    ids=short,
)
def test_wrong_gated_fields(name: str, value: Any, error: type[Exception]):
    with pytest.raises(error) as raised:
        GatedVPTConfig(**{name: value})
    assert mentions(str(raised.value), name, value), raised.value


@pytest.mark.parametrize(
    "config_cls, fields, reason",
    [*((VPTConfig, *case) for case in COMBINATIONS), *((GatedVPTConfig, *case) for case in GATED_COMBINATIONS)],
    ids=short,
)
def test_combinations_without_meaning(config_cls: type[VPTConfig], fields: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        config_cls(**fields)


@pytest.mark.parametrize("fields", [{"target_modules": ["query"]}, {"exclude_modules": "vit.layers.0"}], ids=short)
def test_fields_without_effect_warn(fields: dict[str, Any]):
    """PEFT's fields for choosing modules are accepted, but never in silence."""
    with pytest.warns(UserWarning, match=f"{next(iter(fields))}.*layers_to_transform"):
        VPTConfig(**fields)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"layers_to_transform": [0, 3]}, r"layers_to_transform=\[0, 3\].*3 blocks.*0 to 2"),
        ({"layers_to_transform": 7}, "layers_to_transform=7.*3 blocks"),
        ({"layers_to_transform": [3], "layers_from_end": True}, "layers_to_transform.*3 blocks"),
        ({"deep": False, "implementation": "kv"}, "implementation='kv'.*auto"),
        ({"pooling": "prompt", "implementation": "kv"}, "implementation='kv'.*auto"),
        ({"backbone": "vit.missing"}, "backbone='vit.missing'.*'vit'"),
    ],
    ids=short,
)
def test_refused_at_attach(fields: dict[str, Any], reason: str):
    """What depends on the model is refused when it is seen, and the model is left as it was."""
    model = vit()
    before = {path: {*vars(module)} for path, module in model.named_modules()}
    keys = list(model.state_dict())
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, VPTConfig(**fields))
    assert list(model.state_dict()) == keys
    assert {path: {*vars(module)} for path, module in model.named_modules()} == before
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted


def test_more_gates_than_blocks():
    with pytest.raises(ValueError, match="num_gates=3.*2 blocks"):
        get_peft_model(vit(), GatedVPTConfig(num_gates=3))


def test_absurd_lengths_allocate_nothing():
    """10^9 prompts of a ViT-B would take 3 TB."""
    for count in (10**6, 10**9):
        with pytest.raises(ValueError, match=f"num_virtual_tokens={count}.*at most"):
            VPTConfig(num_virtual_tokens=count)


@pytest.mark.parametrize(
    "given, kept", [((2, 0), [0, 2]), ({1, 0}, [0, 1]), (range(2), [0, 1]), ([1, 1], [1]), (2, 2)]
)
def test_layers_are_normalised(given: Any, kept: Any):
    config = VPTConfig(layers_to_transform=given)
    assert config.layers_to_transform == kept
    json.dumps(config.to_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_are_equal(name: str, tmp_path: Path):
    config = CONFIGS[name](prompt_dropout=0.0, modules_to_save=["classifier"], backbone="vit")
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftConfig.from_pretrained(tmp_path)
    copies = [copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), loaded]
    for other in copies:
        assert type(other) is type(config) and other.peft_type is config.peft_type
        assert other.to_dict() == config.to_dict()
    from_file = PeftConfig.from_json_file(str(tmp_path / "adapter_config.json"))
    known = config.to_dict()
    assert {key: from_file[key] for key in known if key not in ("peft_type", "peft_version", "auto_mapping")} == {
        key: value for key, value in known.items() if key not in ("peft_type", "peft_version", "auto_mapping")
    }
    assert from_file["peft_type"] == config.peft_type.value
    copies[1].modules_to_save.append("other")
    assert config.modules_to_save == ["classifier"]


@pytest.mark.parametrize("config_cls", [VPTConfig, GatedVPTConfig])
def test_unknown_keys_warn_once(config_cls: type[VPTConfig], tmp_path: Path):
    """A file written by a later version of the package still loads."""
    config_cls(num_virtual_tokens=6).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "field_of_2030": 1, "another": [2]}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftConfig.from_pretrained(tmp_path)
    assert len(caught) == 1 and "field_of_2030" in str(caught[0].message)
    assert loaded.num_virtual_tokens == 6


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"num_virtual_tokens": -3}, "num_virtual_tokens=-3"),
        ({"num_virtual_tokens": "ten"}, "num_virtual_tokens='ten'"),
        ({"prompt_location": "inside"}, "prompt_location='inside'"),
        ({"layers_to_transform": [-1]}, "layers_to_transform=-1"),
    ],
)
def test_edited_files_are_checked(changes: dict[str, Any], reason: str, tmp_path: Path):
    VPTConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises((TypeError, ValueError), match=reason):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("task", [None, *(task.value for task in TaskType)])
def test_task_types_are_accepted(task: str | None):
    assert VPTConfig(task_type=task).task_type == task
    with pytest.raises(ValueError):
        VPTConfig(task_type="IMAGE_DREAMS")


def test_one_config_serves_several_models():
    """A configuration given to one model is not changed by it in a way that shows on the next."""
    config = VPTConfig(num_virtual_tokens=2)
    with_head = get_peft_model(vit(), config)
    assert with_head.peft_config["default"].modules_to_save == ["classifier"]
    without = get_peft_model(bare_vit(), config)
    assert not without.peft_config["default"].modules_to_save
    given = ["classifier"]
    get_peft_model(vit(), VPTConfig(modules_to_save=given))
    assert given == ["classifier"]


def test_gated_is_a_vpt_config_and_not_deep():
    config = GatedVPTConfig()
    assert isinstance(config, VPTConfig) and config.deep is False and config.gate_init == 5.0
    assert not config.is_prompt_learning and not config.is_adaption_prompt
    assert not VPTConfig().is_prompt_learning


@pytest.mark.parametrize("config_class", [VPTConfig, GatedVPTConfig])
def test_help_explains_every_field(config_class):
    import pydoc
    from dataclasses import fields

    text = pydoc.render_doc(config_class, renderer=pydoc.plaintext)
    own = {each.name for each in fields(config_class)} - {each.name for each in fields(PeftConfig)}
    missing = [name for name in own if f"    {name} (`" not in text and config_class.__dataclass_fields__[name].init]
    assert len(own) > 20 and not missing
    assert "num_virtual_tokens (`int | list[int]`, default 10): Prompts per prompted block" in text
    assert text.index("num_virtual_tokens (`") < text.index("Raises:")
