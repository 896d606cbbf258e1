"""The versions that are tested: `make matrix`, or `nox -s tests` for one kind of session.

Every corner has an environment of its own with the tests' packages, in the versions of constraints.txt but for the two
that vary. `VPT_PEFT_TESTS` names the test files to run instead of all.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox


TRANSFORMERS = ("5.9.0", "5.18.0", "5.23.0", "5.24.0")
PEFT = ("0.21.0", "0.21.2")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The oldest and the newest of each with each other; between them one PEFT is enough
CORNERS = [(t, p) for t in TRANSFORMERS for p in PEFT if p == PEFT[-1] or t in (TRANSFORMERS[0], TRANSFORMERS[-1])]
SAVED = Path("out", "matrix").absolute()

nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False


def install(session: nox.Session, transformers: str, peft: str) -> None:
    """The tests' packages, in constraints.txt's versions but for the two."""
    lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(("transformers", "peft", "#"))]
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join([*kept, f"transformers=={transformers}", f"peft=={peft}", ""]), encoding="utf-8")
    session.install("-q", "-c", str(constraints), "-e", ".[dev]")


def folder(transformers: str, peft: str) -> str:
    """Where a corner's adapters are."""
    return str(SAVED / f"transformers-{transformers}-peft-{peft}")


@nox.session(python="3.11")
@nox.parametrize(("transformers", "peft"), CORNERS)
def tests(session: nox.Session, transformers: str, peft: str) -> None:
    """All tests in one corner; it saves adapters for the others, and loads those that others have saved."""
    install(session, transformers, peft)
    session.run("python", "scripts/corners.py", "save", folder(transformers, peft))
    session.run("python", "scripts/corners.py", "load", str(SAVED))
    session.run("python", "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *_chosen())


@nox.session(python="3.11")
@nox.parametrize(("transformers", "peft"), CORNERS)
def adapters(session: nox.Session, transformers: str, peft: str) -> None:
    """The adapters of all corners load in each, with the outputs they had where they were saved."""
    install(session, transformers, peft)
    saved = [path.name for path in SAVED.iterdir()] if SAVED.is_dir() else []
    if len(saved) < len(CORNERS):
        session.error(f"only {saved} have saved adapters; run nox -s tests first")
    session.run("python", "scripts/corners.py", "load", str(SAVED))


@nox.session(python=PYTHONS)
def light(session: nox.Session) -> None:
    """What runs without torch, which has small wheels for one Python only."""
    session.install("-q", "packaging")
    session.install("-q", "--no-deps", f"peft=={PEFT[-1]}")
    session.run("python", "scripts/light.py")


def _chosen() -> list[str]:
    return os.environ.get("VPT_PEFT_TESTS", "").split()
