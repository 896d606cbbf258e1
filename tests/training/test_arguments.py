"""Flags, files and recipes to dataclasses, and what is refused."""

import json
import re

import pytest

from vpt_peft.data.arguments import DataArguments
from vpt_peft.methods.registry import METHOD_FLAGS, METHODS
from vpt_peft.training.arguments import (
    MethodArguments,
    VPTTrainingArguments,
    from_record,
    parse_args,
    write_arguments,
)
from vpt_peft.training.model import method_options


@pytest.fixture
def parse(tmp_path):
    def do(*flags):
        return parse_args([*flags, "--output_dir", str(tmp_path / "out")])

    return do


def test_defaults(parse):
    model, data, method, training, _ = parse()
    assert model.model_name_or_path == "embedded"
    assert data.dataset_name == "digits"
    assert (method.method, method.num_virtual_tokens, method.recipe) == ("vpt", 10, "default")
    assert training.eval_strategy == training.save_strategy == "epoch"
    assert training.load_best_model_at_end and training.metric_for_best_model == "accuracy"
    assert training.greater_is_better is True
    assert training.label_names == ["labels"] and training.report_to == [] and training.seed == 42
    assert training.remove_unused_columns is False and training.logging_nan_inf_filter is False


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_default_recipe(parse, method):
    _, _, parsed, training, _ = parse("--method", method)
    assert parsed.method == method
    assert training.optim == "adamw_torch"
    assert 1e-5 <= training.learning_rate <= 5e-2
    assert training.learning_rate != VPTTrainingArguments.learning_rate


def test_flags_win_over_the_recipe(parse):
    _, _, method, training, given = parse(
        "--recipe", "vpt_paper", "--num_train_epochs", "3", "--prompt_dropout", "0.3"
    )
    assert training.num_train_epochs == 3
    assert method.prompt_dropout == 0.3
    assert given["optim"] == "sgd" and training.optim_args == "momentum=0.9"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        # learning rate, of prompts, of the head
        ([], (3e-2, 3e-2, 1e-3)),
        (["--learning_rate", "0.03"], (3e-2, 3e-2, 1e-3)),
        (["--learning_rate", "0.06"], (6e-2, 6e-2, 2e-3)),
        (["--learning_rate", "0.06", "--head_learning_rate", "0.5"], (6e-2, 6e-2, 0.5)),
        (["--learning_rate", "0.06", "--prompt_learning_rate", "0.5"], (6e-2, 0.5, 2e-3)),
        (["--head_learning_rate", "0.02"], (3e-2, 3e-2, 0.02)),
        (["--prompt_learning_rate", "0.02"], (3e-2, 0.02, 1e-3)),
        # 32 images a step
        (["--base_learning_rate", "0.48"], (6e-2, 6e-2, 2e-3)),
        (["--recipe", "vpt_paper", "--learning_rate", "0.06"], (6e-2, None, None)),
        (["--method", "lora", "--learning_rate", "0.002"], (2e-3, None, 4e-3)),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_a_given_rate_scales_the_recipe_but_a_groups_own_is_for_it(parse, flags, expected):
    arguments = parse(*flags)
    _, _, method, training, _ = arguments
    assert (training.learning_rate, method.prompt_learning_rate, method.head_learning_rate) == expected
    again = parse_args({**json.loads(json.dumps(arguments.record())), "output_dir": training.output_dir})
    assert again.method == method and again.training.learning_rate == training.learning_rate


def test_weight_decay_leaves_prompts_as_the_recipe_has_them(parse):
    arguments = parse("--weight_decay", "0.5")
    assert (arguments.training.weight_decay, arguments.method.prompt_weight_decay) == (0.5, 0.0)
    assert parse("--weight_decay", "0.5", "--recipe", "vpt_paper").method.prompt_weight_decay is None


