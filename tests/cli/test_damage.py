"""Damaged files, flags out of range and places that cannot be used: one line that names the culprit."""

import json
import os

import pytest

from vpt_peft.cli.main import main
from vpt_peft.cli.options import need_training


pytest_plugins = ["training_fixtures"]


@pytest.fixture
def adapter(copied):
    return lambda method: copied(method=method)[1]


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("vpt", "adapter_model.safetensors"),
        ("vpt", "adapter_config.json"),
        ("lora", "config.json"),
        ("vpt", "preprocessor_config.json"),
        ("vpt", "training_config.json"),
        ("linear", "vpt_peft_baseline.safetensors"),
        ("linear", "vpt_peft_baseline.json"),
        ("full", "model.safetensors"),
    ],
)
def test_damaged_files_are_named(adapter, capsys, method, name):
    out = adapter(method)
    whole = (out / name).read_bytes()
    for part in (whole[: len(whole) // 2], b""):
        (out / name).write_bytes(part)
        assert main(["evaluate", str(out)]) == 2
        assert f"{out / name} is damaged" in last_line(capsys)


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("vpt", "adapter_model.safetensors", "no adapter_model.safetensors beside it"),
        ("lora", "config.json", "with 5 labels: size mismatch"),
        ("vpt", "adapter_config.json", "holds no adapter_config.json"),
    ],
)
def test_missing_files_are_named(adapter, capsys, method, name, message):
    out = adapter(method)
    (out / name).unlink()
    assert main(["evaluate", str(out)]) == 2
    assert message in last_line(capsys)


@pytest.mark.parametrize(
    ("method", "name", "values", "message"),
    [
        ("vpt", "adapter_config.json", {"num_virtual_tokens": "3"}, "num_virtual_tokens='3' must be an integer"),
        ("vpt", "adapter_config.json", {"id2label": {"0": "a", "2": "b"}}, "without gaps"),
        ("vpt", "adapter_config.json", {"id2label": 7}, "id2label=7 must be a dict"),
        ("vpt", "adapter_config.json", {"peft_type": "NONE"}, "adapter_config.json cannot be used"),
        ("vpt", "adapter_config.json", {"peft_type": None}, "adapter_config.json cannot be used"),
        ("vpt", "adapter_config.json", {"base_model_name_or_path": None}, "names no backbone; give base_model"),
        ("vpt", "training_config.json", {"task": "no-such-task"}, "no-such-task"),
        (
            "vpt",
            "preprocessor_config.json",
            {"image_std": [0.5, 0.0, 0.5]},
            "image_std=[0.5, 0.0, 0.5] must not hold 0",
        ),
        ("vpt", "preprocessor_config.json", {"image_mean": [float("nan")] * 3}, "image_mean=[nan, nan, nan]"),
        ("vpt", "preprocessor_config.json", {"rescale_factor": float("inf")}, "rescale_factor=inf"),
        ("vpt", "preprocessor_config.json", {"image_processor_type": 5}, "image processor"),
        ("lora", "config.json", {"id2label": {"0": "a", "7": "b"}}, "config.json"),
        ("lora", "config.json", {"id2label": [1]}, "config.json"),
        ("linear", "vpt_peft_baseline.json", {"method": None}, "method=None is unknown"),
        ("linear", "vpt_peft_baseline.json", {"more": 1}, "vpt_peft_baseline.json was not written by"),
    ],
)
def test_fields_of_files_are_named(adapter, capsys, method, name, values, message):
    out = adapter(method)
    (out / name).write_text(json.dumps({**json.loads((out / name).read_text()), **values}))
    assert main(["evaluate", str(out)]) == 2
    assert message in last_line(capsys)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("vpt", "adapter_config.json"),
        ("vpt", "training_config.json"),
        ("vpt", "preprocessor_config.json"),
        ("lora", "config.json"),
        ("linear", "vpt_peft_baseline.json"),
    ],
)
def test_files_that_hold_no_object(adapter, capsys, method, name):
    out = adapter(method)
    for content in ("null", "[]", "7", '"text"'):
        (out / name).write_text(content)
        assert main(["evaluate", str(out)]) == 2
        assert f"{out / name} holds a JSON" in last_line(capsys)
    (out / name).unlink()
    os.mkfifo(out / name)
    assert main(["evaluate", str(out)]) == 2
    assert f"{str(out / name)!r} is not a regular file" in last_line(capsys)


def test_the_users_own_files_beside_an_adapter(adapter):
    out = adapter("vpt")
    (out / "table.json").write_text("[]")
    assert main(["evaluate", str(out)]) == 0


def test_output_files_are_checked_before_the_work(adapter, capsys, tmp_path, monkeypatch):
    out = adapter("linear")
    table = tmp_path / "deep" / "er" / "metrics.json"
    assert main(["evaluate", str(out), "--output_file", str(table)]) == 0
    assert json.loads(table.read_text())["samples"] == 50
    monkeypatch.setattr("vpt_peft.training.inference.load_adapter_model", lambda *_, **__: pytest.fail("loaded"))
    for command in (["evaluate", str(out)], ["predict", str(out), str(tmp_path)]):
        assert main([*command, "--output_file", str(tmp_path)]) == 2
        assert "is a folder; name a file" in last_line(capsys)


@pytest.mark.parametrize("device", ["tpu9", "cuda:99"])
def test_devices_that_are_not_there(adapter, capsys, device):
    assert main(["evaluate", str(adapter("linear")), "--device", device]) == 2
    assert f"device={device!r} cannot be used" in last_line(capsys)


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_batch_sizes(capsys, count):
    assert main(["evaluate", "out", "--batch_size", count]) == 2
    assert f"{count!r} is not a whole number of 1 or more" in last_line(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_train_epochs", "-1"], "num_train_epochs=-1.0 must be above 0"),
        (["--num_train_epochs", "nan"], "num_train_epochs=nan must be above 0"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 must be at least 1"),
        (["--per_device_eval_batch_size", "-2"], "per_device_eval_batch_size=-2 must be at least 1"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0 must be at least 1"),
        (["--metric_for_best_model", "f1"], "choose one of accuracy, macro_f1, loss"),
        (["--optim_args", "momentum"], "optim_args='momentum' must look like"),
        (["--accelerator_config", "{bad"], "'{bad' is not valid JSON"),
        (["--feature_cache_limit_gb", "nan"], "feature_cache_limit_gb=nan"),
        (["--feature_cache_limit_gb", "inf"], "feature_cache_limit_gb=inf"),
        (["--model_name_or_path", "user/none"], "model_name_or_path='user/none': no such folder here"),
    ],
    ids=" ".join,
)
def test_flags_are_checked_before_the_work(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["train", "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert message in last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_files_of_flags_that_are_no_text(tmp_path, capsys):
    (tmp_path / "flags.yaml").write_bytes(b"\xff\xfe\x00")
    assert main(["train", str(tmp_path / "flags.yaml")]) == 2
    assert "flags.yaml is not valid yaml" in last_line(capsys)


def test_a_hub_that_cannot_be_reached_is_told_before_training(tmp_path, tiny_vit, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = ["--model_name_or_path", tiny_vit, "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]
    assert main(["train", *flags, "--push_to_hub", "--hub_model_id", "user/name"]) == 2
    line = last_line(capsys)
    assert "the repository cannot be made" in line and "vpt-peft push <output_dir>" in line
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("vpt_peft.cli.options.find_spec", lambda name: None if name == "sklearn" else name)
    with pytest.raises(ModuleNotFoundError, match=r"this needs sklearn: pip install 'vpt_peft\[train\]'"):
        need_training()
