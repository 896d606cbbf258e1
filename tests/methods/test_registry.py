"""The registry of methods is the one list: training's flag, the costs and the recipes go by it."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from peft_fixtures import vit
from torch import nn
from transformers import HieraConfig, HieraForImageClassification

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.cost import estimate_costs
from vpt_peft.encoder import find_encoder
from vpt_peft.methods import COMBINED_METHODS, METHODS, PROMPT_METHODS, MethodOptions
from vpt_peft.methods.apply import apply_method, configure
from vpt_peft.training.arguments import train_parser
from vpt_peft.training.recipes import recipe_defaults


ORDER = [
    "vpt", "vpt_shallow", "vpt+bias", "gated_vpt", "linear", "full", "partial", "mlp", "bias", "adapter", "sidetune",
    "lora", "vpt+lora", "vpt+adapter",
]  # fmt: skip


def test_one_order_for_flags_and_costs():
    assert list(METHODS) == ORDER
    (flag,) = [action for action in train_parser("vpt-peft train")._actions if action.dest == "method"]
    assert list(flag.choices) == ORDER
    model = vit(torch.float32)
    assert [each.method for each in estimate_costs(model, batch_size=1, memory_limit=10**9)] == ORDER


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_described_and_has_a_rate(name):
    method = METHODS[name]
    assert bool(method.source) == bool(method.url) == (f"[{method.source}]({method.url})" in method.markdown)
    assert method.markdown.startswith(method.title)
    assert (not method.configure) + (not method.modify) == (2 if name == "full" else 1)
    assert recipe_defaults({"method": name})["learning_rate"] > 0


def test_prompt_methods_are_those_with_a_prompt_configuration():
    options = MethodOptions(num_virtual_tokens=7, fields={"prompt_dropout": 0.25})
    found = {}
    for name in METHODS:
        config = configure(vit(torch.float32), name, options)
        if isinstance(config, VPTConfig):
            found[name] = (type(config), config.deep, config.num_virtual_tokens, config.prompt_dropout, config.bias)
    assert found == {
        "vpt": (VPTConfig, True, 7, 0.25, "none"),
        "vpt_shallow": (VPTConfig, False, 7, 0.25, "none"),
        "vpt+bias": (VPTConfig, True, 7, 0.25, "all"),
        "gated_vpt": (GatedVPTConfig, False, 7, 0.25, "none"),
    }
    assert tuple(found) == PROMPT_METHODS
    assert set(COMBINED_METHODS) == {name for name in METHODS if name.startswith("vpt+")} - set(PROMPT_METHODS)


def test_lora_is_on_query_and_value_also_where_they_are_fused():
    stages = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1, "image_size": [32, 32]}
    hiera = HieraForImageClassification(HieraConfig(**stages, masked_unit_size=[8, 8]))
    for model, names in ((vit(torch.float32), {"q_proj", "v_proj"}), (hiera, {"qkv"})):
        config = configure(model, "lora", MethodOptions(lora_r=3))
        assert isinstance(config, LoraConfig) and config.target_modules == names
        assert (config.r, config.lora_alpha, config.modules_to_save) == (3, 6, ["classifier"])


def test_lora_is_refused_where_the_projections_are_not_known():
    model = vit(torch.float32)
    spec = find_encoder(model)
    attention = replace(spec.blocks[0].attention, query=None)
    unknown = replace(spec, blocks=(replace(spec.blocks[0], attention=attention), *spec.blocks[1:]))
    with pytest.raises(ValueError, match="no query and value projections in ViTForImageClassification"):
        apply_method(model, "lora", MethodOptions(), unknown)


@pytest.mark.parametrize("name", ["adapter", "sidetune", "mlp"])
def test_added_modules_have_the_dtype_of_the_model(name):
    model = vit(torch.float32).to(torch.bfloat16)
    before = set(model.modules())
    apply_method(model, name, MethodOptions())
    added = [module for module in model.modules() if module not in before]
    assert any(isinstance(module, nn.Linear) for module in added)
    assert {parameter.dtype for module in added for parameter in module.parameters()} == {torch.bfloat16}


def test_a_known_encoder_is_not_looked_for_again(monkeypatch):
    model = vit(torch.float32)
    spec = find_encoder(model)
    for module in ("baselines", "peft_configs", "structure"):
        monkeypatch.setattr(f"vpt_peft.methods.{module}.find_encoder", lambda *_: pytest.fail("looked again"))
    for name in ("partial", "adapter", "lora", *COMBINED_METHODS):
        apply_method(vit(torch.float32), name, MethodOptions(), spec)


@pytest.mark.parametrize(
    "field", ["num_virtual_tokens", "lora_r", "partial_blocks", "mlp_layers", "adapter_reduction"]
)
@pytest.mark.parametrize("value", [0, -1, 1.0, True])
def test_options_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} must be an integer of at least 1"):
        MethodOptions(**{field: value})


def test_an_unknown_method_changes_nothing():
    model = vit(torch.float32)
    with pytest.raises(ValueError, match="method='vtp' is unknown; choose one of vpt, vpt_shallow"):
        apply_method(model, "vtp", MethodOptions())
    assert all(parameter.requires_grad for parameter in model.parameters())