# A value of every flag that only some methods read
FOREIGN = {
    "num_virtual_tokens": "5",
    "prompt_rank": "2",
    "bias": "all",
    "prompt_dropout": "0.1",
    "projection_dim": "4",
    "pooling": "image",
    "pool_before_norm": "true",
    "layers_to_transform": "0",
    "prompt_location": "add",
    "token_type": "class",
    "share_prompts": "true",
    "init_method": "random",
    "gate": "scalar",
    "gate_init": "3",
    "attention_temperature": "false",
    "prompt_learning_rate": "0.1",
    "prompt_weight_decay": "0.1",
    "lora_r": "4",
    "partial_blocks": "2",
    "mlp_layers": "2",
    "adapter_reduction": "4",
    "solver": "optimizer",
}


@pytest.mark.parametrize("method", METHODS)
def test_flags_of_other_methods_are_refused_alike(parse, method):
    assert set(FOREIGN) == METHOD_FLAGS
    for name, value in FOREIGN.items():
        flags = ("--method", method, f"--{name}", value)
        if name in METHODS[method].flags:
            parse(*flags)
        else:
            with pytest.raises(
                ValueError, match=rf"{name}=.* has no effect with method='{re.escape(method)}', only with"
            ):
                parse(*flags)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize(
    "flags", [["--method", "gated_vpt"], ["--recipe", "vpt_paper", "--num_virtual_tokens", "5", "2"]], ids=" ".join
)
def test_a_written_file_repeats_the_run(parse, tmp_path, suffix, flags):
    arguments = parse(*flags, "--learning_rate", "1e-3")
    arguments.given["token"] = "hf_secret"
    path = write_arguments(arguments, tmp_path / "deep" / f"run.{suffix}")
    assert "hf_secret" not in path.read_text()
    again = parse_args([str(path)])
    assert again.method == arguments.method and again.data == arguments.data
    assert again.training.to_dict() == arguments.training.to_dict()
    # Any flag on top still wins
    assert parse_args([str(path), "--seed", "9"]).training.seed == 9


def test_a_file_of_another_kind_is_not_written(parse, tmp_path):
    with pytest.raises(ValueError, match=r"write_config='.*run.txt' must end in .yaml or .json"):
        write_arguments(parse(), tmp_path / "run.txt")
    assert not (tmp_path / "run.txt").exists()


@pytest.mark.parametrize(
    ("metric", "name", "greater"),
    [("macro_f1", "macro_f1", True), ("eval_loss", "loss", False), ("loss", "loss", False)],
)
def test_the_metric_that_chooses_the_best_weights(parse, metric, name, greater):
    training = parse("--metric_for_best_model", metric).training
    assert (training.metric_for_best_model, training.greater_is_better) == (name, greater)
    assert training.batch_eval_metrics


def test_the_task_is_part_of_the_record(parse):
    assert parse("--task", "image-classification").record()["task"] == "image-classification"
    with pytest.raises(ValueError, match="--task: invalid choice: 'depth'"):
        parse("--task", "depth")


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_file_with_flags_on_top(tmp_path, suffix):
    path = tmp_path / f"run.{suffix}"
    values = {"method": "partial", "partial_blocks": 2, "learning_rate": "1e-3", "bf16": False, "seed": 7}
    text = json.dumps(values) if suffix == "json" else "\n".join(f"{name}: {value}" for name, value in values.items())
    path.write_text(
        text + ("\n" if suffix == "json" else "\nlayers_to_transform: null\nlr_scheduler_kwargs: {a: 1}\n")
    )
    _, _, method, training, _ = parse_args([str(path), "--seed", "8", "--output_dir", str(tmp_path / "out")])
    assert (method.method, method.partial_blocks) == ("partial", 2)
    # YAML reads 1e-3 as a string
    assert training.learning_rate == 1e-3
    assert training.seed == 8
    assert suffix == "json" or training.lr_scheduler_kwargs == {"a": 1}


