"""What holds without being asked for: no network, no code of others, private folders, known licences."""

from __future__ import annotations

import configparser
import re
import socket
import stat
from pathlib import Path

import pytest
from peft_fixtures import ROOT, run_python

from vpt_peft.files import written_beside


SOURCES = sorted((ROOT / "vpt_peft").rglob("*.py"))


def test_no_network_at_import():
    """All modules, with sockets that refuse to connect; attaching and saving too."""
    code = """
import importlib, pkgutil, socket, sys, tempfile
def refuse(*args, **kwargs):
    raise AssertionError(f"the network was asked for: {args}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import vpt_peft
for found in pkgutil.walk_packages(vpt_peft.__path__, "vpt_peft."):
    if not found.name.startswith(("vpt_peft.__main__", "vpt_peft.app")):
        importlib.import_module(found.name)
from peft import PeftModel, get_peft_model
from peft_fixtures import CONFIGS, vit
with tempfile.TemporaryDirectory() as folder:
    get_peft_model(vit(), CONFIGS["deep"]()).save_pretrained(folder)
    PeftModel.from_pretrained(vit(), folder)
print("done")
"""
    assert run_python(code).stdout.strip().endswith("done")


def test_no_network_in_tests():
    with pytest.raises(OSError, match="tests use no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(OSError, match="tests use no network"):
        socket.getaddrinfo("huggingface.co", 443)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


@pytest.mark.parametrize("words", ["trust_remote_code", "0.0.0.0", "mktemp(", "weights_only=False", "pickle.load"])
def test_words_that_no_module_holds(words: str):
    assert len(SOURCES) > 100
    assert not [path for path in SOURCES if words in path.read_text(encoding="utf-8")]


def test_scratch_folders_are_private(tmp_path: Path):
    with written_beside(tmp_path / "out") as scratch:
        assert stat.S_IMODE(scratch.stat().st_mode) == 0o700


def test_every_dependency_has_its_licence_listed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    named = {re.split(r"[<>=\[;, ]", line.strip())[0] for text in lines for line in text.strip().splitlines()}
    rows = re.findall(r"^\| ([\w.-]+) \| .+? \| (.+?) \|$", (ROOT / "DEPENDENCIES.md").read_text(), re.M)
    listed = dict(row for row in rows if row[0] != "package")
    assert set(listed) == named - {"vpt_peft"}
    assert not [
        name for name, licence in listed.items() if re.search(r"\b(A|L)?GPL|unknown|proprietary", licence, re.I)
    ]


def test_what_the_package_needs_has_bounds():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for line in setup["options"]["install_requires"].strip().splitlines():
        assert ">=" in line, line
        assert "<" in line or line.startswith("packaging"), line
