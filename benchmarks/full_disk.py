"""Trains on disks that are full after 4 KiB, 8 KiB, and so on: `unshare -rm python -m benchmarks.full_disk`.

Each run has to end well, or with one line that says how to go on; with room again, the same command has to end with the
bytes of a run that never lacked room. The disks are real: tmpfs of that size. A second series makes the folder read-only
from the first, second, ... write on.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import HfArgumentParser

from vpt_peft.reporting import markdown_table

from .kills import commands, is_write, left_behind, make_backbone, make_masks, start, undisturbed


_PAGE = 4096
_ROOM = 2**30


@dataclass
class DiskArguments:
    """Which runs, how finely, and where the results go."""

    methods: list[str] = field(
        default_factory=lambda: ["vpt", "linear", "full", "vpt, masks"], metadata={"help": "Runs, as kills has them."}
    )
    every: int = field(default=1, metadata={"help": "Take every so many-th page and write."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the results."})


@dataclass
class Outcome:
    """What became of the runs of one kind.

    Args:
        refused: ended with one line of error, and were resumed to the bytes of the undisturbed run.
        ended: had room enough, and ended with these bytes at once.
        wrong: the others, with what was wrong.
    """

    refused: int = 0
    ended: int = 0
    wrong: list[str] = field(default_factory=list)


def refuse_writes(folder: Path, first: int) -> None:
    """Let writes to `folder` fail from the `first`-th on, as on a file system that became read-only."""
    inside, seen = str(folder), 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if is_write(event, args) and str(args[0]).startswith(inside):
            seen += 1
            if seen >= first:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    sys.addaudithook(watch)


def mount(place: Path, size: int) -> None:
    """Mount an empty tmpfs of `size` bytes in place of the one that is there."""
    unmount(place)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], check=True)


def unmount(place: Path) -> None:
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def ended_with(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def try_and_resume(
    argv: Sequence[str], folder: Path, expected: dict[str, str], size: int | None, first: int
) -> tuple[bool, str]:
    """Run where there is no room; then with room. Return whether the first run ended well, and what was wrong."""
    log = folder.parent.parent / "log.txt"
    mount(folder.parent, size or _ROOM)
    code = ended_with(start(argv, folder, log, lambda: refuse_writes(folder, first) if size is None else None))
    said = log.read_text(encoding="utf-8").strip().splitlines() or [""]
    if size is not None:
        subprocess.run(["mount", "-o", f"remount,size={_ROOM}", str(folder.parent)], check=True)
    if code not in (0, 2) or (code == 2 and not said[-1].startswith("vpt-peft train: ")):
        return False, f"exit code {code}: {said[-1]}"
    before = left_behind(folder)
    if code == 2 and any("Traceback" in line for line in said):
        return False, f"a traceback: {said[-1]}"
    if code == 2:
        code = ended_with(start(argv, folder, log, lambda: None))
        if code:
            return False, f"not resumed: {log.read_text(encoding='utf-8').strip().splitlines()[-1]}; after {said[-1]}"
        found = left_behind(folder)
    else:
        found, said = before, []
    differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return not said, f"{', '.join(differing)}; after {said[-1:]}" if differing else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Try every size and every write; 1 where one did not end as it should."""
    (arguments,) = HfArgumentParser(DiskArguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    outcomes: dict[str, Outcome] = {}
    with TemporaryDirectory(prefix="vpt-disk-") as temporary:
        place, disk = Path(temporary), Path(temporary, "disk")
        make_backbone(place / "vit")
        make_masks(place / "masks")
        disk.mkdir()
        mount(disk, _ROOM)
        try:
            for name in arguments.methods:
                command = commands(place)[name]
                whole = undisturbed(command, disk / "run")
                needed = sum(-(-path.stat().st_size // _PAGE) + 1 for path in disk.rglob("*"))
                sizes = [(pages * _PAGE, 0) for pages in range(1, 2 * needed, arguments.every)]
                writes = [(None, number) for number in range(1, whole.writes + 1, arguments.every)]
                for kind, tries in (("full disk", sizes), ("read-only", writes)):
                    outcome = outcomes.setdefault(f"{name}: {kind}", Outcome())
                    for size, first in tries:
                        is_ended, wrong = try_and_resume(command, disk / "run", whole.files, size, first)
                        outcome.ended += is_ended and not wrong
                        outcome.refused += not is_ended and not wrong
                        if wrong:
                            outcome.wrong.append(f"{size or first}: {wrong}")
                            print(f"{name}, {kind} {size or first}: {wrong}", file=sys.stderr, flush=True)
                        if size and is_ended and not wrong:
                            # Larger disks have room too
                            break
                if arguments.output:
                    Path(arguments.output).write_text(
                        json.dumps({key: asdict(value) for key, value in outcomes.items()}, indent=2), encoding="utf-8"
                    )
        finally:
            unmount(disk)
    rows = [
        {
            "run": name,
            "refused with one line, then equal": str(each.refused),
            "ended at once": str(each.ended),
            "wrong": str(len(each.wrong)),
        }
        for name, each in outcomes.items()
    ]
    print(markdown_table(rows, ["run"]))
    return int(any(each.wrong for each in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
