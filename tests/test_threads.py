"""Forward passes in several threads on one model: each gives what it gives alone, bit for bit."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import images, randomize, tiny_vit
from transformers import Swinv2Config, Swinv2ForImageClassification

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.tuners.vpt.parameters import find_parameters


THREADS, PASSES = 4, 25
Make = Callable[..., VPTConfig]
KINDS: dict[str, Make] = {
    "deep": lambda **given: VPTConfig(num_virtual_tokens=3, **given),
    "shallow": lambda **given: VPTConfig(num_virtual_tokens=3, deep=False, **given),
    "partly_deep": lambda **given: VPTConfig(num_virtual_tokens=3, layers_to_transform=[0, 2], **given),
    "gated": lambda **given: GatedVPTConfig(num_virtual_tokens=3, gate_init=0.0, **given),
    "pooled": lambda **given: VPTConfig(num_virtual_tokens=3, pooling="image_prompt", **given),
    "token": lambda **given: VPTConfig(num_virtual_tokens=3, implementation="token", **given),
    "merged": lambda **given: VPTConfig(num_virtual_tokens=3, **given),
    "prepend_pixel": lambda **given: VPTConfig(num_virtual_tokens=2, prompt_location="prepend_pixel", **given),
    "pad": lambda **given: VPTConfig(num_virtual_tokens=2, prompt_location="pad", **given),
    "channel": lambda **given: VPTConfig(num_virtual_tokens=2, prompt_location="channel", **given),
}
# Prompts on the whole image take a batch of their own
MIXED = [name for name in KINDS if name not in ("pad", "channel")]
NAMES = [["a"], ["b", "a"], ["a", "__base__", "b"], ["__base__", "b", "a", "b", "a"]]
HAS_LABELS = any(field.name == "id2label" for field in fields(VPTConfig))
needs_labels = pytest.mark.skipif(not HAS_LABELS, reason="VPTConfig has no id2label: all heads have one size")


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Threads take turns so often that passes of tiny models meet."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def build(**adapters: VPTConfig) -> PeftModel:
    """A classifier with the named adapters, the first one active; no two adapters or heads are alike."""
    first, *others = adapters
    model = get_peft_model(tiny_vit(dtype=torch.float32), adapters[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, adapters[name])
    return randomize(model).eval()  # type: ignore[return-value]


def batches() -> list[torch.Tensor]:
    """One batch per thread, of as many images as `NAMES` has adapters for it."""
    return [images(len(names), torch.float32, seed=index) for index, names in enumerate(NAMES)]


def run(model: torch.nn.Module, batch: torch.Tensor, names: list[str] | None = None) -> torch.Tensor:
    given = {} if names is None else {"adapter_names": names}
    with torch.no_grad():
        return model(pixel_values=batch, **given).logits


def together(*jobs: Callable[[], None]) -> None:
    """Run all jobs at the same time, each in a thread of its own, and raise the first error."""
    barrier = threading.Barrier(len(jobs))

    def started(job: Callable[[], None]) -> None:
        barrier.wait(timeout=30)
        job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(started, job) for job in jobs]:
            done.result(timeout=120)


def count_wrong(model: torch.nn.Module, given: list[list[str] | None], passes: int = PASSES) -> dict[str, int]:
    """Passes in `THREADS` threads that differ from the same pass alone, and errors by their text."""
    inputs = batches()
    wanted = [run(model, batch, names) for batch, names in zip(inputs, given, strict=True)]
    found: list[str] = []

    def job(index: int) -> None:
        for _ in range(passes):
            try:
                if not torch.equal(run(model, inputs[index], given[index]), wanted[index]):
                    found.append("wrong")
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}"[:100])

    together(*[lambda index=index: job(index) for index in range(THREADS)])  # type: ignore[misc]
    for batch, names, expected in zip(inputs, given, wanted, strict=True):
        assert torch.equal(run(model, batch, names), expected), "the passes left something behind"
    return {text: found.count(text) for text in set(found)}


@pytest.mark.parametrize("kind", KINDS)
def test_one_active_adapter(kind: str):
    model = build(a=KINDS[kind]())
    if kind == "merged":
        model.merge_adapter(["a"])
    assert count_wrong(model, [None] * THREADS) == {}


@pytest.mark.parametrize("kind", MIXED)
def test_mixed_batches(kind: str):
    model = build(a=KINDS[kind](), b=KINDS[kind]())
    if kind == "merged":
        model.merge_adapter(["a", "b"])
    assert count_wrong(model, NAMES) == {}


def test_prompts_beside_plain_images_in_intercepted_attention():
    """An encoder without the attention interface: each thread has the interception of its own attention call."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 4, "num_labels": 7}
    config = Swinv2Config(depths=[2, 1], num_heads=[2, 4], initializer_range=0.2, **sizes)
    model = get_peft_model(Swinv2ForImageClassification(config).eval(), KINDS["deep"](), adapter_name="a")
    assert find_parameters(model).layers[0].spec.attention.uses_interface is False  # type: ignore[union-attr]
    randomize(model).eval()
    assert count_wrong(model, [None, ["__base__"] * 2, None, ["__base__"] * 5]) == {}


