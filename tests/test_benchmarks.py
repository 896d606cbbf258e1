"""The benchmark on a tiny model: it writes all its files, its reference computes what it refers to, its sums are right."""

from __future__ import annotations

import json
import math
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_layer_status

from benchmarks import adapters, overhead
from benchmarks.adapters import AdaptersArguments
from benchmarks.cost import CostArguments, main, measure
from benchmarks.measure import Runner, Samples, added_memory, interleave
from benchmarks.report import compare, make_row, summarize
from benchmarks.subjects import FLOOR, METHODS, make_backbone, make_subject, make_subjects


CPU = torch.device("cpu")


def numbers(value: Any) -> list[float]:
    """All numbers in nested lists and dictionaries."""
    if isinstance(value, dict):
        return [number for child in value.values() for number in numbers(child)]
    if isinstance(value, list):
        return [number for child in value for number in numbers(child)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def runner(method: str, prompts: int | None = None, batch: int = 2) -> Runner:
    backbone, spec = make_backbone("vit_test", torch.float32, CPU)
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Runner(make_subject(backbone, spec, method, prompts), images, compiled=False)


def test_a_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "vit_test", "--prompts", "5", "2", "--batch_size", "2", "--rounds", "1"]
    assert main([*flags, "--output_dir", str(tmp_path)]) == 0
    stem = "cpu_vit_test_float32_eager_batch2"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.{kind}" for kind in ("json", "md", "png")}
    results = json.loads((tmp_path / f"{stem}.json").read_text())
    page = (tmp_path / f"{stem}.md").read_text()
    assert capsys.readouterr().out == page + "\n"
    assert results["left_out"] == {}
    found = numbers(results["rows"]) + numbers(results["comparisons"])
    assert all(math.isfinite(number) and number >= 0 for number in found)
    rows = {(row["method"], row["prompts"]): row for row in results["rows"]}
    prompted = {name for name, method in METHODS.items() if method.has_prompts}
    assert set(rows) == {(name, p) for name in prompted for p in (2, 5)} | {(n, None) for n in set(METHODS) - prompted}
    for (name, _), row in rows.items():
        assert row["inference"] is not None
        assert (row["step"] is not None) == (row["added_bytes"] is not None) == METHODS[name].trains
    assert rows[FLOOR, None]["memory"] == 1.0
    assert page.count("\n| ") >= len(rows) and re.search(r"VPT-deep, keys/values +\| +5 \| ", page)
    assert len(results["comparisons"]) == 4
    assert (tmp_path / f"{stem}.png").read_bytes()[1:4] == b"PNG"
    for text in (page, json.dumps(results)):
        assert str(tmp_path) not in text and str(Path.home()) not in text
        assert socket.gethostname() not in text or len(socket.gethostname()) < 4


def test_bfloat16() -> None:
    results = measure(
        CostArguments(methods=["deep_kv", "gated", "gated_loop", "lora"], prompts=[3], batch_size=2, rounds=1),
        "vit_test", "bfloat16",
    )  # fmt: skip
    assert results["left_out"] == {} and len(results["rows"]) == 5


def test_the_plain_loop_computes_gated_prompts() -> None:
    loop, ours = runner("gated_loop", 4), runner("gated", 4)
    values = dict(ours.subject.model.named_parameters())

    def take(part: str) -> list[torch.Tensor]:
        return [p for name, p in values.items() if f"gated_prompt_{part}." in name]

    plain: Any = loop.subject.model
    with torch.no_grad():
        plain.prompts.copy_(take("prompts")[0])
        plain.head.load_state_dict({n.rsplit(".", 1)[-1]: p for n, p in values.items() if "modules_to_save" in n})
        for index, (gate, temperature) in enumerate(zip([*take("gates"), None], take("temperatures"), strict=True)):
            temperature.fill_(0.7 + 0.4 * index)
            plain.temperatures[index] = temperature.item()
            if gate is not None:
                gate.fill_(0.3)
                plain.gates[index] = 0.3
    assert len(plain.gates) == 1 and len(plain.temperatures) == 2
    for each in (loop, ours):
        each.subject.model.train()
    assert torch.allclose(loop.logits(), ours.logits(), atol=1e-6)
    loop.logits().square().sum().backward()
    ours.logits().square().sum().backward()
    assert torch.allclose(plain.prompts.grad[0], take("prompts")[0].grad, rtol=1e-3, atol=1e-5)
    assert torch.allclose(plain.temperatures.grad, torch.cat([t.grad for t in take("temperatures")]), rtol=1e-3)


def test_subjects_share_weights_and_steps_leave_them() -> None:
    backbone, spec = make_backbone("vit_test", torch.float32, CPU)
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    subjects = make_subjects(backbone, spec, list(METHODS), [3])
    assert subjects[0].method == FLOOR and len(subjects) == len(METHODS)
    shared = {p.data_ptr() for p in backbone.parameters()}
    for subject in subjects:
        own = sum(p.numel() for p in subject.model.parameters() if p.data_ptr() not in shared)
        assert own <= 3 * 2 * 32 + 33 * 100 + 4 * 8 * 2 * 32 + 10
        if subject.trains:
            Runner(subject, torch.randn(2, 3, 32, 32), compiled=False).step()
    assert all(torch.equal(p, before[name]) for name, p in backbone.named_parameters())


def test_the_floor_goes_down_to_the_first_block() -> None:
    floor = runner(FLOOR)
    names = [n for n, p in floor.subject.model.named_parameters() if p.requires_grad]
    assert sorted(n.rsplit(".", 1)[-1] for n in names) == ["bias", "cls_token", "weight"]
    floor.logits().sum().backward()
    (token,) = [p for n, p in floor.subject.model.named_parameters() if n.endswith("cls_token")]
    assert token.grad is not None and token.grad.abs().sum() > 0


