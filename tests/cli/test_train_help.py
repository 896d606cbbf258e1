"""The short help against what a run really uses."""

import re
from dataclasses import fields

import pytest

from vpt_peft import GatedVPTConfig
from vpt_peft.cli.main import main
from vpt_peft.cli.train_help import shown_values
from vpt_peft.methods import METHODS
from vpt_peft.tasks import task_names
from vpt_peft.training.arguments import parse_args
from vpt_peft.training.flags import MethodArguments
from vpt_peft.training.recipes import RECIPES


def used(chosen):
    """Every value of a run with these flags."""
    model, data, method, training, _ = parse_args(chosen)
    return {**vars(model), **vars(data), **vars(method), **vars(training), "report_to": "none"}


def check(shown, actual):
    # What is shown as not set may be worked out later, as the level of the log decides on bars
    later = {"disable_tqdm", "gradient_checkpointing"}
    assert {name for name, value in shown.items() if value is None} >= later
    assert {n: value for n, value in shown.items() if n not in later} == {
        n: actual[n] for n in shown if n not in later
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_help_shows_what_is_used(method, recipe):
    chosen = {"method": method, "recipe": recipe}
    values, actual = shown_values(chosen), used(chosen)
    assert {"learning_rate", "base_learning_rate"} & set(values)
    check(values, actual)
    # Nothing of other methods, and all numbers of this one
    assert ("lora_r" in values) == (method in ("lora", "vpt+lora")) and ("gate" in values) == (method == "gated_vpt")
    assert values.get("num_virtual_tokens", 10) == 10


@pytest.mark.parametrize("task", task_names())
def test_help_shows_what_is_used_for_every_task(task):
    chosen = {"method": "vpt", "task": task}
    values, actual = shown_values(chosen), used(chosen)
    check(values, actual)


def test_defaults_named_in_words_are_the_configurations():
    config, found = GatedVPTConfig(), {}
    for item in fields(MethodArguments):
        words = re.search(r"default: ([\w.]+)\.$", item.metadata["help"])
        if words and item.name in METHODS["gated_vpt"].flags and hasattr(config, item.name):
            found[item.name] = words[1]
    expected = (
        "prompt_dropout",
        "bias",
        "gate",
        "gate_init",
        "attention_temperature",
        "prompt_location",
        "token_type",
    )
    assert found == {name: str(getattr(config, name)).lower() for name in expected} | {"prompt_rank": "whole"}


def test_train_help_is_short_and_for_the_method(capsys):
    assert main(["train", "--help", "--method", "gated_vpt", "--task", "image-classification"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 90 and max(map(len, lines)) <= 110
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(flags) == len(set(flags)) < 50
    text = "\n".join(lines)
    assert "--method gated_vpt" in text and "--head_learning_rate 0.01" in text and "--lora_r" not in text
    assert main(["train", "--help", "--method", "lora"]) == 0
    assert "--lora_r 8" in capsys.readouterr().out


def test_help_all_has_every_flag(capsys):
    assert main(["train", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in ("model_name_or_path", "adam_beta1", "method", "ddp_timeout"))


def test_help_refuses_an_unknown_method(capsys):
    assert main(["train", "--help", "--method", "vtp"]) == 2
    assert "'vtp' is unknown" in capsys.readouterr().err


def test_write_config_writes_and_stops(tmp_path, capsys):
    path, out = tmp_path / "run.yaml", tmp_path / "out"
    assert main(["train", "--method", "lora", "--write_config", str(path), "--output_dir", str(out)]) == 0
    assert capsys.readouterr().out == f"{path}\n" and not out.exists()
    assert "lora_r: 8\n" in path.read_text() and f"output_dir: {out}\n" in path.read_text()