@pytest.mark.parametrize(("first", "second"), [("deep", "shallow"), ("gated", "gated"), ("token", "prepend_pixel")])
def test_mixed_batches_beside_plain_ones(first: str, second: str):
    """Two threads run the active adapter, two a mixed batch of both kinds."""
    model = build(a=KINDS[first](), b=KINDS[second]())
    assert count_wrong(model, [None, NAMES[1], None, NAMES[3]]) == {}


@needs_labels
@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_heads_of_unequal_sizes(kind: str):
    """Logits of the narrower head are padded with -inf in a mixed batch."""
    five = KINDS[kind](id2label={index: f"five_{index}" for index in range(5)})
    nine = KINDS[kind](id2label={index: f"nine_{index}" for index in range(9)})
    model = build(a=five, b=nine)
    widest = run(model, batches()[2], NAMES[2])
    assert widest.shape == (3, 9) and widest[0, 5:].isneginf().all() and widest[2].isfinite().all()
    assert count_wrong(model, NAMES) == {}
    assert count_wrong(model, [None, NAMES[1], None, NAMES[3]]) == {}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("mixed", [False, True], ids=["active", "mixed"])
def test_beside_a_pass_that_raises(kind: str, mixed: bool):
    """A pass that fails in the second block of one thread touches neither the others nor its own thread's next pass."""
    model = build(a=KINDS[kind](), b=KINDS[kind]())
    if kind == "merged":
        model.merge_adapter(["a", "b"])
    failing: set[int] = set()

    def fail(*args: object) -> None:
        if threading.get_ident() in failing:
            raise InterruptedError("planned")

    model.base_model.model.vit.layers[1].mlp.register_forward_hook(fail)
    inputs = batches()
    given = NAMES if mixed else [None] * THREADS
    wanted = [run(model, batch, names) for batch, names in zip(inputs, given, strict=True)]
    wrong: list[int] = []

    def job(index: int) -> None:
        for _ in range(PASSES):
            if index == THREADS - 1:
                failing.add(threading.get_ident())
                with pytest.raises(InterruptedError, match="planned"):
                    run(model, inputs[index], given[index])
                failing.clear()
            if not torch.equal(run(model, inputs[index], given[index]), wanted[index]):
                wrong.append(index)

    together(*[lambda index=index: job(index) for index in range(THREADS)])  # type: ignore[misc]
    assert wrong == []


def beside(
    model: PeftModel, change: Callable[[], None], given: list[list[str] | None], rounds: int = 12
) -> list[list[torch.Tensor]]:
    """Outputs of passes in three threads while `change` runs `rounds` times in a fourth."""
    inputs = batches()
    found: list[list[torch.Tensor]] = [[] for _ in given]
    finished = threading.Event()

    def passes(index: int) -> None:
        try:
            while not finished.is_set():
                found[index].append(run(model, inputs[index], given[index]))
        finally:
            finished.set()

    def changes() -> None:
        deadline = time.monotonic() + 30
        try:
            for _ in range(rounds):
                # Each change meets passes, also where it is quick
                before = [len(outputs) for outputs in found]
                change()
                while not finished.is_set() and min(len(o) - n for o, n in zip(found, before, strict=True)) < 2:
                    assert time.monotonic() < deadline, "passes wait for ever"
                    time.sleep(1e-4)
        finally:
            finished.set()

    together(changes, *[lambda index=index: passes(index) for index in range(len(given))])  # type: ignore[misc]
    assert all(len(outputs) >= rounds for outputs in found)
    return found