def test_lists_and_flags_of_one_word(parse):
    switches = ("--cache_features", "--bf16", "false", "--disable_tqdm", "--share_prompts")
    _, _, method, training, _ = parse("--layers_to_transform", "1", "2", *switches)
    assert training.disable_tqdm is method.share_prompts is True
    assert method.layers_to_transform == [1, 2] and method.cache_features is True and training.bf16 is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metod", "vpt"], "--metod"),
        (["--method", "vtp"], "vtp"),
        (["--num_virtual_tokens", "many"], "many"),
        (["--num_virtual_tokens", "0"], "num_virtual_tokens=0 must be at least 1"),
        (["--method", "vpt", "--gate", "scalar"], "gate='scalar' has no effect with method='vpt'"),
        (["--method", "linear", "--prompt_dropout", "0.1"], "prompt_dropout=0.1 has no effect"),
        (["--recipe", "papers"], "papers"),
        (["--early_stopping_patience", "0"], "early_stopping_patience=0"),
        (["--head_learning_rate", "-1"], "head_learning_rate=-1"),
        (["--feature_cache_limit_gb", "0"], "feature_cache_limit_gb=0"),
        (["--max_train_samples", "0"], "max_train_samples=0"),
        (["--eval_strategy", "no"], "load_best_model_at_end"),
        (["--report_to", "dvclive"], "report_to='dvclive' needs a package"),
    ],
)
def test_refusals_name_field_and_value(parse, flags, message):
    with pytest.raises(ValueError, match=message):
        parse(*flags)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("a.json", "{", "not valid json"), ("a.yaml", "- 1", "one mapping"), ("a.yaml", "methot: vpt", "--methot")],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_args([str(tmp_path / name)])
    with pytest.raises(FileNotFoundError):
        parse_args([str(tmp_path / "missing.json")])


def test_record_repeats_the_run_without_secrets(tmp_path):
    secrets = {"token": "hf_secret", "hub_token": "hf_secret"}
    arguments = parse_args({"method": "gated_vpt", "seed": 3, "output_dir": str(tmp_path / "a"), **secrets})
    record = arguments.record()
    assert "hf_secret" not in json.dumps(record) and str(tmp_path) not in json.dumps(record)
    again = parse_args({**json.loads(json.dumps(record)), "output_dir": str(tmp_path / "b")})
    assert again.method == arguments.method and again.data == arguments.data
    assert again.training.seed == 3 and again.training.learning_rate == arguments.training.learning_rate
    assert from_record(DataArguments, record) == arguments.data
    assert from_record(MethodArguments, record).method == "gated_vpt"


def test_numbers_of_prompts_rank_and_biases(parse):
    _, _, method, _, given = parse("--num_virtual_tokens", "5", "--bias", "all", "--prompt_rank", "4")
    assert (method.num_virtual_tokens, method.bias, method.prompt_rank) == (5, "all", 4)
    assert (given["num_virtual_tokens"], given["bias"]) == (5, "all")
    _, _, method, _, given = parse("--num_virtual_tokens", "5", "2", "--bias", "value", "--init_method", "vipamin")
    assert (method.num_virtual_tokens, method.bias, method.init_method) == ([5, 2], ["value"], "vipamin")
    assert method_options(method).fields == {"bias": ["value"]}
    assert method_options(method).num_virtual_tokens == [5, 2]
    assert from_record(MethodArguments, given).num_virtual_tokens == [5, 2]
    _, _, _, training, _ = parse("--recipe", "vpt_paper", "--num_virtual_tokens", "5", "100")
    assert training.per_device_train_batch_size == 64
    with pytest.raises(ValueError, match=r"num_virtual_tokens=\[5, 0\] must be at least 1"):
        parse("--num_virtual_tokens", "5", "0")
    with pytest.raises(ValueError, match="prompt_rank=4 has no effect with method='lora'"):
        parse("--method", "lora", "--prompt_rank", "4")


@pytest.mark.parametrize("fsdp", ["full_shard", "full_shard auto_wrap", "true"])
def test_fsdp_is_refused_with_the_remedy(parse, tmp_path, fsdp):
    with pytest.raises(ValueError, match="Leave out --fsdp.*trains by DDP.*in a loop of yours"):
        parse("--fsdp", fsdp)
    with pytest.raises(ValueError, match="does not shard"):
        parse_args({"fsdp": fsdp, "output_dir": str(tmp_path / "out")})
    assert not list(tmp_path.iterdir())


def test_fsdp_of_accelerate_is_refused(parse, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate's --use_fsdp"):
        parse()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert parse().training.fsdp in (None, "", [], False)
