"""Both methods are known to PEFT once the package is imported: whatever came first, however often, and to whom else."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from peft_fixtures import CONFIGS, images, logits, randomize, run_python, vit

from vpt_peft import GatedVPTConfig, GatedVPTModel, VPTConfig, VPTModel
from vpt_peft.registration import add_peft_type, register_method


METHODS = [("VPT", VPTConfig, VPTModel), ("GATED_PROMPT", GatedVPTConfig, GatedVPTModel)]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Folders `base` (a backbone) and `adapter` (deep prompts for it), and the logits of both together."""
    base = vit(torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, CONFIGS["deep"]())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    randomize(model, 1, trainable_only=True).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, images(dtype=torch.float32))
    torch.save(expected, tmp_path / "expected.pt")
    return tmp_path, expected


@pytest.mark.parametrize("name, config_cls, model_cls", METHODS)
def test_tables(name: str, config_cls: type, model_cls: type):
    member = PeftType[name]
    assert member.value == member.name == name == member
    assert list(PeftType).count(member) == 1
    assert PeftType(name) is member is getattr(PeftType, name)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is config_cls
    assert PEFT_TYPE_TO_TUNER_MAPPING[name] is model_cls
    assert PEFT_TYPE_TO_PREFIX_MAPPING[name] == model_cls.prefix == name.lower() + "_"
    assert get_peft_config({"peft_type": name, "task_type": None, "num_virtual_tokens": 7}).num_virtual_tokens == 7


@pytest.mark.parametrize("name, config_cls, model_cls", METHODS)
def test_again_is_harmless(name: str, config_cls: type, model_cls: type):
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    assert add_peft_type(name) is PeftType[name]
    register_method(name.lower(), config_cls, model_cls)
    assert before == (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING))


def test_members_of_peft_are_untouched():
    assert PeftType.LORA.value == "LORA" and PeftType("LORA") is PeftType.LORA
    assert len(PeftType.__members__) == len(list(PeftType)) == len({member.value for member in PeftType})
    with pytest.raises(ValueError):
        PeftType("NO_SUCH_METHOD")


@pytest.mark.parametrize("name", ["VPT", "GATED_PROMPT"])
def test_members_are_ordinary(name: str):
    member = PeftType[name]
    assert copy.deepcopy(member) is copy.copy(member) is pickle.loads(pickle.dumps(member)) is member
    assert json.loads(json.dumps({"type": member})) == {"type": name}
    assert str(member) == f"PeftType.{name}" and hash(member) == hash(PeftType(name))


def test_orders_of_import_and_reload(saved):
    """The package before peft, twice, and reloaded as a notebook does: the newest classes serve, one member each."""
    folder, _ = saved
    run_python(
        """
import importlib, sys
import vpt_peft, peft
import vpt_peft as again
assert again is vpt_peft
from peft.utils.peft_types import PeftType
members = list(PeftType)
first = vpt_peft.VPTConfig
importlib.reload(vpt_peft)
for name in ("registration", "tuners.vpt.config", "tuners.vpt.model", "tuners.vpt", "tuners.gated_vpt.config",
             "tuners.gated_vpt.model", "tuners.gated_vpt", "tuners"):
    importlib.reload(sys.modules["vpt_peft." + name])
importlib.reload(vpt_peft)
assert list(PeftType) == members, list(PeftType)
assert vpt_peft.VPTConfig is not first
assert type(peft.PeftConfig.from_pretrained(sys.argv[1] + "/adapter")) is vpt_peft.VPTConfig
import torch
from peft import get_peft_model
from peft_fixtures import vit, images, logits
model = get_peft_model(vit(), vpt_peft.VPTConfig(num_virtual_tokens=3))
assert isinstance(model.base_model, vpt_peft.VPTModel)
model.add_adapter("b", vpt_peft.VPTConfig(num_virtual_tokens=2))
assert logits(model, images()).isfinite().all()
""",
        str(folder),
    )


