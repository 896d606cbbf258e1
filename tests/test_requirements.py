"""What is installed against what the package needs."""

from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from vpt_peft import requirements
from vpt_peft.cli.doctor import EXTRAS, report, run
from vpt_peft.cli.main import main


NEEDS = [
    "torch>=2.6",
    "transformers>=5.9",
    'only-there>=1; sys_platform == "nowhere"',
    'pandas>=2; extra == "train"',
    'vpt_peft[train]; extra == "sweep"',
    'optuna>=4; extra == "sweep"',
]


@pytest.fixture
def packages(monkeypatch):
    """The versions that are installed; a test changes them."""
    found = {"torch": "2.7.0", "transformers": "5.10.0.dev0", "pandas": "2.1", "optuna": "4.0"}

    def version(name):
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(requirements, "requires", lambda name: NEEDS)
    monkeypatch.setattr(requirements, "version", version)
    return found


def names(extra=""):
    return [each.name for each in requirements.needed(extra)]


def test_extras_hold_extras(packages):
    assert names() == ["torch", "transformers"]
    assert names("train") == ["pandas"] and names("sweep") == ["pandas", "optuna"] and names("none") == []


def test_versions_out_of_range_are_all_named(packages):
    requirements.check_versions()
    packages["transformers"] = "4.49.0"
    del packages["torch"]
    with pytest.raises(ImportError) as error:
        requirements.check_versions()
    assert str(error.value) == (
        "vpt_peft needs torch>=2.6, transformers>=5.9, but found torch missing, transformers 4.49.0: "
        "pip install -U 'torch>=2.6' 'transformers>=5.9'"
    )


def test_a_command_says_it_in_one_line(packages, capsys):
    packages["transformers"] = "4.49.0"
    assert main(["cost", "--batch_size", "1"]) == 2
    assert capsys.readouterr().err.startswith("vpt-peft cost: vpt_peft needs transformers>=5.9")


def test_a_tree_that_is_not_installed_needs_nothing(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "requires", missing)
    monkeypatch.setattr(requirements, "metadata", missing)
    requirements.check_versions()
    assert requirements.needed("train") == requirements.known_extras() == []


def test_the_doctor_names_what_is_missing_for_what(packages, monkeypatch, capsys):
    monkeypatch.setattr("vpt_peft.cli.doctor.known_extras", lambda: ["train", "sweep"])
    del packages["optuna"]
    packages["transformers"] = "4.49.0"
    lines = dict(report())
    assert lines["transformers"] == "4.49.0, needs >=5.9" and lines["torch"] == "2.7.0"
    assert lines["train, evaluate, predict, push"] == "ok"
    assert lines["sweep, compare"] == "needs optuna>=4: pip install 'vpt_peft[sweep]'"
    assert "install it again" in lines["export"]
    assert "float32" in lines["precision on cpu"] and "math" in lines["attention kernels on cpu"]
    assert run([]) == 1
    shown = capsys.readouterr().out
    assert "sweep, compare:  " in shown and all(f"\n{name}:" in shown for name in EXTRAS)
    packages["transformers"] = "5.9"
    assert run([]) == 0


def test_every_extra_of_the_doctor_exists():
    config = ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    assert set(EXTRAS.values()) <= set(config["options.extras_require"])


def test_editable_installs_are_by_path():
    """With `package_dir` written out setuptools writes a .pth file, which finds the package beside a clone of its name."""
    config = ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    assert config["options"]["package_dir"].split() == ["=", "."]
