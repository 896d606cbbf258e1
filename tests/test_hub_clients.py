"""transformers, peft, Trainer and datasets push to the test Hub and load from it, online and from the cache."""

import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, create_repo, upload_folder
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, ViTConfig, ViTModel


pytest_plugins = ["hub_fixtures"]
# The client's own use of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


def tiny_vit(seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    return ViTModel(config, add_pooling_layer=False)


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_transformers_push_and_load(hub, tmp_path):
    model = tiny_vit()
    model.push_to_hub("user/vit", private=True)
    assert set(hub.files("user/vit")) == {"config.json", "model.safetensors", "README.md"}
    assert same(ViTModel.from_pretrained("user/vit", add_pooling_layer=False), model)
    with pytest.raises(OSError, match="not a valid model identifier"):
        ViTModel.from_pretrained("user/vit", token=False, cache_dir=tmp_path / "empty")
    changed = tiny_vit(seed=1)
    changed.push_to_hub("user/vit", revision="next")
    assert same(ViTModel.from_pretrained("user/vit", revision="next", add_pooling_layer=False), changed)
    assert same(ViTModel.from_pretrained("user/vit", add_pooling_layer=False), model)


def test_peft_push_and_load(hub):
    model = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.push_to_hub("user/lora")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files("user/lora"))
    assert same(PeftModel.from_pretrained(tiny_vit(), "user/lora"), model)


def test_a_subfolder(hub, tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path / "vit")
    create_repo("user/many")
    upload_folder(repo_id="user/many", folder_path=tmp_path / "vit", path_in_repo="one/vit")
    assert same(ViTModel.from_pretrained("user/many", subfolder="one/vit", add_pooling_layer=False), model)


def test_trainer_push(hub, tmp_path):
    """What Trainer does on its own: a private repository, a commit for each save, and its own card at the end."""
    model = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    options = {
        "push_to_hub": True,
        "hub_model_id": "user/trained",
        "hub_private_repo": True,
        "hub_strategy": "every_save",
    }
    arguments = TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True, **options)
    trainer = Trainer(model, arguments)
    trainer.push_to_hub(commit_message="end")
    assert {"adapter_model.safetensors", "README.md", "training_args.bin"} <= set(hub.files("user/trained"))
    assert same(PeftModel.from_pretrained(tiny_vit(), "user/trained"), model)
    assert not HfApi().repo_exists("user/trained", token=False)


@pytest.mark.parametrize("separate", [False, True], ids=["here", "subprocess"])
def test_datasets_push_and_load(hub, separate):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"number": [1, 2, 3], "label": [0, 1, 0]})
    data.push_to_hub("user/data", split="train", private=True)
    if separate:
        code = "import datasets; print(datasets.load_dataset('user/data', split='train')['number'][:])"
        assert run(code, hub.env) == "[1, 2, 3]"
        assert run(code, hub.env | {"HF_HUB_OFFLINE": "1"}) == "[1, 2, 3]"
    else:
        with pytest.raises(datasets.exceptions.DatasetNotFoundError):
            datasets.load_dataset("user/data", token=False)
        assert datasets.load_dataset("user/data", split="train")["number"][:] == [1, 2, 3]


def run(code, env):
    process = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_the_cache_serves_a_process_that_is_offline(hub, tmp_path):
    model = tiny_vit()
    model.push_to_hub("user/vit", private=True)
    code = """
from huggingface_hub import snapshot_download
folder = snapshot_download("user/vit")
from transformers import ViTModel
print(folder, ViTModel.from_pretrained("user/vit", add_pooling_layer=False).layernorm.weight.shape)
"""
    online = run(code, hub.env)
    assert online.startswith(str(hub.home)) and "16" in online.split()[-1]
    asked = len(hub.requests)
    assert run(code, hub.env | {"HF_HUB_OFFLINE": "1"}) == online
    assert len(hub.requests) == asked
    # With an empty cache the same process fails, so it was the cache that served it.
    empty = hub.env | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "other")}
    with pytest.raises(AssertionError, match="LocalEntryNotFoundError"):
        run(code, empty)
