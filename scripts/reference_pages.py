"""Pages of the reference that are made from the package itself, when the site is built (mkdocs-gen-files)."""

from __future__ import annotations

import html
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields
from pathlib import Path

import mkdocs_gen_files
from peft import PeftConfig

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.cli.main import COMMANDS


ROOT = Path(__file__).parents[1]


def cell(text: object) -> str:
    """Text of a table's cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def code(text: object) -> str:
    """Code of a table's cell; between backticks an escaped bar would show its backslash."""
    return f"<code>{html.escape(' '.join(str(text).split()), quote=False).replace('|', '&#124;')}</code>"


def table_of(config_class: type, without: type) -> str:
    """All fields that a configuration has and another one has not, or has with another default."""
    other = {each.name: each for each in fields(without)}
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for each in fields(config_class):
        before = other.get(each.name)
        if not each.init or (before is not None and before.default == each.default and before.type == each.type):
            continue
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        text = each.metadata.get("help", "")
        rows.append(f"| `{each.name}` | {code(each.type)} | {code(repr(default))} | {cell(text)} |")
    return "\n".join(rows)


def configurations() -> str:
    return "\n\n".join(
        [
            "# Configurations",
            "`help(VPTConfig)` shows the same. Fields of `peft.PeftConfig` are not repeated here.",
            "## VPTConfig",
            (VPTConfig.__doc__ or "").split("\n\n")[0],
            table_of(VPTConfig, PeftConfig),
            "## GatedVPTConfig",
            (GatedVPTConfig.__doc__ or "").split("\n\n")[0],
            "All fields of `VPTConfig`, and",
            table_of(GatedVPTConfig, VPTConfig),
        ]
    )


def help_of(command: str) -> str:
    """What `--help` prints, at a width that fits the page."""
    done = subprocess.run(
        [sys.executable, "-m", "vpt_peft", command, "--help"],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    return f"## {command}\n\n{COMMANDS[command][1].capitalize()}.\n\n```text\n{done.stdout.rstrip()}\n```"


def commands() -> str:
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(help_of, COMMANDS))
    return "\n\n".join(["# Command line", "What `vpt-peft COMMAND --help` prints.", *parts])


for name, text in (
    ("reference/configurations.md", configurations()),
    ("reference/commands.md", commands()),
    ("changelog.md", "---\nhide: [navigation]\n---\n\n" + (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")),
):
    with mkdocs_gen_files.open(name, "w") as page:
        page.write(text)
