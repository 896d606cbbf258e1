"""What is said before an adapter goes to the Hub."""

import json
import logging

import pytest

from vpt_peft import hub
from vpt_peft.embedded import embedded_path


@pytest.mark.parametrize("file", ["adapter_config.json", "vpt_peft_baseline.json"])
@pytest.mark.parametrize(
    ("backbone", "warned"),
    [("google/vit", False), (str(embedded_path("embedded")), False), ("/data/my-vit", True), ("local", True)],
)
def test_a_backbone_of_this_machine_is_warned_of(tmp_path, monkeypatch, caplog, file, backbone, warned):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    (tmp_path / file).write_text(json.dumps({"base_model_name_or_path": backbone}))

    class Refused(Exception):
        pass

    def refuse(**kwargs):
        raise Refused

    monkeypatch.setattr(hub, "HfApi", refuse)
    with caplog.at_level(logging.WARNING), pytest.raises(Refused):
        hub.push_adapter(tmp_path, "user/name")
    assert (f"{file} and the card name the backbone by a path of this machine, {backbone!r}" in caplog.text) == warned
    assert bool(caplog.records) == warned
