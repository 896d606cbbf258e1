"""Kills training runs at random moments and checks what becomes of them: `python -m benchmarks.kills --help`.

Each run is killed by SIGKILL once or several times, at a random time or at a random write to its folders, and started again
by the same command until it ends. It has to end with the bytes of a run that nobody killed: weights, configuration,
metrics, and no file more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vpt_peft.cli.main import main as vpt_peft
from vpt_peft.methods import METHODS
from vpt_peft.reporting import markdown_table
from vpt_peft.training import train as _loaded_once  # noqa: F401


_WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
# What a clock says; the training loss is the Trainer's mean over the steps since the last start
_VARIES = ("runtime", "per_second", "train_loss")
_MOST_KILLS = 3


@dataclass
class KillArguments:
    """How many runs are killed, and where the results go."""

    kills: int = field(default=200, metadata={"help": "Kills in all, over all methods and tasks."})
    seed: int = field(default=0, metadata={"help": "Seed of the moments."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the results."})


@dataclass
class Count:
    """What became of the runs of one method.

    Args:
        runs: those that were killed at least once.
        kills: how often.
        equal: runs that ended with the bytes of the run that nobody killed.
        wrong: the others, with what differed.
    """

    runs: int = 0
    kills: int = 0
    equal: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody killed: what it left, how long it took, how often it wrote."""

    files: dict[str, str]
    seconds: float
    writes: int


def make_backbone(folder: Path) -> None:
    """Save a random ViT of two narrow blocks with its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


def make_masks(folder: Path) -> None:
    """Write a data set of grey pictures with a dark and a bright square, and their masks."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            pixels, mask = np.full((24, 32, 3), 128, np.uint8), np.zeros((24, 32), np.uint8)
            for label in (1, 2):
                x, y = int(draws.integers(0, 4)) + 16 * (label - 1), int(draws.integers(0, 12))
                pixels[y : y + 12, x : x + 12] = 255 * (label - 1)
                mask[y : y + 12, x : x + 12] = label
            Image.fromarray(pixels).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{number}.png")
    labels = dict(enumerate(("ground", "dark", "bright")))
    (folder / "id2label.json").write_text(json.dumps(labels), encoding="utf-8")


def commands(place: Path) -> dict[str, list[str]]:
    """Return by name the arguments of a short run, but for its folders."""
    shared = [
        *("--model_name_or_path", str(place / "vit"), "--cache_dir", str(place / "cache"), "--disable_tqdm", "True"),
        *("--num_train_epochs", "3", "--resume_from_checkpoint", "auto"),
    ]
    digits = [
        *("--dataset_name", "digits", "--max_train_samples", "64", "--max_eval_samples", "50"),
        *("--max_predict_samples", "50", "--per_device_train_batch_size", "32"),
    ]
    masks = [
        *("--task", "semantic-segmentation", "--dataset_name", str(place / "masks")),
        *("--per_device_train_batch_size", "6", "--per_device_eval_batch_size", "4", "--learning_rate", "3e-3"),
    ]
    runs = {name: [*shared, *digits, "--method", name] for name in METHODS}
    # Steps, so that there is something to resume
    runs["linear"] += ["--solver", "optimizer"]
    # A decoder has no room for what these put around a classifier
    others = [name for name in METHODS if name not in ("mlp", "sidetune")]
    return runs | {f"{name}, masks": [*shared, *masks, "--method", name] for name in others}


def is_write(event: str, args: tuple[Any, ...]) -> bool:
    """Whether an event of Python's audit changes a file or folder, whose name is then its first argument."""
    return event in _WRITES or (event == "open" and isinstance(args[2], int) and bool(args[2] & os.O_ACCMODE))


def count_writes(folder: Path, kill_at: int | None, report: Path) -> None:
    """Kill this process at its `kill_at`-th write to `folder`; without a number, keep the count in `report`."""
    inside, seen = str(folder), 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if not is_write(event, args) or not str(args[0]).startswith(inside):
            return
        seen += 1
        if kill_at == seen:
            os.kill(os.getpid(), signal.SIGKILL)
        if kill_at is None:
            descriptor = os.open(report, os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, str(seen).encode())
            os.close(descriptor)

    sys.addaudithook(watch)


