"""Pictures of runs: what is grouped, which numbers are drawn, and files that cannot be."""

import json

import pytest
from PIL import Image

from vpt_peft.cli.main import main
from vpt_peft.plots import draw_curves, draw_tradeoff, find_runs, group_runs
from vpt_peft.plots.figures import COLORS
from vpt_peft.plots.panels import new_panels


def write_run(folder, accuracies, values=100, test=0.5, seconds=None, **record):
    folder.mkdir(parents=True)
    log = [
        entry
        for epoch, accuracy in enumerate(accuracies, 1)
        for entry in ({"epoch": epoch, "loss": 3.0 / epoch}, {"epoch": epoch, "eval_accuracy": accuracy})
    ]
    # As the Trainer does at the end, with the best weights
    log.append({"epoch": len(accuracies), "eval_accuracy": max(accuracies)})
    results = {"trainable_parameters": values, "eval_accuracy": max(accuracies), "test_accuracy": test}
    results |= {} if seconds is None else {"train_runtime": seconds}
    for name, content in (
        ("training_config.json", record),
        ("all_results.json", results),
        ("trainer_state.json", {"log_history": log}),
    ):
        (folder / name).write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "runs" / "a", [0.2, 0.6, 0.4], 1000, 0.5, method="vpt", seed=0, learning_rate=0.1)
    write_run(tmp_path / "runs" / "b", [0.4, 0.4, 0.6], 1000, 0.7, method="vpt", seed=1, learning_rate=0.1)
    write_run(tmp_path / "runs" / "c", [0.1, 0.2, 0.3], 10, 0.4, method="linear", seed=0, learning_rate=0.2)
    # A checkpoint is no run of its own
    (tmp_path / "runs" / "c" / "checkpoint-3").mkdir()
    (tmp_path / "runs" / "c" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    return tmp_path / "runs"


def panels(count):
    from matplotlib.figure import Figure

    return Figure().subplots(1, count, squeeze=False)[0]


def test_runs_that_differ_in_the_seed_alone_are_one_group(folder):
    groups = group_runs(find_runs([folder]))
    assert {label: [run.folder.name for run in runs] for label, runs in groups.items()} == {
        "vpt": ["a", "b"],
        "linear": ["c"],
    }
    write_run(folder / "d", [0.1], method="vpt", seed=0, learning_rate=0.5)
    assert list(group_runs(find_runs([folder]))) == ["vpt (learning_rate=0.1)", "linear", "vpt (learning_rate=0.5)"]


def test_curves_are_means_over_seeds_of_each_epoch(folder):
    axes = panels(2)
    draw_curves(group_runs(find_runs([folder])), axes)
    vpt, linear = axes[1].get_lines()
    assert list(vpt.get_xdata()) == [1, 2, 3]
    assert list(vpt.get_ydata()) == pytest.approx([30, 50, 50]) and list(linear.get_ydata()) == pytest.approx(
        [10, 20, 30]
    )
    assert list(axes[0].get_lines()[0].get_ydata()) == pytest.approx([3, 1.5, 1])


def test_tradeoff_shows_mean_and_deviation(folder):
    axes = panels(1)
    draw_tradeoff(group_runs(find_runs([folder])), axes)
    vpt, linear = axes[0].containers
    assert (vpt[0].get_xdata()[0], vpt[0].get_ydata()[0]) == pytest.approx((1000, 60))
    ((_, low), (_, high)) = vpt[2][0].get_segments()[0]
    assert (low, high) == pytest.approx((60 - 14.142135, 60 + 14.142135))
    assert (linear[0].get_xdata()[0], linear[0].get_ydata()[0]) == pytest.approx((10, 40))


def test_data_sets_and_colours_are_told_apart(tmp_path):
    for data in ("birds", "cars"):
        for count in range(1, 6):
            write_run(tmp_path / data / str(count), [0.5], method="vpt", dataset_name=data, num_virtual_tokens=count)
    groups = group_runs(find_runs([tmp_path]))
    assert list(groups)[0] == "vpt on birds (num_virtual_tokens=1)"
    _, axes = new_panels(1, list(groups))
    draw_tradeoff(groups, axes)
    looks = {(each[0].get_color(), each[0].get_marker()) for each in axes[0].containers}
    assert len(looks) == len(groups) == 10 and {color for color, _ in looks} <= set(COLORS)


def test_tradeoff_against_seconds(tmp_path):
    for name, seconds in (("a", 10.0), ("b", 30.0)):
        write_run(tmp_path / name, [0.5], method="vpt", seconds=seconds)
    write_run(tmp_path / "c", [0.4], method="linear")
    axes = panels(2)
    draw_tradeoff(group_runs(find_runs([tmp_path])), axes)
    assert [len(ax.containers) for ax in axes] == [2, 1]
    assert axes[1].containers[0][0].get_xdata()[0] == pytest.approx(20.0)


@pytest.mark.parametrize("kind", ["curves", "tradeoff"])
@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_command_writes_the_picture(folder, tmp_path, capsys, kind, ending):
    path = tmp_path / "pictures" / f"a.{ending}"
    assert main(["plot", str(folder), "--kind", kind, "--output_file", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path) and path.stat().st_size > 1000
    if ending == "png":
        values = Image.open(path).convert("L").getextrema()
        assert values[0] < 50 and values[1] == 255


def test_what_cannot_be_drawn_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for argv, message in (
        ([str(tmp_path / "missing")], "does not exist"),
        ([str(tmp_path / "empty")], "no finished run"),
        ([str(folder), "--output_file", "a.xyz"], "a.xyz"),
    ):
        assert main(["plot", *argv]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    (folder / "a" / "all_results.json").write_text("{")
    assert main(["plot", str(folder)]) == 2
    assert "all_results.json is not valid JSON" in capsys.readouterr().err


def test_any_metric_is_drawn(tmp_path):
    """Runs of a task whose metric is no share; the metric is named by the run's arguments, else by its results."""
    for seed, values in enumerate(([4.0, 2.0], [6.0, 2.5])):
        write_run(tmp_path / f"{seed}", values, test=1.5, method="vpt", seed=seed)
        for name in ("all_results.json", "trainer_state.json"):
            path = tmp_path / f"{seed}" / name
            text = path.read_text().replace("eval_accuracy", "eval_rmse").replace("test_accuracy", "test_rmse")
            path.write_text(text.replace('"trainable', '"eval_loss": 0.1, "eval_samples": 9, "trainable'))
    groups = group_runs(find_runs([tmp_path]))
    axes = panels(2)
    draw_curves(groups, axes)
    assert axes[1].get_ylabel() == "validation rmse"
    assert list(axes[1].get_lines()[0].get_ydata()) == pytest.approx([5, 2.25])
    (axis,) = panels(1)
    draw_tradeoff(groups, [axis])
    assert axis.get_ylabel() == "test rmse" and axis.containers[0][0].get_ydata()[0] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [("macro_f1", "macro_f1"), ("eval_macro_f1", "macro_f1"), ("loss", "accuracy"), (None, "accuracy")],
)
def test_the_metric_is_the_one_that_chose_the_weights(tmp_path, chosen, expected):
    write_run(tmp_path / "a", [0.5], method="vpt", **({"metric_for_best_model": chosen} if chosen else {}))
    path = tmp_path / "a" / "all_results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eval_macro_f1": 0.25, "eval_loss": 3.0}))
    (run,) = find_runs([tmp_path])
    assert run.metric == expected


def test_runs_of_different_metrics_are_not_mixed(folder, tmp_path, capsys):
    write_run(folder / "d", [0.1], method="full", seed=0)
    path = folder / "d" / "all_results.json"
    path.write_text(path.read_text().replace("eval_accuracy", "eval_mean_iou"))
    assert main(["plot", str(folder), "--output_file", str(tmp_path / "a.png")]) == 2
    assert "different metrics (accuracy, mean_iou)" in capsys.readouterr().err
    path.write_text('{"trainable_parameters": 3}')
    assert main(["plot", str(folder), "--output_file", str(tmp_path / "a.png")]) == 2
    assert "holds no validation metric" in capsys.readouterr().err
