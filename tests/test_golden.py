"""The official codes' reference cases: outputs and gradients in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from vpt_peft.official import config_from_official, load_official_state_dict, official_state_dict


CASES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
TOLERANCE = 1e-9


def load_case(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key).double() for key in file.keys()}


def family_of(case: str) -> str:
    return next((family for family in ("mae", "moco", "swin") if family in case), "vit")


def build_model(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A transformers classifier with the case's backbone and head, in float64."""
    prompts = json.loads(metadata["prompt_config"])
    config: ViTConfig | SwinConfig
    if "swin_config" in metadata:
        config = SwinConfig(**json.loads(metadata["swin_config"]))
        model, prefix = SwinForImageClassification(config), "swin."
    else:
        fields = json.loads(metadata["vit_config"])
        if prompts.get("LOCATION") == "pad":
            fields["image_size"] += 2 * prompts["NUM_TOKENS"]
        config = ViTConfig(**fields)
        model, prefix = ViTForImageClassification(config), "vit."
    state = {prefix + key.removeprefix("backbone."): t for key, t in tensors.items() if key.startswith("backbone.")}
    projection = "vit.embeddings.patch_embeddings.projection.weight"
    if prompts.get("LOCATION") == "below":
        state[projection] = state[projection][:, :3]
    state |= {"classifier.weight": tensors["head.weight"], "classifier.bias": tensors["head.bias"]}
    result = model.double().load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "relative_position_index" not in key]
    return model


def official_parameters(tensors: dict[str, torch.Tensor], kind: str = "official") -> dict[str, torch.Tensor]:
    found = {key.removeprefix(kind + "."): value for key, value in tensors.items() if key.startswith(kind + ".")}
    if kind == "official" and "backbone.embeddings.patch_embeddings.projection.weight" in tensors:
        for leaf in ("weight", "bias"):
            found[f"patch_embeddings.{leaf}"] = tensors[f"backbone.embeddings.patch_embeddings.projection.{leaf}"]
    return found


def prompted(metadata: dict[str, str], tensors: dict[str, torch.Tensor]):
    """The case's model with its prompts, and what its config was."""
    config = config_from_official(json.loads(metadata["prompt_config"]), family=family_of(metadata["case"]))
    model = get_peft_model(build_model(metadata, tensors), config)
    load_official_state_dict(model, official_parameters(tensors))
    return model.eval(), config


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().abs().max())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under the official names: the adapter with every value exchanged for its gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    found = official_state_dict(model)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    return found


def test_all_cases_are_here():
    assert len(CASES) == 32


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_reference_case(path: Path):
    metadata, tensors = load_case(path)
    model, _ = prompted(metadata, tensors)
    logits = model(pixel_values=tensors["input"]).logits
    assert deviation(logits, tensors["logits"]) < TOLERANCE
    (logits * tensors["loss_weight"]).sum().backward()
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert deviation(head.weight.grad, tensors["grad.head.weight"]) < TOLERANCE
    found, expected = gradients(model), official_parameters(tensors, "official_grad")
    assert expected
    for name, gradient in expected.items():
        if name == "deep_prompt_embeddings" and name not in found:
            assert not gradient.any()  # shared prompts: the official code holds deep prompts it does not use
        else:
            assert deviation(found[name], gradient) < TOLERANCE, name


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_float32(path: Path):
    metadata, tensors = load_case(path)
    model, _ = prompted(metadata, tensors)
    logits = model.float()(pixel_values=tensors["input"].float()).logits
    assert deviation(logits.double(), tensors["logits"]) < 1e-4


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_round_trip(path: Path):
    metadata, tensors = load_case(path)
    model, _ = prompted(metadata, tensors)
    official = official_parameters(tensors)
    for name, value in official_state_dict(model).items():
        assert torch.equal(value, official[name]), name
