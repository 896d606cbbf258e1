"""nn.DataParallel: a replica of a prompted model refuses to run and names the remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import images, randomize, tiny_vit
from torch import nn

from vpt_peft import GatedVPTConfig, VPTConfig


KINDS: dict[str, Callable[[], VPTConfig]] = {
    "deep": lambda: VPTConfig(num_virtual_tokens=3),
    "shallow": lambda: VPTConfig(num_virtual_tokens=3, deep=False),
    "gated": lambda: GatedVPTConfig(num_virtual_tokens=3),
    "token": lambda: VPTConfig(num_virtual_tokens=3, implementation="token"),
    "pooled": lambda: VPTConfig(num_virtual_tokens=3, pooling="image_prompt"),
    "added": lambda: VPTConfig(prompt_location="add"),
    "prepend_pixel": lambda: VPTConfig(num_virtual_tokens=2, prompt_location="prepend_pixel"),
    "pad": lambda: VPTConfig(num_virtual_tokens=2, prompt_location="pad"),
    "channel": lambda: VPTConfig(num_virtual_tokens=2, prompt_location="channel"),
    "last": lambda: VPTConfig(num_virtual_tokens=3, layers_to_transform=[2]),
}


def replicate(model: nn.Module) -> nn.Module:
    """A replica as `torch.nn.parallel.replicate` makes it, each parameter a tensor of its own as on another device."""
    modules = list(model.modules())
    place = {module: index for index, module in enumerate(modules)}
    replicas = [module._replicate_for_data_parallel() for module in modules]  # type: ignore[operator]
    for module, replica in zip(modules, replicas, strict=True):
        for key, child in module._modules.items():
            if child is None:
                replica._modules[key] = None
            else:
                setattr(replica, key, replicas[place[child]])
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, parameter.clone())
        for key, buffer in module._buffers.items():
            replica._buffers[key] = None if buffer is None else buffer.clone()
    return replicas[0]


def attach(kind: str) -> nn.Module:
    model = get_peft_model(tiny_vit(), KINDS[kind](), adapter_name="a")
    model.add_adapter("b", KINDS[kind]())
    return randomize(model).eval()


def watch(model: nn.Module) -> list[str]:
    """A list that grows by the name of each layer with weights that has run, in the model or its replicas."""
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


def assert_refused(model: nn.Module, ran: list[str], **given: object) -> None:
    """The replica refuses before a layer has run; the model itself goes on as before."""
    with torch.no_grad():
        before = model(pixel_values=images()).logits
        ran.clear()
        with pytest.raises((ValueError, RuntimeError), match="torchrun"):
            replicate(model)(pixel_values=images(), **given)
        assert ran == []
        assert torch.equal(model(pixel_values=images()).logits, before) and ran


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_refuse(kind: str):
    model = attach(kind)
    assert_refused(model, watch(model))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("pad", "channel")])
def test_replicas_refuse_mixed_batches(kind: str):
    model = attach(kind)
    assert_refused(model, watch(model), adapter_names=["a", "__base__", "b"])


def test_replicas_refuse_merged_prompts():
    model = attach("deep")
    model.merge_adapter()
    assert_refused(model, watch(model))


def test_replicas_refuse_in_training():
    model = attach("deep")
    ran = watch(model)
    with pytest.raises((ValueError, RuntimeError), match="torchrun"):
        replicate(model.train())(pixel_values=images(), labels=torch.tensor([0, 1, 2]))
    assert ran == []


@pytest.mark.parametrize("kind", ["deep", "shallow", "gated"])
def test_replicas_of_an_injected_adapter_refuse(kind: str):
    """Prompts that transformers' `add_adapter` attached."""
    model = tiny_vit()
    model.add_adapter(KINDS[kind](), "a")
    model.eval()
    assert_refused(model, watch(model))


def test_replicas_refuse_inside_a_users_module():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = attach("shallow")

        def forward(self, **given: torch.Tensor) -> object:
            return self.inner(**given)

    model = Wrapper()
    assert_refused(model, watch(model))


def test_replicas_without_prompts_run():
    """The package leaves models without prompts alone, with LoRA or nothing attached."""
    plain = tiny_vit()
    lora = get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        for model in (plain, lora):
            expected = model(pixel_values=images()).logits
            assert torch.equal(replicate(model)(pixel_values=images()).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_run_after_unload(kind: str):
    """Also where a replica was refused before."""
    expected = tiny_vit()(pixel_values=images()).logits
    model = attach(kind)
    with pytest.raises((ValueError, RuntimeError), match="torchrun"):
        replicate(model)(pixel_values=images())
    base = model.unload()
    found = replicate(base)(pixel_values=images()).logits
    assert torch.equal(found, base(pixel_values=images()).logits)
    if kind not in ("pad", "channel"):
        with torch.no_grad():
            base.classifier.weight.copy_(tiny_vit().classifier.weight)
            base.classifier.bias.copy_(tiny_vit().classifier.bias)
        assert torch.equal(base(pixel_values=images()).logits, expected)
