"""Files appear whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from vpt_peft.files import write_json, written_beside


def test_weights_move_before_what_describes_them(tmp_path, monkeypatch):
    moved, replace = [], os.replace

    def note(source, target):
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr("vpt_peft.files.os.replace", note)
    with written_beside(tmp_path / "out") as folder:
        for name in ("a.json", "b.onnx", "c.safetensors", "b.onnx.data", "README.md"):
            (folder / name).write_text(name)
    assert sorted(moved[:3]) == ["README.md", "b.onnx.data", "c.safetensors"] and moved[3:] == ["a.json", "b.onnx"]
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {name: name for name in moved}


@pytest.mark.parametrize("others", [False, True])
def test_folders_made_for_nothing_are_removed(tmp_path, others):
    with pytest.raises(OSError, match="no space"), written_beside(tmp_path / "deep" / "er") as folder:
        (folder / "weights.safetensors").write_text("half")
        if others:
            (tmp_path / "deep" / "mine.txt").write_text("kept")
        raise OSError("no space")
    assert [path.name for path in tmp_path.rglob("*")] == (["deep", "mine.txt"] if others else [])


def test_json_is_whole_or_as_before(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1