def test_memory_repeats_to_the_byte_and_grows_with_prompts() -> None:
    found = {}
    for prompts in (2, 40):
        subject = runner("deep_token", prompts, batch=4)
        subject.step()
        found[prompts] = added_memory(subject)
        assert found[prompts] == added_memory(subject)
    assert found[40] > 1.5 * found[2] > 0


def test_interleaving_pairs_with_the_floor_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    runners = [runner(FLOOR), runner("linear"), runner("bias"), runner("deep_merged", 2), runner("full")]

    def note(self: Runner) -> None:
        order.append(self.subject.method)

    ticks = iter(float(t) for t in range(1000))
    monkeypatch.setattr(Runner, "step", note)
    monkeypatch.setattr("benchmarks.measure.seconds", lambda call, device: (call(), next(ticks))[1])
    samples = interleave(runners, rounds=2, training=True)
    assert order == [FLOOR, "linear", "bias", FLOOR, "full", FLOOR, FLOOR, "full", "bias", FLOOR, "linear", FLOOR]
    assert "deep_merged_2" not in samples
    # Ticks count the runs: 0 floor, 1 linear, 2 bias, 3 floor, 4 full, 5 floor, ...
    assert samples["linear"] == Samples([1.0, 10.0], [1.5, 10.0])
    assert samples["full"] == Samples([4.0, 7.0], [4.0, 7.5])


def test_summaries() -> None:
    ratio = summarize([1.0, 5.0, 2.0, 4.0, 3.0])
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 3.0, 4.0)
    training = {"deep_token_3": Samples([4.0, 6.0], [2.0, 2.0]), "deep_kv_3": Samples([2.0, 2.0], [2.0, 2.0])}
    row = make_row("deep_token_3", "deep_token", 3, 7, training, {}, {"deep_token_3": 30, FLOOR: 20})
    assert row.step is not None and row.step.median == 2.5 and row.step_seconds == 5.0
    assert row.memory == 1.5 and row.inference is None
    (found,) = compare(training, [3, 4])
    assert found["step"].median == 2.5 and found["against"] == "deep_kv"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": ["vit_huge"]}, "model=.*vit_huge.* must name one or more of vit_tiny"),
        ({"methods": []}, "methods=.* must name one or more"),
        ({"dtype": ["int8"]}, "dtype=.*int8"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"prompts": [0]}, "prompts=.*must be numbers of at least 1"),
    ],
)
def test_bad_flags(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostArguments(**given)


def test_many_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "vit_test", "--adapters", "4", "--prompts", "2", "--tasks", "3", "--batch_size", "5"]
    assert adapters.main([*flags, "--rounds", "2", "--output_dir", str(tmp_path)]) == 0
    page, results = (tmp_path / f"cpu_vit_test_adapters4.{kind}" for kind in ("md", "json"))
    assert page.read_text() == capsys.readouterr().out and str(tmp_path) not in page.read_text()
    found = json.loads(results.read_text())
    assert found["own_bytes"] == 4 * (2 * 2 * 32 + 33 * 100)
    assert all(found[name]["median"] > 0 for name in ("loading_first", "loading_last", "switching"))
    assert [batch["prompts"] for batch in found["batches"]] == [[2, 2, 2], [7, 13, 20]]
    assert [batch["one"] for batch in found["batches"]] == [2, 20]
    assert all(batch["ratio"]["median"] > 0 for batch in found["batches"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "vit_huge"}, "model='vit_huge' must be one of vit_tiny"),
        ({"adapters": 0}, "adapters=0 must be at least 1"),
        ({"tasks": 9, "batch_size": 8}, "tasks=9 must be at most adapters=1000 and batch_size=8"),
    ],
)
def test_bad_flags_of_many_adapters(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptersArguments(**given)


def test_overhead_relates_each_method_to_the_plain_model_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain model slows down steadily and every method takes twice as long, so drift must cancel."""
    calls: list[str] = []
    clock = iter(range(1000))

    def fake(call: Any, device: torch.device) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "__call__", lambda self, **_: calls.append(type(self).__name__))
            call()
        return (1 if calls[-1] == "ViTModel" else 2) * (100.0 + next(clock))

    monkeypatch.setattr(overhead, "seconds", fake)
    found = overhead.measure(overhead.OverheadArguments(pairs=4, passes=3))
    assert list(found) == ["LoRA r=8", "VPT-deep", "VPT-deep, merged", "gated prompts"]
    for taken, ratio in found.values():
        assert (ratio.low, ratio.median, ratio.high) == pytest.approx((2, 2, 2))
        assert taken.median > 2 * 1e3 * 100 / 3
    # 5 models warm up; 4 rounds of 4 methods between 5 timings of the plain one
    assert len(calls) == 3 * (5 + 4 * 9) and calls.count("ViTModel") == 3 * (1 + 4 * 5)


def test_overhead_prints_quartiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--pairs", "2", "--passes", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 5
    for row in rows[1:]:
        _, taken, ratio, quartiles = (cell.strip() for cell in row.strip("|").split("|"))
        low, high = map(float, quartiles.split(" to "))
        assert float(taken) > 0 and low <= float(ratio) <= high
    with pytest.raises(ValueError, match="pairs=0 must be at least 1"):
        overhead.OverheadArguments(pairs=0)


def test_overhead_measures_what_it_says() -> None:
    model = overhead.make_model()
    output = model(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state
    assert output.shape == (1, 17, 48) and len(model.layers) == 12 and not model.training
    merged: Any = overhead.METHODS["VPT-deep, merged"](model)
    blocks = [status for status in get_layer_status(merged) if ".layers." in status.name]
    assert [status.merged_adapters for status in blocks] == [["default"]] * 12
