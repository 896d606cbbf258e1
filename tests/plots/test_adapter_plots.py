"""Pictures of prompted models: the numbers they show, against the model's own and against formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from vpt_peft import GatedVPTConfig, VPTConfig, attention_maps, plots
from vpt_peft.cli.main import main


FIELDS = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def make(config, **fields):
    torch.manual_seed(0)
    vit = ViTForImageClassification(ViTConfig(**FIELDS | fields, num_labels=3))
    return get_peft_model(vit, config).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def gated():
    model = make(GatedVPTConfig(num_virtual_tokens=5))
    with torch.no_grad():
        for index, gate in enumerate(model.base_model.model.prompt_tuner.gated_prompt_gates["default"].values()):
            gate.weight.fill_((-1.0, 0.5, 2.0)[index])
        model.base_model.model.prompt_tuner.gated_prompt_temperatures["default"]["2"].weight.fill_(0.5)
    return model


@pytest.fixture(scope="module")
def deep():
    return make(VPTConfig(num_virtual_tokens=5))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_gates_temperatures_and_their_weights(gated):
    openings = plots.gate_openings(gated)
    g = [sigmoid(-1.0), sigmoid(0.5), sigmoid(2.0)]
    assert openings == pytest.approx(dict(enumerate(g)), abs=1e-6)
    assert plots.temperatures(gated) == {0: 1.0, 1: 1.0, 2: 0.5, 3: 1.0}
    weights = plots.prompt_weights(openings, 4)
    by_hand = [
        (1 - g[0]) * (1 - g[1]) * (1 - g[2]),
        g[0] * (1 - g[1]) * (1 - g[2]),
        g[1] * (1 - g[2]),
        g[2],
    ]
    assert weights == pytest.approx(by_hand, abs=1e-6) and sum(weights) == pytest.approx(1)
    # Blocks without a gate pass on their outputs alone
    assert plots.prompt_weights({0: 0.5}, 4) == [0, 0, 0, 1]


def test_the_picture_of_gates_shows_them(gated):
    first, second, third = plots.draw_gates(gated).axes
    assert [bar.get_height() for bar in first.patches] == pytest.approx(list(plots.gate_openings(gated).values()))
    assert sum(bar.get_height() for bar in second.patches) == pytest.approx(1)
    assert list(third.get_lines()[0].get_ydata()) == [1.0, 1.0, 0.5, 1.0]


def test_gates_that_are_not_scalars(deep):
    with pytest.raises(ValueError, match="no scalar gates"):
        plots.gate_openings(deep)
    with pytest.raises(ValueError, match="no scalar gates"):
        plots.gate_openings(make(GatedVPTConfig(gate="elementwise")))
    with pytest.raises(ValueError, match="'other' must be one prompt adapter"):
        plots.gate_openings(deep, "other")


@pytest.mark.parametrize("which", ["deep", "gated"])
def test_attention_of_each_prompt(which, images, request):
    model = request.getfixturevalue(which)
    shares = plots.prompt_attention(model, images)
    assert [tuple(each.shape) for each in shares] == [(3, 5)] * 4
    for each, found in zip(shares, attention_maps(model, images), strict=True):
        columns = [index for index, name in enumerate(found.columns) if name.startswith("prompt")]
        # 17 tokens, whose rows add up to 1
        rest = [index for index in range(22) if index not in columns]
        assert each.sum() == pytest.approx(3 - found.maps[..., rest].sum().item() / (2 * 17), abs=1e-5)
    picture = plots.draw_prompt_attention(model, images)
    drawn = picture.axes[0].images[0].get_array()
    assert torch.allclose(torch.tensor(drawn[1]), 100 * shares[1].mean(0), atol=1e-4)


def test_attention_of_tokens_over_the_image(deep, images):
    maps = attention_maps(deep, images[:1])
    figure = plots.draw_attention(deep, images[:1], blocks=[1, 3], head=2)
    assert len(figure.axes) == 2
    overlay = torch.tensor(figure.axes[1].images[1].get_array())
    # Behind the class token and five prompts
    assert torch.allclose(overlay.flatten(), maps[3].maps[0, 2, 0, 6:])
    assert figure.axes[1].get_title() == f"block 4: {maps[3].maps[0, 2, 0, 1:6].sum():.0%} to prompts"
    overlay = torch.tensor(
        plots.draw_attention(deep, images[:1], token=(2, 1), blocks=[0]).axes[0].images[1].get_array()
    )
    assert torch.allclose(overlay.flatten(), maps[0].maps[0, :, 1 + 2 * 4 + 1, 6:].mean(0))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"token": "register_0"}, "token='register_0' is not there; choose one of class to patch_15"),
        ({"token": (4, 0)}, "is not there"),
        ({"blocks": [4]}, "the encoder has 4 blocks of 3 heads"),
        ({"head": 3}, "the encoder has 4 blocks of 3 heads"),
    ],
)
def test_what_is_not_there(deep, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.draw_attention(deep, images[:1], **arguments)


def test_one_image_at_a_time(deep, images):
    with pytest.raises(ValueError, match=r"pixel_values has shape \(2, 3, 32, 32\)"):
        plots.draw_attention(deep, images)


def test_images_that_are_not_square():
    model = make(VPTConfig(num_virtual_tokens=2), image_size=(16, 48))
    figure = plots.draw_attention(model, torch.randn(1, 3, 16, 48), blocks=[0])
    assert figure.axes[0].images[1].get_array().shape == (2, 6)


def test_prompts_among_tokens(deep, images):
    figure = plots.draw_prompts(deep, images, blocks=[0, 2])
    hidden = deep(pixel_values=images, output_hidden_states=True).hidden_states
    prompts = deep.base_model.model.prompt_tuner.vpt_prompts["default"]
    points = torch.cat([hidden[2].flatten(0, 1), prompts["2"]]).detach().double()
    # What PCA keeps, by singular values
    kept = torch.linalg.svdvals(points - points.mean(0))[:2]
    drawn = torch.cat([torch.tensor(part.get_offsets().data) for part in figure.axes[1].collections])
    assert len(drawn) == 2 * 17 + 5
    assert torch.allclose(drawn.norm(dim=0), kept, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"blocks=\[7\] must be blocks with prompt tokens of their own: \[0, 1, 2, 3\]"
    ):
        plots.draw_prompts(deep, images, blocks=[7])


def test_embeddings_are_what_the_head_reads(deep, images):
    batches = [{"pixel_values": images, "labels": torch.tensor([0, 2])} for _ in range(3)]
    features, labels = plots.embeddings(deep, batches)
    head = deep.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad():
        expected = deep(pixel_values=images).logits
        assert torch.allclose(head(features[:2]), expected, atol=1e-6)
    assert labels.tolist() == [0, 2] * 3
    figure = plots.draw_embeddings({"vpt": (features, labels), "again": (features, labels)}, {0: "cat"}, method="pca")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "2"]
    with pytest.raises(ValueError, match="method='umap' is unknown"):
        plots.draw_embeddings({"vpt": (features, labels)}, method="umap")


def test_from_the_command_line(tmp_path, capsys):
    record = tmp_path / "run"
    assert main(["train", "--dataset_name", "digits", "--max_train_samples", "20", "--max_steps", "1",
                 "--method", "gated_vpt", "--model_name_or_path", "embedded-mae", "--output_dir", str(record),
                 "--max_eval_samples", "4", "--max_predict_samples", "4", "--use_cpu"]) == 0  # fmt: skip
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    for kind, more in (
        ("gates", []),
        ("attention", ["--images", str(tmp_path / "a.png"), "--patch", "1", "2"]),
        ("prompt_attention", ["--images", str(tmp_path / "a.png")]),
        ("prompts", ["--images", str(tmp_path / "a.png")]),
    ):
        target = tmp_path / f"{kind}.svg"
        assert main(["plot", str(record), "--kind", kind, "--output_file", str(target), *more]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(target) and target.read_text().startswith("<?xml")
    for wrong, said in (
        (["--kind", "attention"], "needs --images"),
        (["--kind", "gates", "--images", "x.png"], "--images has no effect"),
        (["--kind", "prompts", "--images", "x.png", "--patch", "1", "1"], "--patch has no effect"),
    ):
        with pytest.raises(SystemExit):
            main(["plot", str(record), *wrong])
        assert said in capsys.readouterr().err
