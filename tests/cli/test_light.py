"""What the command line shows without loading what trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vpt_peft import __version__
from vpt_peft.conversion import SOURCES
from vpt_peft.cost import OPTIMIZER_STATES


ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "peft", "datasets", "pandas", "matplotlib", "optuna", "sklearn", "numpy")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the command where heavy packages cannot be imported."""
    blocked = tmp_path_factory.mktemp("blocked")
    for name in HEAVY:
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")

    def do(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "vpt_peft", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"},
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return do


def test_version(run):
    assert run("--version") == f"vpt-peft {__version__}\n"


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("", ["train"]),
        ("train", ["--learning_rate 0.03", "--help-all"]),
        ("sweep", ["--sampler", "--learning_rate 0.03"]),
        ("compare", ["--num_trials", "--learning_rate 0.03"]),
        ("evaluate", ["--split", "--max_predict_samples"]),
        ("predict", ["--top_k"]),
        ("export", ["--opset"]),
        ("push", ["--private"]),
        ("plot", ["--kind"]),
        ("demo", ["--seed"]),
        ("app", ["--port"]),
        ("convert", SOURCES),
        ("cost", ["--bf16", *OPTIMIZER_STATES]),
    ],
)
def test_help_takes_no_library(run, command, flags):
    shown = run(*[command] * bool(command), "--help")
    assert "usage: vpt-peft" in shown and all(flag in shown for flag in flags)


def test_the_command_registers_before_it_runs(run):
    done = subprocess.run(
        [sys.executable, "-m", "vpt_peft", "export", "no/such-adapter", "out"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    # Nothing but the error: backends that PEFT imports are silent
    assert done.returncode == 2 and done.stderr.startswith("vpt-peft export: ") and done.stderr.count("\n") == 1
