"""Options that the commands on a trained adapter share."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError
from importlib.util import find_spec
from pathlib import Path


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def need_training() -> None:
    """Check that what the extra `train` installs is there.

    Raises:
        ModuleNotFoundError: something is not; it is named with the remedy.
    """
    needed = ("datasets", "evaluate", "jinja2", "pandas", "PIL", "sklearn", "tabulate", "yaml")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"this needs {', '.join(missing)}: pip install 'vpt_peft[train]'.")


def hide_data_bars(*names: str) -> None:
    """Hide the progress bars of `datasets`, unless one of the data sets may be fetched and somebody watches."""
    import datasets

    from ..data.digits import DIGITS

    local = all(name in DIGITS or Path(name).expanduser().exists() for name in names)
    if local or not sys.stderr.isatty():
        datasets.disable_progress_bars()


def prepare_output_file(path: str | None) -> None:
    """Make the folder of a file that is written when the work is done, so that the work is not lost then.

    Raises:
        OSError: the path is a folder, or its folder cannot be made.
    """
    if path is not None:
        if Path(path).is_dir():
            raise IsADirectoryError(f"output_file={path!r} is a folder; name a file.")
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def add_adapter_options(parser: ArgumentParser) -> None:
    """Add where the adapter is, its backbone, and how the forward pass runs."""
    parser.add_argument("adapter", help="folder or Hub id of the adapter")
    parser.add_argument("--base_model", help="backbone to use instead of the one it was trained on")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter on the Hub")
    parser.add_argument("--subfolder", help="folder inside the Hub repository")
    parser.add_argument("--cache_dir", help="where Hub downloads are kept")
    parser.add_argument("--batch_size", type=positive, default=64, help="images per forward pass")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
