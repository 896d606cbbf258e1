"""`vpt-peft push FOLDER USER/NAME`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from .options import need_training


def run(argv: Sequence[str]) -> int:
    """Upload a folder and print the commit's URL."""
    parser = ArgumentParser(prog="vpt-peft push", description="Upload an adapter to the Hub.", allow_abbrev=False)
    parser.add_argument("folder", help="output folder of a training, or any PEFT adapter folder")
    parser.add_argument("repo_id", help="user/name on the Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to")
    own = parser.parse_args(list(argv))
    need_training()

    from ..hub import push_adapter

    print(push_adapter(own.folder, own.repo_id, private=own.private, revision=own.revision))
    return 0