def assert_one_of(found: list[list[torch.Tensor]], allowed: dict[str, list[torch.Tensor]]) -> None:
    """Every output is one of the allowed ones for its thread's batch."""
    for index, outputs in enumerate(found):
        for output in outputs:
            assert any(torch.equal(output, of[index]) for of in allowed.values()), f"thread {index}"


def alone(model: PeftModel) -> list[torch.Tensor]:
    """Outputs of the batches with the adapters that are active."""
    return [run(model, batch) for batch in batches()[:3]]


PAIRS = [("deep", "shallow"), ("shallow", "deep"), ("deep", "deep"), ("token", "pooled"), ("prepend_pixel", "deep")]


@pytest.mark.parametrize(("first", "second"), [*PAIRS, ("gated", "gated")])
def test_switching_beside_passes(first: str, second: str):
    model = build(a=KINDS[first](), b=KINDS[second]())
    allowed = {}
    for name in ("b", "a"):
        model.set_adapter(name)
        allowed[name] = alone(model)
    assert not torch.equal(allowed["a"][0], allowed["b"][0])

    def change() -> None:
        model.set_adapter("b" if model.active_adapter == "a" else "a")

    assert_one_of(beside(model, change, [None] * 3, rounds=40), allowed)


@pytest.mark.parametrize("kind", ["deep", "shallow", "gated", "pooled", "token"])
def test_disabling_beside_passes(kind: str):
    model = build(a=KINDS[kind]())
    allowed = {"a": alone(model)}
    with model.disable_adapter():
        allowed["base"] = alone(model)
    expected = allowed["base"]

    def change() -> None:
        with model.disable_adapter():
            within = run(model, batches()[0])
        assert torch.equal(within, expected[0])

    assert_one_of(beside(model, change, [None] * 3, rounds=25), allowed)


@pytest.mark.parametrize("kind", ["deep", "shallow", "gated"])
@pytest.mark.parametrize("mixed", [False, True], ids=["active", "mixed"])
def test_adding_and_deleting_beside_passes(kind: str, mixed: bool):
    """What is not active, or in no image's name, changes nothing."""
    model = build(a=KINDS[kind](), b=KINDS[kind]())
    given: list[list[str] | None] = [*NAMES[:3]] if mixed else [None] * 3
    wanted = [run(model, batch, names) for batch, names in zip(batches(), given, strict=False)]

    def change() -> None:
        model.add_adapter("c", KINDS[kind]())
        model.delete_adapter("c")

    assert_one_of(beside(model, change, given, rounds=4), {"as before": wanted})
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize("kind", ["deep", "shallow", "gated"])
def test_deleting_an_adapter_that_passes_use(kind: str):
    """A pass keeps the adapter it started with, though it is deleted meanwhile.

    Deleted while it is active, PEFT itself fails in passes that begin before it has chosen another one.
    """
    model = build(a=KINDS[kind]())
    allowed = {"a": alone(model)}

    def change() -> None:
        model.add_adapter("c", KINDS[kind]())
        model.set_adapter("c")
        allowed[f"c{len(allowed)}"] = alone(model)
        model.set_adapter("a")
        model.delete_adapter("c")

    assert_one_of(beside(model, change, [None] * 3, rounds=4), allowed)
    assert len(allowed) == 5 and torch.equal(run(model, batches()[0]), allowed["a"][0])


def test_loading_beside_passes(tmp_path):
    saved = build(a=KINDS["deep"](), c=KINDS["shallow"]())
    saved.save_pretrained(tmp_path, selected_adapters=["c"])
    saved.set_adapter("c")
    model = build(a=KINDS["deep"]())
    allowed = {"a": alone(model), "c": alone(saved)}

    def change() -> None:
        model.load_adapter(tmp_path / "c", "c")
        model.set_adapter("c")
        model.set_adapter("a")
        model.delete_adapter("c")

    assert_one_of(beside(model, change, [None] * 3, rounds=4), allowed)


@needs_labels
def test_switching_between_heads_of_unequal_sizes_beside_passes():
    model = build(a=KINDS["deep"](id2label=dict(enumerate("vwxyz"))), b=KINDS["shallow"](id2label={0: "p", 1: "q"}))
    allowed = {}
    for name in ("b", "a"):
        model.set_adapter(name)
        allowed[name] = alone(model)
    assert [allowed[name][0].shape[1] for name in "ab"] == [5, 2]

    def change() -> None:
        model.set_adapter("b" if model.active_adapter == "a" else "a")

    assert_one_of(beside(model, change, [None] * 3, rounds=40), allowed)
