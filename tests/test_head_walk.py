"""Heads of every class that takes prompts: found, wrapped, saved, loaded, of another size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from task_models import TASK_MODELS
from torch import nn
from torch.utils._pytree import tree_leaves

from vpt_peft.encoder import find_encoder
from vpt_peft.heads import HeadWrapper, build_heads, find_task_head, fit_head, wrap_heads


# Losses of these classes are those of pre-training or of depth: no output stands for a label.
WITHOUT_LABELS = (
    "ForMaskedImageModeling", "ForPreTraining", "ForDepthEstimation", "ForImageSegmentation",
    "ForSceneTextRecognition", "Tipsv2DptForNormalEstimation",
)  # fmt: skip


def heads_of(model: nn.Module) -> list[str]:
    spec = find_encoder(model)
    return find_task_head(model, spec.path, spec)


def outputs(name: str, model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        leaves = tree_leaves(dict(model(**TASK_MODELS[name].inputs())))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def make(name: str, num_labels: int = 3) -> Any:
    torch.manual_seed(0)
    model = TASK_MODELS[name].make(num_labels).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def wrap(model: nn.Module) -> dict[str, HeadWrapper]:
    paths = heads_of(model)
    wrappers = wrap_heads(model, paths, "task", active=True, inference_mode=False)
    return dict(zip(paths, wrappers, strict=True))


def saved(wrappers: dict[str, HeadWrapper]) -> dict[str, dict[str, torch.Tensor]]:
    return {path: wrapper.adapter_state_dict("task", wrapper.state_dict()) for path, wrapper in wrappers.items()}


@pytest.mark.parametrize("name", TASK_MODELS)
def test_saved_heads_give_equal_outputs(name: str):
    model, fresh = make(name), make(name)
    plain = outputs(name, model)
    assert find_task_head(model) == heads_of(model)
    wrappers = wrap(model)
    assert wrappers
    assert all(map(torch.equal, outputs(name, model), plain))
    with torch.no_grad():
        for wrapper in wrappers.values():
            for parameter in wrapper.modules_to_save["task"].parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    changed = outputs(name, model)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(changed, plain, strict=True))
    state = saved(wrappers)
    again = wrap(fresh)
    assert again.keys() == wrappers.keys()
    for path, wrapper in again.items():
        keys = wrapper.adapter_state_dict_load_map("task")
        result = wrapper.load_state_dict({keys[key]: value for key, value in state[path].items()}, strict=False)
        assert not result.unexpected_keys
        assert state[path].keys() == keys.keys()
    found = outputs(name, fresh)
    assert len(found) == len(changed)
    assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, changed, strict=True))
    # The encoder and the originals do not train
    training = {id(p) for p in fresh.parameters() if p.requires_grad}
    owned = {id(p) for wrapper in again.values() for p in wrapper.modules_to_save.parameters()}
    assert owned <= training
    assert not any(p.requires_grad for wrapper in again.values() for p in wrapper.original_module.parameters())


@pytest.mark.parametrize("name", [name for name in TASK_MODELS if not any(word in name for word in WITHOUT_LABELS)])
def test_heads_of_other_sizes(name: str):
    model = make(name)
    base = model.config.num_labels
    paths = heads_of(model)
    wide = type(model)(
        type(model.config).from_dict({**model.config.to_dict(), "id2label": dict.fromkeys(range(7), "a")})
    )
    built = build_heads(model, paths, 7, base)
    wrappers = wrap_heads(model, paths, "task", active=True, inference_mode=False)
    for path, wrapper in zip(paths, wrappers, strict=True):
        fit_head(wrapper, "task", built[path])
        copy, expected = wrapper.modules_to_save["task"], dict(wide.get_submodule(path).named_parameters())
        original = dict(wrapper.original_module.named_parameters())
        for key, parameter in copy.named_parameters():
            assert parameter.shape == expected[key].shape
            assert parameter.requires_grad and not parameter.is_meta
            if parameter.shape == original[key].shape:
                assert torch.equal(parameter, original[key])
    shapes = {tuple(x.shape) for x in outputs(name, model)}
    assert shapes == {tuple(x.shape) for x in outputs(name, wide.eval())}


@pytest.mark.parametrize("name", [name for name in TASK_MODELS if any(word in name for word in WITHOUT_LABELS)])
def test_heads_that_do_not_depend_on_labels(name: str):
    model = make(name)
    with pytest.raises(ValueError, match="id2label of 7 labels: the heads .* do not depend"):
        build_heads(model, heads_of(model), 7, model.config.num_labels)
