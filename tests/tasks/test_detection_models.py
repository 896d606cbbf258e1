"""transformers' detectors on the batches of the task, with prompts, without torchvision."""

import pytest
import torch
import transformers as T
from peft import get_peft_model
from transformers import AutoModelForObjectDetection, ViTImageProcessorPil

from vpt_peft import VPTConfig
from vpt_peft.tasks.detection import TASK
from vpt_peft.training.arguments import MethodArguments, ModelArguments
from vpt_peft.training.checkpoints import save_trained
from vpt_peft.training.inference import load_adapter_model
from vpt_peft.training.model import build_model


NAMES = {0: "cat", 1: "dog"}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 10,
}
RT_DETR = {
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "encoder_in_channels": [16, 32, 64],
    "decoder_in_channels": [32] * 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "feat_strides": [8, 16, 32],
    "d_model": 32,
    "num_queries": 10,
    "num_denoising": 4,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 16,
    "image_size": 64,
}


def swin(*stages):
    return T.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=2,
        out_features=[f"stage{n}" for n in stages],
    )


MODELS = {
    "yolos": lambda: T.YolosConfig(**{**VIT, "image_size": [64, 64]}, num_detection_tokens=10),
    "detr": lambda: T.DetrConfig(use_timm_backbone=False, backbone_config=swin(4), **DETR),
    "deformable_detr": lambda: T.DeformableDetrConfig(
        use_timm_backbone=False, backbone_config=swin(2, 3, 4), num_feature_levels=3, **DETR
    ),
    "lw_detr": lambda: T.LwDetrConfig(
        backbone_config={
            "model_type": "lw_detr_vit",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "mlp_ratio": 2,
            "image_size": 64,
            "pretrain_image_size": 64,
            "patch_size": 16,
            "num_windows": 4,
            "window_block_indices": [0, 2],
            "out_indices": [4],
        },
        projector_scale_factors=[1.0],
        d_model=32,
        decoder_ffn_dim=32,
        decoder_layers=1,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        num_queries=10,
        group_detr=1,
        decoder_n_points=2,
        c2f_num_blocks=1,
    ),
    "d_fine": lambda: T.DFineConfig(
        use_timm_backbone=False, backbone_config=swin(2, 3, 4), decoder_n_points=[2, 2, 2], **RT_DETR
    ),
    "deimv2": lambda: T.Deimv2Config(
        backbone_config=T.DINOv3ViTConfig(**VIT, out_indices=[2, 3, 4]),
        decoder_n_points=[2, 2, 2],
        **{**RT_DETR, "encoder_in_channels": [32, 32, 32]},
    ),
}


def label(boxes, classes):
    none = {"crowd_labels": torch.zeros(0, dtype=torch.long), "crowd_boxes": torch.zeros(0, 4)}
    return {
        **none,
        "class_labels": torch.tensor(classes, dtype=torch.long),
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "area": torch.full((len(classes),), 50.0),
        "crowd_area": torch.zeros(0),
        "canvas": torch.tensor([64.0, 64.0]),
        "orig_size": torch.tensor([64, 64]),
    }


@pytest.mark.parametrize("kind", MODELS)
def test_it_trains_and_is_measured_with_prompts(kind):
    config = MODELS[kind]()
    config.id2label, config.label2id = NAMES, {name: number for number, name in NAMES.items()}
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForObjectDetection.from_config(config), VPTConfig(num_virtual_tokens=2))
    labels = [label([0.5, 0.5, 0.4, 0.4], [1]), label([], [])]
    pixels = torch.rand(2, 3, 64, 64)
    output = model(pixel_values=pixels, labels=labels)
    output.loss.backward()
    prompts = {name: value for name, value in model.named_parameters() if "prompt_tuner" in name}
    assert torch.isfinite(output.loss) and prompts
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in prompts.values())
    frozen = [name for name, value in model.named_parameters() if value.grad is not None and not value.requires_grad]
    assert not frozen
    with torch.no_grad():
        output = model.eval()(pixel_values=pixels, labels=labels)
    found, expected = TASK.measurable(model, tuple(v for k, v in output.items() if k != "loss"), labels)
    assert found.shape == (2, 20, 6) and expected.shape == (2, 2, 7)
    assert set(found[..., 0].unique().tolist()) <= {0.0, 1.0}
    assert torch.isfinite(found).all() and (found[..., 1] > 0).all() and (found[..., 1] < 1).all()


@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_gets_a_head_for_other_classes(kind, tmp_path):
    torch.manual_seed(0)
    AutoModelForObjectDetection.from_config(MODELS[kind]()).save_pretrained(tmp_path)
    model = TASK.load_model(str(tmp_path), {0: "a", 1: "b", 2: "c"}, {}).eval()
    with torch.no_grad():
        logits = model(pixel_values=torch.rand(1, 3, 64, 64)).logits
    # One more for no object where the classes exclude one another
    assert logits.shape[-1] == (4 if kind in ("yolos", "detr") else 3) and torch.isfinite(logits).all()
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("yolos")
    AutoModelForObjectDetection.from_config(MODELS["yolos"]()).save_pretrained(folder)
    return str(folder)


def test_yolos_is_transformers_own_until_its_tokens_train(yolos):
    pixels = torch.rand(1, 3, 64, 64)
    model = TASK.load_model(yolos, {0: "LABEL_0", 1: "LABEL_1"}, {}).eval()
    plain = AutoModelForObjectDetection.from_pretrained(yolos).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).logits, plain(pixel_values=pixels).logits)
        # An offset of the tokens is another value of the tokens
        offsets = torch.randn(10, 32)
        model.detection_tokens.weight.copy_(offsets)
        plain.vit.embeddings.detection_tokens += offsets
        torch.testing.assert_close(model(pixel_values=pixels).logits, plain(pixel_values=pixels).logits)


@pytest.mark.parametrize("method", ["vpt", "linear", "lora", "adapter", "full"])
def test_detection_tokens_train_and_load_again(yolos, method, tmp_path):
    model_args = ModelArguments(yolos, task="object-detection")
    torch.manual_seed(1)
    model = build_model(model_args, MethodArguments(method), NAMES)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    pixels = torch.rand(2, 3, 64, 64)
    model.train()(pixel_values=pixels, labels=[label([0.5, 0.5, 0.4, 0.4], [1]), label([], [])]).loss.backward()
    given = {name: value.grad for name, value in model.named_parameters() if "detection_tokens" in name}
    # Of one set of tokens there is one gradient, be it of the tokens or of their offsets
    (trained,) = (grad for grad in given.values() if grad is not None)
    assert trained.shape[-2:] == (10, 32) and (trained.abs().sum(-1) > 0).all()
    optimizer.step()
    save_trained(model, tmp_path)
    ViTImageProcessorPil().save_pretrained(tmp_path)
    (tmp_path / "training_config.json").write_text('{"task": "object-detection"}')
    again, _ = load_adapter_model(tmp_path)
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixels)
        found = again(pixel_values=pixels)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes)
