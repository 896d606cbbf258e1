"""Every method trains what it should and nothing else, and comes back from disk with the same logits."""

import json

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import ViTForImageClassification

from vpt_peft.methods import COMBINED_METHODS, METHODS, MethodOptions, baselines
from vpt_peft.methods.apply import apply_method
from vpt_peft.methods.modules import BottleneckAdapter, MLPHead, SideTuning
from vpt_peft.methods.structure import find_blocks, find_final_norm, find_head
from vpt_peft.training.arguments import ModelArguments
from vpt_peft.training.checkpoints import save_trained
from vpt_peft.training.inference import load_adapter_model
from vpt_peft.training.model import build_model, check_trainable, load_backbone
from vpt_peft.training.optim import split_trainable
from vpt_peft.tuners.vpt.parameters import find_parameters


pytest_plugins = ["training_fixtures"]
LABELS = dict(enumerate("abcdefg"))
HEAD = 32 * 7 + 7
# q, k, v, o (32 x 32), MLP (32 x 64), two norms
BLOCK = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32
EXPECTED = {
    "linear": (0, 0),
    "full": (0, None),
    "partial": (0, BLOCK + 64),
    "mlp": (0, 0),
    "bias": (0, 3 * (4 * 32 + 64 + 32 + 2 * 32) + 32 + 32),
    "adapter": (0, 3 * (32 * 4 + 4 + 4 * 32 + 32)),
    "sidetune": (0, None),
    "lora": (3 * 2 * 8 * (32 + 32), 0),
    "vpt": (3 * 10 * 32, 0),
    "vpt_shallow": (10 * 32, 0),
    "vpt+bias": (3 * 10 * 32 + 3 * (4 * 32 + 64 + 32 + 2 * 32) + 32 + 32, 0),
    "gated_vpt": (10 * 32 + 2 + 3, 0),
    "vpt+lora": (3 * 10 * 32, 3 * 2 * 8 * (32 + 32)),
    "vpt+adapter": (3 * 10 * 32, 3 * (32 * 4 + 4 + 4 * 32 + 32)),
}


@pytest.fixture
def images():
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build(make_arguments):
    def do(method, **given):
        arguments = make_arguments(method=method, **given)
        torch.manual_seed(0)
        model = build_model(arguments.model, arguments.method, LABELS)
        # A new head is zero, and so would be all logits
        for parameter in split_trainable(model)["head"].values():
            nn.init.normal_(parameter, std=0.2)
        return model

    return do


@pytest.mark.parametrize("method", ["linear", "vpt"])
def test_new_heads_begin_at_zero_and_fitting_ones_stay(make_arguments, images, method):
    arguments = make_arguments(method=method)
    new = build_model(arguments.model, arguments.method, LABELS)
    assert not any(parameter.any() for parameter in split_trainable(new)["head"].values())
    fitting = build_model(arguments.model, arguments.method, dict(enumerate("abcde")))
    head = split_trainable(fitting)["head"]
    stored = ViTForImageClassification.from_pretrained(arguments.model.model_name_or_path).classifier.weight
    assert stored.any() and any(torch.equal(parameter, stored) for parameter in head.values())


def some_steps(model, images, steps=3):
    labels = torch.arange(6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_counts(build, method):
    model = build(method)
    counts = check_trainable(model, method)
    prompts, rest = EXPECTED[method]
    assert counts.prompts == prompts
    assert counts.head == (HEAD if method != "mlp" else HEAD + 2 * (32 * 32 + 32))
    if rest is None:
        rest = (
            counts.total - counts.head
            if method == "full"
            else sum(p.numel() for m in model.modules() if isinstance(m, SideTuning) for p in m.parameters())
        )
    assert counts.rest == rest


@pytest.mark.parametrize("method", METHODS)
def test_only_and_all_trainable_parameters_change(build, images, method):
    model = build(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    some_steps(model, images)
    for name, parameter in model.named_parameters():
        # Attention does not depend on a constant added to all keys: its bias has no gradient but rounding
        if "k_proj.bias" not in name:
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_logits_are_identical(build, images, tmp_path, method):
    model = build(method)
    some_steps(model, images)
    save_trained(model, tmp_path / "saved")
    loaded, processor = load_adapter_model(tmp_path / "saved")
    assert not loaded.training and loaded.config.id2label == LABELS
    assert dict(processor.size) == {"height": 16, "width": 16}
    with torch.no_grad():
        assert torch.equal(model.eval()(pixel_values=images).logits, loaded(pixel_values=images).logits)
    size = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors"))
    values = check_trainable(model, method).trainable
    assert 4 * values <= size <= 4 * values + 12_000


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"full"}))
def test_frozen_parts_stay_in_eval_mode(build, images, method):
    """With a dropout of 0.1 in the backbone, training mode would give other logits each time."""
    model = build(method).train()
    with torch.no_grad():
        first, second = (model(pixel_values=images).logits for _ in range(2))
    if method == "partial":
        assert not torch.equal(first, second)
        assert [block.training for block in find_blocks(model)] == [False, False, True]
    else:
        assert torch.equal(first, second)


def test_full_trains_with_dropout(build, images):
    model = build("full").train()
    with torch.no_grad():
        assert not torch.equal(model(pixel_values=images).logits, model(pixel_values=images).logits)


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_added_modules_change_nothing_at_the_start(build, images, method):
    changed, plain = build(method), build("linear")
    head = {name.split("modules_to_save.default.")[-1].split("classifier.")[-1]: value
            for name, value in changed.state_dict().items() if "classifier" in name and "original" not in name}  # fmt: skip
    plain.classifier.load_state_dict(head)
    with torch.no_grad():
        expected = plain.eval()(pixel_values=images).logits
        assert torch.allclose(changed.eval()(pixel_values=images).logits, expected, atol=1e-6)


