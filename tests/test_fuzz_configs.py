"""Any configuration on any model is refused clearly, or trains, saves, loads and goes without a trace."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
from fuzz_fixtures import MAKERS, cases, configurations, make, output
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft_fixtures import hook_count

from vpt_peft import EncoderError
from vpt_peft.tuners.vpt.parameters import find_parameters


BASES = {kind: make(kind) for kind in MAKERS}
with torch.no_grad():
    EXPECTED = {kind: output(model) for kind, model in BASES.items()}


def is_clear(error: Exception, fields: dict[str, Any]) -> bool:
    """Whether the message names a field that was given, or one that those stand for."""
    named = {*fields, "prompts", "attention_temperature", "num_gates", "pooling", "projection"}
    return any(name in str(error) for name in named)


@given(kind=st.sampled_from(sorted(MAKERS)), drawn=configurations())
@cases(70)
def test_configurations(kind: str, drawn: tuple[type, dict[str, Any]]):
    cls, fields = drawn
    base = BASES[kind]
    names, hooks = list(base.state_dict()), hook_count(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(base, cls(**fields))
        except (EncoderError, ValueError) as error:
            assert is_clear(error, fields), (fields, error)
            model = None
        try:
            if model is not None:
                check(kind, model)
        finally:
            if model is not None and find_parameters(model) is not None:
                model.unload()
    base.requires_grad_(True).eval()
    assert list(base.state_dict()) == names and hook_count(base) == hooks and find_parameters(base) is None
    with torch.no_grad():
        assert torch.equal(output(base), EXPECTED[kind])


def check(kind: str, model: PeftModel) -> None:
    """A step changes values, a saved adapter gives the same outputs in a fresh model, and the base shines through."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    output(model).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    optimizer.step()
    assert any(not torch.equal(p, was) for p, was in zip(trained, before, strict=True))
    model.eval()
    with torch.no_grad():
        expected = output(model)
        assert expected.isfinite().all()
        with model.disable_adapter():
            assert torch.equal(output(model), EXPECTED[kind])
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(make(kind), folder).eval()
            # The last bit depends on where the loader put the weights
            assert torch.allclose(output(loaded), expected, rtol=0, atol=1e-13)
        heads = find_parameters(model).heads["default"]  # type: ignore[union-attr]
    if heads:
        # The trained head would stay in the model
        model.delete_adapter("default")