def start(argv: Sequence[str], folder: Path, log: Path, prepare: Callable[[], None]) -> int:
    """Start the command in a process of its own, a fork that has everything imported; return its number.

    Args:
        argv: of `vpt-peft train`, but for its folders.
        folder: theirs.
        log: what it prints goes there.
        prepare: called in the process first.
    """
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            # What is said last then stands last in the file
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
            prepare()
            folders = ["--output_dir", str(folder / "out"), "--feature_cache_dir", str(folder / "features")]
            try:
                code = vpt_peft(["train", *argv, *folders])
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return child


def run(argv: Sequence[str], folder: Path, after: float | None = None, kill_at: int | None = None) -> bool:
    """Run the command; return whether it came to its end.

    Args:
        argv: of `vpt-peft train`, but for its folders.
        folder: theirs.
        after: kill it after so many seconds.
        kill_at: kill it at this write.

    Raises:
        RuntimeError: it ended with an error.
    """
    log, report = folder.parent / "log.txt", folder.parent / "writes.txt"
    child = start(argv, folder, log, lambda: count_writes(folder, kill_at, report))
    end = None if after is None else time.monotonic() + after
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if end is not None and time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end = None
        time.sleep(0.002)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(log.read_text(encoding="utf-8").strip().splitlines()[-1])
    return True


def left_behind(folder: Path) -> dict[str, str]:
    """Return a digest of every file of a finished run by its path, of results without what a clock says."""
    found = {}
    for path in sorted((folder / "out").rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            continue
        data = path.read_bytes()
        # Checkpoints hold times, and the card says how long it took
        is_volatile = path.name in ("trainer_state.json", "training_args.bin", "README.md") or "runs" in path.parts
        if path.suffix == ".json" and path.name.endswith("_results.json"):
            numbers = {key: value for key, value in json.loads(data).items() if not key.endswith(_VARIES)}
            data = json.dumps(numbers, sort_keys=True).encode()
        found[name] = "" if is_volatile else sha256(data).hexdigest()
    return found


def undisturbed(argv: Sequence[str], folder: Path) -> Undisturbed:
    """Run the command to its end twice; the first leaves caches of the data set."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.monotonic()
        run(argv, folder)
        took = time.monotonic() - began
    return Undisturbed(left_behind(folder), took, int((folder.parent / "writes.txt").read_text()))


def kill_and_resume(argv: Sequence[str], folder: Path, whole: Undisturbed, draws: random.Random) -> tuple[int, str]:
    """Kill one run up to three times and let it end; return the kills, and what differs from the undisturbed run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    killed, moments = 0, []
    try:
        while killed < _MOST_KILLS and (killed == 0 or draws.random() < 0.4):
            if draws.random() < 0.5:
                moment: dict[str, Any] = {"after": draws.uniform(0, whole.seconds)}
            else:
                moment = {"kill_at": draws.randint(1, whole.writes)}
            moments.append(moment)
            if run(argv, folder, **moment):
                break
            killed += 1
        else:
            run(argv, folder)
    except RuntimeError as error:
        return killed, f"{moments}: {error}"
    found = left_behind(folder)
    differing = sorted(name for name in {*found, *whole.files} if found.get(name) != whole.files.get(name))
    return killed, f"{moments}: {', '.join(differing)}" if differing else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Kill runs in turn until there are enough kills; 1 where a run did not end as it should."""
    (arguments,) = HfArgumentParser(KillArguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    draws, counts = random.Random(arguments.seed), {}
    with TemporaryDirectory(prefix="vpt-kills-") as temporary:
        place = Path(temporary)
        make_backbone(place / "vit")
        make_masks(place / "masks")
        runs = commands(place)
        whole = {}
        # The same path for all, as results name it
        for name, command in runs.items():
            whole[name] = undisturbed(command, place / "trial" / "run")
            counts[name] = Count()
        while sum(count.kills for count in counts.values()) < arguments.kills:
            for name, command in runs.items():
                killed, wrong = kill_and_resume(command, place / "trial" / "run", whole[name], draws)
                count = counts[name]
                count.kills += killed
                # A run that ended before its kill shows nothing
                count.runs += bool(killed)
                count.equal += bool(killed and not wrong)
                if wrong:
                    count.wrong.append(wrong)
                    print(f"{name}: {wrong}", file=sys.stderr, flush=True)
            if arguments.output:
                Path(arguments.output).write_text(
                    json.dumps({name: asdict(count) for name, count in counts.items()}, indent=2), encoding="utf-8"
                )
    rows = [
        {"run": name, "kills": str(count.kills), "runs": str(count.runs), "ended equal": str(count.equal)}
        for name, count in counts.items()
    ]
    print(markdown_table(rows, ["run"]))
    return int(any(count.wrong for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
