import logging

import pytest
import torch
from peft import PeftModel
from transformers import Dinov2Config, Dinov2Model, SwinConfig, SwinModel, ViTConfig, ViTForImageClassification

from vpt_peft.dense.eomt import eomt_from_backbone
from vpt_peft.methods import MethodOptions
from vpt_peft.methods.apply import apply_method


TINY = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
NAMES = {0: "cat", 1: "dog"}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    model = ViTForImageClassification(ViTConfig(**TINY, num_hidden_layers=4, intermediate_size=32)).eval()
    model.save_pretrained(folder)
    return model.vit, str(folder)


def features_before_the_queries(model, pixels):
    """Input of the first block that reads queries, without the queries."""
    seen = []
    block = model.layers[model.config.num_hidden_layers - model.config.num_blocks]
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(pixel_values=pixels)
    handle.remove()
    return seen[0][:, model.config.num_queries :]


def test_it_is_the_same_vit_up_to_the_queries(vit, caplog):
    source, folder = vit
    with caplog.at_level(logging.INFO):
        model = eomt_from_backbone(folder, NAMES, 32, num_queries=5)
    # 4 of the embeddings, 16 of each block, 2 of the final norm
    assert "copied 70 tensors" in caplog.text
    assert "class_predictor" in caplog.text and "layers" not in caplog.text.split("fresh are")[1]
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = source(pixels, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(features_before_the_queries(model, pixels), expected, atol=1e-5, rtol=1e-5)
    assert model.config.num_blocks == 3 and model.class_predictor.out_features == 3
    assert model.config.id2label == NAMES


def test_positions_follow_the_size(vit):
    source, folder = vit
    model = eomt_from_backbone(folder, NAMES, 64, num_queries=5)
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = source(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[1]
    torch.testing.assert_close(features_before_the_queries(model, pixels), expected, atol=1e-5, rtol=1e-5)


def test_dinov2_with_its_layer_scales(tmp_path):
    torch.manual_seed(0)
    source = Dinov2Model(Dinov2Config(**TINY, num_hidden_layers=4, mlp_ratio=2)).eval()
    for block in source.encoder.layer:
        torch.nn.init.uniform_(block.layer_scale1.lambda1)
    source.save_pretrained(tmp_path)
    model = eomt_from_backbone(str(tmp_path), NAMES, 32, num_queries=5)
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = source(pixels, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(features_before_the_queries(model, pixels), expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused(vit, tmp_path):
    with pytest.raises(ValueError, match="image_size=36 must be a multiple of the patches of 8"):
        eomt_from_backbone(vit[1], NAMES, 36)
    SwinModel(SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=32)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a plain ViT"):
        eomt_from_backbone(str(tmp_path), NAMES, 32)


@pytest.mark.parametrize("method", ["vpt", "linear", "lora", "adapter"])
def test_queries_train_and_are_saved(vit, method, tmp_path):
    torch.manual_seed(0)
    base = eomt_from_backbone(vit[1], NAMES, 32, num_queries=5)
    start = base.query.weight.detach().clone()
    model = apply_method(base, method, MethodOptions())
    trained = [each for each in model.parameters() if each.requires_grad]
    masks, classes = [torch.rand(2, 32, 32).round()], [torch.tensor([0, 1])]
    model.train()(pixel_values=torch.rand(1, 3, 32, 32), mask_labels=masks, class_labels=classes).loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()
    query = base.query.weight
    assert ((query - start).abs().sum(-1) > 0).all()
    if isinstance(model, PeftModel):
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(eomt_from_backbone(vit[1], NAMES, 32, num_queries=5), tmp_path)
        assert torch.equal(again.get_base_model().query.weight, query)
