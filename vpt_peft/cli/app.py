"""`vpt-peft app [ADAPTER ...]`."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Sequence

from .options import need_training


def run(argv: Sequence[str]) -> int:
    """Serve a page in the browser until it is interrupted."""
    parser = ArgumentParser(
        prog="vpt-peft app",
        description="A page in the browser: ask adapters about images, look inside, train on a zip of folders.",
        allow_abbrev=False,
    )
    parser.add_argument("adapters", nargs="*", help="folders or Hub ids of adapters of one backbone")
    parser.add_argument(
        "--base_model", help="backbone; default: the one of the first adapter, without adapters 'embedded'"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    parser.add_argument("--port", type=int, default=7860)
    own = parser.parse_args(list(argv))
    need_training()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

    from ..app.page import launch
    from ..app.serving import Adapters

    adapters = Adapters(own.base_model)
    for path in own.adapters:
        adapters.add(path)
    launch(adapters, own.host, own.port)
    return 0
