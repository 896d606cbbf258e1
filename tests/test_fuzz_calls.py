"""Sequences of PEFT calls, held against a plain model of which adapter is active and what each of them gives."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_fixtures import cases, make, output
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from vpt_peft import VPTConfig


CONFIGS: dict[str, dict[str, Any]] = {
    "deep": {"num_virtual_tokens": 3},
    "shallow": {"num_virtual_tokens": 2, "deep": False},
    "pooled": {"num_virtual_tokens": 2, "pooling": "image_prompt"},
    "partly deep": {"num_virtual_tokens": 2, "layers_to_transform": [1]},
    "other labels": {"num_virtual_tokens": 1, "id2label": {i: f"label {i}" for i in range(3)}},
    "no head": {"num_virtual_tokens": 2, "modules_to_save": []},
    "biases": {"num_virtual_tokens": 1, "bias": ["mlp"]},
}
NAMES = st.sampled_from(["birds", "cars", "flowers"])
KINDS = st.sampled_from(sorted(CONFIGS))
# Kinds that have keys and values to merge
MERGED = ("deep", "pooled", "other labels", "no head", "biases")
with torch.no_grad():
    BASE = output(make("vit"))


class Calls(RuleBasedStateMachine):
    """Adapters by name: of which kind each is, its values, and what the model gives with it alone."""

    @initialize(kind=KINDS)
    def attach(self, kind: str) -> None:
        self.model = get_peft_model(make("vit"), VPTConfig(**CONFIGS[kind]), adapter_name="birds").eval()
        self.kinds, self.outputs = {"birds": kind}, {}
        self.active: str | None = "birds"
        self.merged: set[str] = set()
        self.note("birds")

    def note(self, name: str) -> None:
        """Work out what an adapter gives from its values, in a model of its own."""
        values = {
            key: value.clone() for key, value in get_peft_model_state_dict(self.model, adapter_name=name).items()
        }
        alone = get_peft_model(make("vit"), VPTConfig(**CONFIGS[self.kinds[name]])).eval()
        set_peft_model_state_dict(alone, values)
        with torch.no_grad():
            self.outputs[name] = output(alone)

    @rule(name=NAMES, kind=KINDS)
    def add(self, name: str, kind: str) -> None:
        if name in self.kinds:
            with pytest.raises(ValueError, match="already exists"):
                self.model.add_adapter(name, VPTConfig(**CONFIGS[kind]))
            return
        self.model.add_adapter(name, VPTConfig(**CONFIGS[kind]))
        self.model.eval()
        self.kinds[name] = kind
        self.note(name)

    @rule(name=NAMES)
    def set(self, name: str) -> None:
        if name not in self.kinds:
            with pytest.raises(ValueError, match="not found"):
                self.model.set_adapter(name)
            return
        self.model.set_adapter(name)
        self.active = name

    @rule(name=NAMES)
    @precondition(lambda self: len(self.kinds) > 1)  # PEFT itself cannot add one again where the last had a head
    def delete(self, name: str) -> None:
        if name not in self.kinds:
            with pytest.raises(ValueError, match="does not exist"):
                self.model.delete_adapter(name)
            return
        if name in self.merged:
            with pytest.raises(ValueError, match="while they are merged"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        del self.kinds[name], self.outputs[name]
        if name == self.active:
            self.active = next(iter(self.kinds), None)

    @rule()
    @precondition(lambda self: len(self.kinds) > 0)
    def disable(self) -> None:
        with self.model.disable_adapter(), torch.no_grad():
            assert torch.equal(output(self.model), BASE)

    @rule()
    @precondition(lambda self: self.active is not None)
    def merge(self) -> None:
        if self.active in self.merged or self.kinds[self.active] not in MERGED:
            with pytest.raises(ValueError, match="merged already|no deep prompts"):
                self.model.merge_adapter()
            return
        self.model.merge_adapter()
        self.merged.add(self.active)

    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged.clear()

    @rule()
    @precondition(lambda self: self.active is not None and not self.merged)
    def train(self) -> None:
        self.model.set_adapter(self.active)
        self.model.train()
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        assert trained and all(f".{self.active}." in name for name in trained)
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        output(self.model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        self.model.eval()
        self.note(self.active)

    @rule(name=NAMES, other=NAMES)
    @precondition(lambda self: len(self.kinds) > 0)
    def save_and_load(self, name: str, other: str) -> None:
        name = name if name in self.kinds else next(iter(self.kinds))
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            place = Path(folder, name)
            if other in self.kinds and self.kinds[other] != self.kinds[name]:
                with pytest.raises(ValueError, match="another configuration|does not fit"):
                    self.model.load_adapter(place, other)
                return
            if other in self.merged:
                return
            fresh = PeftModel.from_pretrained(make("vit"), place).eval()
            with torch.no_grad():
                assert torch.equal(output(fresh), self.outputs[name])
            self.model.load_adapter(place, other)
        self.kinds[other], self.outputs[other] = self.kinds[name], self.outputs[name]

    @rule(names=st.lists(st.none() | NAMES, min_size=2, max_size=2))
    @precondition(lambda self: len(self.kinds) > 0 and not self.merged)
    def mix(self, names: list[str | None]) -> None:
        chosen = [name if name in self.kinds else "__base__" for name in names]
        with torch.no_grad():
            rows = output(self.model, adapter_names=chosen)
        for row, name in enumerate(chosen):
            expected = BASE[row] if name == "__base__" else self.outputs[name][row]
            # Scores of fewer classes are filled up
            assert torch.allclose(rows[row, : len(expected)], expected, rtol=1e-9, atol=1e-9)

    @invariant()
    def output_is_of_the_active_adapter(self) -> None:
        if not hasattr(self, "model"):
            return
        assert list(self.model.peft_config) == list(self.kinds)
        with torch.no_grad():
            found = output(self.model)
        expected = BASE if self.active is None else self.outputs[self.active]
        if self.active in self.merged:
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(found, expected)
        assert self.model.get_base_model().config.num_labels == found.shape[1]

    @invariant()
    def only_the_active_adapter_trains(self) -> None:
        for name, parameter in self.model.named_parameters() if hasattr(self, "model") else ():
            assert not parameter.requires_grad or f".{self.active}." in name, name


class TestCalls(Calls.TestCase):
    settings = cases(20, stateful_step_count=12, report_multiple_bugs=False)

    def runTest(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().runTest()