def test_prompts_act_together_with_what_stands_beside_them(build, images):
    """LoRA is part of the maps that make keys and values of prompts: as prompts on a backbone into which it was merged."""
    model = build("vpt+lora", lora_r=4, num_virtual_tokens=[5], prompt_dropout=0.0)
    some_steps(model, images)
    with torch.no_grad():
        both = model.eval()(pixel_values=images).logits
        for module in model.modules():
            if isinstance(module, LoraLayer):
                assert module.r["lora"] == 4
                module.merge()
        torch.testing.assert_close(model(pixel_values=images).logits, both)
        prompts = find_parameters(model)
        alone = build("vpt", num_virtual_tokens=[5])
        weights = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
        base = alone.get_base_model()
        wanted = {name: weights[name.replace("classifier.modules_to_save.default", "classifier")
                                .replace("classifier.original_module", "classifier")] for name in base.state_dict()}  # fmt: skip
        base.load_state_dict(wanted)
        assert sum(p.numel() for p in prompts.parameters()) == 3 * 5 * 32
        torch.testing.assert_close(alone.eval()(pixel_values=images).logits, both)


@pytest.mark.parametrize("method", COMBINED_METHODS)
def test_options_of_a_combination_come_back(build, images, tmp_path, method):
    own = {"lora_r": 3} if method == "vpt+lora" else {"adapter_reduction": 4}
    model = build(method, num_virtual_tokens=[2], projection_dim=7, **own)
    some_steps(model, images)
    save_trained(model, tmp_path / "saved")
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    loaded, _ = load_adapter_model(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(model.eval()(pixel_values=images).logits, loaded(pixel_values=images).logits)


def test_adapter_formula():
    torch.manual_seed(0)
    adapter, x = BottleneckAdapter(8, 2), torch.randn(2, 3, 8)
    assert torch.equal(adapter(x), x)
    nn.init.normal_(adapter.up.weight)
    expected = x + nn.functional.gelu(x @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T
    assert torch.allclose(adapter(x), expected, atol=1e-6)


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 3.0])
def test_sidetune_blends(alpha):
    torch.manual_seed(0)
    side, pixels, features = SideTuning(3, 8), torch.randn(2, 3, 16, 16), torch.randn(2, 8)
    side.alpha.data.fill_(alpha)
    side.see(pixels)
    share = 1 / (1 + torch.tensor(-alpha).exp())
    assert torch.allclose(side(features), share * features + (1 - share) * side.network(pixels), atol=1e-6)
    with pytest.raises(ValueError, match="pixel_values"):
        side(features)


@pytest.mark.parametrize(("layers", "linears"), [(1, 1), (2, 2), (4, 4)])
def test_mlp_head_layers(layers, linears):
    head = MLPHead(8, 3, layers)
    assert sum(isinstance(m, nn.Linear) for m in head) == linears
    assert head(torch.zeros(2, 8)).shape == (2, 3)


def test_structure(tiny_vit):
    model = load_backbone(ModelArguments(tiny_vit), LABELS)
    assert find_blocks(model) == list(model.vit.layers)
    assert find_final_norm(model) is model.vit.layernorm
    assert find_head(model) == {"classifier": model.classifier}
    apply_method(model, "sidetune", MethodOptions())
    assert find_head(model) == {"classifier": model.classifier}


def test_partial_refuses_more_blocks_than_there_are(build):
    with pytest.raises(ValueError, match="partial_blocks=4 but the encoder has 3 blocks"):
        build("partial", partial_blocks=4)


def test_check_trainable_names_what_should_not_train(build):
    model = build("lora")
    model.get_base_model().vit.layernorm.requires_grad_(True)
    with pytest.raises(RuntimeError, match="vit.layernorm.weight"):
        check_trainable(model, "lora")
    model = build("linear")
    model.classifier.requires_grad_(False)
    with pytest.raises(RuntimeError, match="head would not train"):
        check_trainable(model, "linear")


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_backbone_weights_that_do_not_fit_are_refused(tiny_vit, tmp_path, change):
    model = load_backbone(ModelArguments(tiny_vit), LABELS)
    state = model.state_dict()
    if change == "missing":
        state = {name: value for name, value in state.items() if "layers.1." not in name}
    model.save_pretrained(tmp_path / "bad", state_dict=state)
    if change == "shape":
        config = json.loads((tmp_path / "bad" / "config.json").read_text())
        (tmp_path / "bad" / "config.json").write_text(json.dumps({**config, "image_size": 32}))
    with pytest.raises(ValueError, match="does not hold the backbone's weights vit\\."):
        load_backbone(ModelArguments(str(tmp_path / "bad")), LABELS)


def test_saving_needs_a_known_model(tiny_vit, tmp_path):
    with pytest.raises(ValueError, match="not made by build_model"):
        save_trained(load_backbone(ModelArguments(tiny_vit), LABELS), tmp_path / "x")


def test_biases_are_known_by_their_names():
    """Some attention modules hold the biases of their queries and values by themselves."""
    module = nn.Module()
    for name, shape in {"q_bias": (4,), "bias": (4,), "position_bias": (4, 4), "weight": (4,)}.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
    baselines.bias(module, MethodOptions(), None)
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == {"q_bias", "bias"}