def test_without_import_and_with(saved):
    """Without the import line PEFT fails with the bare name; with it, later in the same process, everything loads."""
    folder, _ = saved
    run_python(
        """
import sys, warnings
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel
from transformers import AutoModelForImageClassification, ViTForImageClassification
base, adapter = sys.argv[1] + "/base", sys.argv[1] + "/adapter"
attempts = [
    lambda: PeftConfig.from_pretrained(adapter),
    lambda: PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), adapter),
    lambda: AutoPeftModel.from_pretrained(adapter),
    lambda: AutoModelForImageClassification.from_pretrained(adapter),
]
for index, attempt in enumerate(attempts):
    try:
        attempt()
    except KeyError as error:
        assert error.args == ("VPT",), (index, error)
    else:
        raise AssertionError(index)

import vpt_peft

assert isinstance(attempts[0](), vpt_peft.VPTConfig)
from peft_fixtures import LOADS_HEADS, images, logits
expected = torch.load(sys.argv[1] + "/expected.pt")
for attempt in attempts[1 : 4 if LOADS_HEADS else 3]:
    model = attempt().eval()
    # How products of one row are summed depends on the number of threads, which is another here
    assert torch.allclose(logits(model, images(dtype=torch.float32)), expected, rtol=0, atol=1e-6)
""",
        str(folder),
    )


@pytest.mark.parametrize("name", ["VPT", "GATED_PROMPT"])
def test_a_foreign_method_of_the_same_name(name: str):
    """A PEFT that ships a method of this name wins, and the message says so; PEFT stays as it was."""
    done = run_python(
        f"""
import sys, types
from dataclasses import dataclass
import peft
from peft import LoraConfig, LoraModel, mapping
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
member = str.__new__(PeftType, "{name}")
member._name_ = member._value_ = "{name}"
PeftType._member_map_["{name}"] = PeftType._value2member_map_["{name}"] = member
PeftType._member_names_.append("{name}")
type.__setattr__(PeftType, "{name}", member)

class Config(LoraConfig):
    pass
Config.__module__ = "peft.tuners.upstream.config"

class Model(LoraModel):
    prefix = "{name}".lower() + "_"
register_peft_method(name="{name}".lower(), config_cls=Config, model_cls=Model)
try:
    import vpt_peft
except ImportError as error:
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] is Config
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] is Model
    assert peft.get_peft_config({{"peft_type": "LORA", "r": 3}}).r == 3
    print(error)
else:
    sys.exit("imported")
"""
    )
    assert name in done.stdout and "peft.tuners.upstream.config" in done.stdout
    assert "vpt_peft" in done.stdout and "PEFT" in done.stdout


def test_pickles_open_in_a_fresh_process(tmp_path: Path):
    """Unpickling a configuration or a whole model imports what it needs by itself; the bare member needs the import."""
    model = randomize(get_peft_model(vit(), CONFIGS["gated"]()), 1, trainable_only=True).eval()
    (tmp_path / "config.pkl").write_bytes(pickle.dumps([VPTConfig(num_virtual_tokens=7), GatedVPTConfig(gate_init=2)]))
    (tmp_path / "member.pkl").write_bytes(pickle.dumps(PeftType["VPT"]))
    torch.save({"model": model, "logits": logits(model, images())}, tmp_path / "model.pt")
    run_python(
        """
import pickle, sys
from pathlib import Path
folder = Path(sys.argv[1])
plain, gated = pickle.loads((folder / "config.pkl").read_bytes())
assert "vpt_peft" in sys.modules
assert (plain.num_virtual_tokens, plain.peft_type.value) == (7, "VPT")
assert (gated.gate_init, gated.peft_type.value) == (2, "GATED_PROMPT")
from peft.utils.peft_types import PeftType
assert plain.peft_type is PeftType.VPT is pickle.loads((folder / "member.pkl").read_bytes())
import torch
held = torch.load(folder / "model.pt", weights_only=False)
from peft_fixtures import images, logits
# Other numbers of threads round otherwise
torch.testing.assert_close(logits(held["model"], images()), held["logits"], rtol=0, atol=1e-12)
""",
        str(tmp_path),
    )


def test_config_classes_from_peft(tmp_path: Path):
    """PEFT's general entry points give the right class, whichever class they are called on."""
    GatedVPTConfig(num_virtual_tokens=9).save_pretrained(tmp_path)
    for entry in (PeftConfig, VPTConfig, GatedVPTConfig, peft.LoraConfig):
        loaded = entry.from_pretrained(tmp_path)
        assert type(loaded) is GatedVPTConfig and loaded.num_virtual_tokens == 9
    assert type(PeftConfig.from_peft_type(peft_type="VPT", num_virtual_tokens=4)) is VPTConfig
