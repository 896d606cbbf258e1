"""Training in a process of its own, watched through the files it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


class TrainingFailed(ValueError):
    """The training ended with an error; the message is its last line."""


def run_training(arguments: Sequence[str], output_dir: Path, poll: float = 0.5) -> Iterator[list[dict[str, float]]]:
    """Run `vpt-peft train` and yield the Trainer's log whenever it has grown; the last one is complete.

    Args:
        arguments: flags without `--output_dir`.
        output_dir: where the result goes.
        poll: seconds between two looks.

    Raises:
        TrainingFailed: it ended with an error.
    """
    command = [sys.executable, "-m", "vpt_peft", "train", *arguments, "--output_dir", str(output_dir)]
    with (output_dir.parent / "training.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            seen = 0
            while process.poll() is None:
                time.sleep(poll)
                history = read_history(output_dir)
                if len(history) > seen:
                    seen = len(history)
                    yield history
        finally:
            # The user has gone, or all is done
            process.kill()
            process.wait()
        if process.returncode:
            log.seek(0)
            lines = [line.strip() for line in log.read().splitlines() if line.strip()]
            raise TrainingFailed(lines[-1] if lines else f"the training ended with code {process.returncode}.")
    yield read_history(output_dir)


def read_history(output_dir: Path) -> list[dict[str, float]]:
    """Return the log of the newest state that lies in a run's folder or its checkpoints."""
    states = [*output_dir.glob("checkpoint-*/trainer_state.json"), output_dir / "trainer_state.json"]
    histories: list[list[dict[str, float]]] = [[]]
    for path in states:
        try:
            histories.append(json.loads(path.read_text(encoding="utf-8"))["log_history"])
        except (OSError, ValueError, KeyError):
            # Not there, or just being written
            continue
    return max(histories, key=len)
