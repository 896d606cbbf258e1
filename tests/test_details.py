"""Details that no other way of computing shows: labels that come and go, cards, samples, tables, single blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import images, randomize, tiny_vit
from torch.func import functional_call
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Swinv2Config,
    Swinv2ForImageClassification,
)

from vpt_peft import VPTConfig, initialize_prompts
from vpt_peft.attention.extras import scale_queries
from vpt_peft.encoder import EncoderSpec
from vpt_peft.initialization import Reservoir
from vpt_peft.official import load_official_state_dict
from vpt_peft.peft_model import loading_snippet
from vpt_peft.tuners.vpt.forward_pass import CheckpointedFunction
from vpt_peft.tuners.vpt.parameters import find_parameters
from vpt_peft.tuners.vpt.pixels import _per_channel
from vpt_peft.tuners.vpt.pooling import pool
from vpt_peft.tuners.vpt.tokens import widen_positions


BIRDS, CARS = {0: "owl", 1: "wren"}, {0: "van", 1: "bus", 2: "cab"}


def attach(name: str = "default", **fields: Any) -> PeftModel:
    config = VPTConfig(**{"num_virtual_tokens": 2, **fields})
    return randomize(get_peft_model(tiny_vit(), config, adapter_name=name)).eval()  # type: ignore[return-value]


def test_disabling_gives_the_model_its_own_labels():
    model = attach(id2label=BIRDS)
    config = model.get_base_model().config
    assert config.id2label == BIRDS
    with model.disable_adapter():
        assert config.num_labels == 7 and config.id2label[0] == "LABEL_0"
    assert config.id2label == BIRDS


def test_a_refused_attach_gives_labels_and_head_back():
    model = attach(id2label=BIRDS)
    model.peft_config["default"] = VPTConfig(num_virtual_tokens=3, modules_to_save=["layers"])
    with pytest.raises((TypeError, ValueError), match="cannot be applied"):
        model.base_model.inject_adapter(model.base_model.model, "default")  # type: ignore[arg-type, operator]
    root = model.get_base_model()
    assert root.config.id2label == BIRDS
    assert root.classifier.active_adapters == ["default"]
    assert model(pixel_values=images()).logits.shape == (3, 2)


def test_a_file_with_another_number_of_labels_is_refused(tmp_path: Path):
    attach(id2label=CARS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="id2label of 3 labels .here 2"):
        attach(id2label=BIRDS).load_adapter(tmp_path, "default")


def test_a_file_in_a_subfolder_loads_under_its_name_again(tmp_path: Path):
    model = attach()
    model.add_adapter("b", VPTConfig(num_virtual_tokens=5))
    randomize(model)
    model.save_pretrained(tmp_path)
    other = attach("b", num_virtual_tokens=5)
    other.load_adapter(tmp_path, "b", subfolder="b")
    model.set_adapter("b")
    assert torch.equal(other.eval()(pixel_values=images()).logits, model(pixel_values=images()).logits)


def test_the_card_loads_each_adapter_from_its_folder():
    model = attach("birds")
    model.add_adapter("cars", VPTConfig(num_virtual_tokens=3))
    lines = loading_snippet(model, "here").splitlines()
    assert lines[-2].endswith('adapter_name="birds", subfolder="birds")')
    assert lines[-1] == 'model.load_adapter(adapter, "cars", subfolder="cars")'
    model.add_adapter("default", VPTConfig(num_virtual_tokens=3))
    assert 'subfolder="default"' not in loading_snippet(model, "here")  # its files are in the folder itself


def test_a_field_is_given_until_a_model_fills_it():
    given, left = VPTConfig(modules_to_save=["head"]), VPTConfig()
    for config in (given, left):
        config.note_found(modules_to_save=["head"])
    assert given.given("modules_to_save") == ["head"] and left.given("modules_to_save") is None
    left.modules_to_save = ["other"]
    assert left.given("modules_to_save") == ["other"]


def test_skip_unread_is_not_saved():
    assert "skip_unread" not in VPTConfig(skip_unread=True).to_dict()


def test_a_frame_around_images_without_colours_takes_the_mean():
    grey = _per_channel((0.1, 0.2, 0.6), torch.zeros(1, 2, 4, 4))
    assert torch.allclose(grey, torch.full((2, 1, 1), 0.3))


def test_the_class_token_is_pooled_without_registers():
    tokens, prompts = torch.arange(6.0).view(1, 6, 1), torch.full((1, 1, 1), 8.0)
    spec = EncoderSpec("", (), special=(0, 1, 2))
    assert pool(VPTConfig(token_type="class"), spec, tokens, prompts).item() == (0 + 8) / 2
    assert pool(VPTConfig(pooling="image_prompt"), spec, tokens, prompts).item() == (3 + 4 + 5 + 8) / 4


def test_registers_are_no_patches():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    base = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=4, **sizes)).double().eval()
    for name, parameter in base.named_parameters():
        if "register" in name:
            parameter.data.fill_(50.0)
    model = get_peft_model(base, VPTConfig(num_virtual_tokens=16))
    initialize_prompts(model, [images(1)])
    prompts = find_parameters(model).vpt_prompts["default"]["0"]  # type: ignore[union-attr, index]
    assert prompts.abs().max() < 50 and len({tuple(row) for row in prompts.tolist()}) == 16


def test_reservoir_keeps_the_rows_with_the_largest_keys():
    reservoir, generator, start, keys = Reservoir(5, 3), torch.Generator().manual_seed(3), 0, []
    for count in (4, 7, 2, 9, 6):
        reservoir.add(torch.arange(start, start + count).view(-1, 1))
        keys.append(torch.rand(count, generator=generator, dtype=torch.float64))
        start += count
    expected = torch.cat(keys).topk(5).indices
    assert sorted(reservoir.rows.flatten().tolist()) == sorted(expected.tolist())


def test_prompts_are_not_rotated():
    table = torch.full((3, 2), 0.5)
    cosine, sine = widen_positions((), {"rope": (table, table)}, 3, 1, 2)[1]["rope"]
    assert cosine[:, 0].tolist() == [0.5, 1.0, 1.0, 0.5, 0.5] and sine[:, 0].tolist() == [0.5, 0.0, 0.0, 0.5, 0.5]


def test_a_block_that_runs_alone_has_the_adapters_of_its_call():
    model = attach("a", implementation="token")
    model.add_adapter("b", VPTConfig(num_virtual_tokens=3, implementation="token"))
    randomize(model)
    block, hidden = model.get_base_model().vit.layers[0], torch.randn(2, 17, 32).double()
    outputs = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        outputs[name] = block(hidden)
    assert (outputs["a"] - outputs["b"]).abs().max() > 1e-6
    model.set_adapter("a")
    assert torch.equal(block(hidden), outputs["a"])


def test_an_adapter_that_replaces_a_merged_one_can_be_merged():
    model = attach()
    model.merge_adapter()
    model.base_model.inject_adapter(model.base_model.model, "default")
    assert find_parameters(model).merged_adapters == []  # type: ignore[union-attr]
    model.merge_adapter()
    assert find_parameters(model).merged_adapters == ["default"]  # type: ignore[union-attr]


def test_merged_values_follow_biases():
    model = attach(bias=["value"], modules_to_save=[])
    model.merge_adapter()
    with torch.no_grad():
        for offset in find_parameters(model).vpt_biases["default"].parameters():  # type: ignore[union-attr, index]
            offset.add_(1.0)
        found = model(pixel_values=images()).logits
        model.unmerge_adapter()
        assert torch.allclose(found, model(pixel_values=images()).logits, rtol=0, atol=1e-12)


def test_merged_values_are_of_the_parameters_in_place():
    """Other tensors in their place count as changed, whatever their versions are."""
    model = attach(modules_to_save=[])
    given = {}
    for name, parameter in model.named_parameters():
        if "vpt_prompts" in name:
            given[name] = torch.randn_like(parameter)
            while given[name]._version < parameter._version:
                given[name].mul_(1.5)
            assert given[name]._version == parameter._version
    pixels = {"pixel_values": images()}
    with torch.no_grad():
        expected = functional_call(model, given, (), pixels).logits
        model.merge_adapter()
        assert torch.allclose(functional_call(model, given, (), pixels).logits, expected, rtol=0, atol=1e-12)


def wrapped_functions(model: torch.nn.Module) -> int:
    functions = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    return sum(isinstance(function, CheckpointedFunction) for function in functions)


def test_unload_gives_checkpointing_functions_back():
    model = attach(deep=False)
    model.gradient_checkpointing_enable()
    model.train()(pixel_values=images())
    assert wrapped_functions(model) > 0
    assert wrapped_functions(model.unload()) == 0


def test_a_head_inside_the_encoder_has_no_offsets():
    """It trains as a whole for each adapter."""
    model = attach(backbone="", bias="all")
    names = list(find_parameters(model).vpt_biases["default"].names)  # type: ignore[union-attr, index, arg-type]
    assert "0/mlp/fc2" in names
    assert not [name for name in names if "classifier" in name]


def test_blocks_draw_other_tokens():
    """Blocks that receive the same tokens still start from different ones of them."""
    model = attach()
    for layer in model.get_base_model().vit.layers:
        for name in ("attention.o_proj", "mlp.fc2"):
            for parameter in layer.get_submodule(name).parameters():
                parameter.data.zero_()
    initialize_prompts(model, [images(8)])
    prompts = find_parameters(model).vpt_prompts["default"]  # type: ignore[union-attr, index]
    assert not torch.equal(prompts["0"], prompts["1"])


def test_dropout_of_attention_drops_prompts_too():
    """In attention without the interface, where the module's own dropout is asked for."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 4, "num_labels": 7}
    config = Swinv2Config(depths=[1], num_heads=[2], drop_path_rate=0.0, **sizes)
    base = Swinv2ForImageClassification(config).double()
    base.swinv2.encoder.layers[0].blocks[0].attention.self.dropout.p = 1.0
    model = get_peft_model(base, VPTConfig(num_virtual_tokens=3, base_in_eval=False, modules_to_save=[]))
    outputs = []
    for seed in (1, 2):
        randomize(model, seed).train()
        with torch.no_grad():
            outputs.append(model(pixel_values=images()).logits)
    assert torch.equal(*outputs)


def test_a_frame_of_another_size_stays_frozen():
    config = VPTConfig(num_virtual_tokens=2, prompt_location="pad", inference_mode=True)
    model = get_peft_model(tiny_vit(), config)
    frame = {"prompt_embeddings_tb": torch.rand(1, 3, 4, 28), "prompt_embeddings_lr": torch.rand(1, 3, 24, 4)}
    load_official_state_dict(model, frame)
    prompts = find_parameters(model).vpt_prompts["default"]  # type: ignore[union-attr, index]
    assert prompts["tb"].shape == (3, 4, 28) and not any(p.requires_grad for p in prompts.parameters())


@pytest.mark.parametrize("shape", [(2, 4, 5, 8), (4, 5, 8), (6, 1, 5, 8)])
def test_rows_of_an_image_have_its_temperature(shape: tuple[int, ...]):
    """Attention may run over windows, or over heads, as rows of a batch."""
    query, temperature = torch.randn(shape, requires_grad=True), torch.tensor([2.0, 4.0])
    expected = query.detach().clone()
    expected[: shape[0] // 2] /= 2
    expected[shape[0] // 2 :] /= 4
    assert torch.equal(scale_queries(query, temperature), expected)
