"""Find the command, run it, and end user errors as one line with exit code 2."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from ..requirements import VersionError, check_versions
from ..version import __version__


HELP_FLAGS = {"-h", "--help", "--help-all"}
# name: (module with `run(argv) -> int`, what it does); modules are imported when their command is called
COMMANDS = {
    "demo": ("vpt_peft.cli.demo", "train on embedded backbones and digits, offline, in two minutes"),
    "train": ("vpt_peft.cli.train", "train prompts or a baseline, save the adapter with its card"),
    "evaluate": ("vpt_peft.cli.evaluate", "evaluate an adapter folder or Hub id on a split"),
    "sweep": ("vpt_peft.cli.sweep", "search settings on the validation split, test the best"),
    "compare": ("vpt_peft.cli.compare", "train several methods with several seeds to one table"),
    "plot": ("vpt_peft.cli.plot", "draw learning curves, or scores against trainable parameters"),
    "predict": ("vpt_peft.cli.predict", "predict images or folders of images to a table"),
    "cost": ("vpt_peft.cli.cost", "estimate what training would cost: values, disk, FLOPs, memory, largest batch"),
    "export": ("vpt_peft.cli.export", "write an adapter with backbone and head to one ONNX or torch.export file"),
    "app": ("vpt_peft.cli.app", "serve a page in the browser: ask adapters, look inside, train"),
    "push": ("vpt_peft.cli.push", "upload an adapter folder to the Hub"),
    "doctor": ("vpt_peft.cli.doctor", "report versions, device, kernels, and what is missing for which command"),
    "convert": ("vpt_peft.cli.convert", "convert a pre-trained checkpoint to a Hugging Face folder"),
}


_SECRETS = ("--token", "--hub_token")


def register() -> None:
    """Make the methods known to PEFT, and libraries quiet.

    PEFT and transformers import whatever backends of theirs are installed; what those say of themselves is not for the
    user of a command.
    """
    check_versions()
    if not sys.warnoptions:
        # Of libraries to those who program with them
        warnings.simplefilter("ignore", FutureWarning)
    logging.disable(logging.WARNING)
    try:
        from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
        from transformers.utils import logging as transformers_logging

        from ..peft_model import extend_peft_model
    finally:
        logging.disable(logging.NOTSET)
    extend_peft_model()
    # It orders checkpoints of one second by their numbers, which is right, and says so
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime" not in record.getMessage())
    shown = sys.stderr.isatty() and not are_progress_bars_disabled()
    # Reading weights takes a moment, so only their download has a bar
    transformers_logging.disable_progress_bar()
    if shown:
        enable_progress_bars()


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_text}" for name, (_, help_text) in COMMANDS.items()]
    head, foot = (
        "usage: vpt-peft <command> [options]",
        "vpt-peft <command> --help shows its options; vpt-peft --version the version.",
    )
    return "\n".join([head, "", *lines, "", foot])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 after one line on stderr about what the user has to change.

    `VPT_PEFT_DEBUG=1` shows the traceback of such errors.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments == ["--version"]:
        print(f"vpt-peft {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"vpt-peft: unknown command {name!r}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("vpt_peft").setLevel(logging.INFO)
    for library in ("datasets", "huggingface_hub", "torchmetrics"):
        # They print by themselves, and would be heard twice
        logging.getLogger(library).propagate = False
    try:
        refuse_secrets(rest)
        # The doctor looks at what would fail here
        if name != "doctor" and not HELP_FLAGS & set(rest):
            register()
        return importlib.import_module(COMMANDS[name][0]).run(rest)
    except KeyboardInterrupt:
        hint = " Go on from the last checkpoint with --resume_from_checkpoint last." if name == "train" else ""
        print(f"vpt-peft {name}: interrupted.{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("VPT_PEFT_DEBUG") or not _is_user_error(error):
            raise
        print(f"vpt-peft {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def refuse_secrets(argv: Sequence[str]) -> None:
    """Refuse tokens on the command line, which every list of processes shows.

    Raises:
        ValueError: there is one; it is not repeated.
    """
    for name in _SECRETS:
        if any(flag == name or flag.startswith(f"{name}=") for flag in argv):
            raise ValueError(
                f"{name}: other users of this machine can read a token on the command line; log in once (hf auth "
                "login), or set HF_TOKEN in the environment. Take the token back if it was a real one."
            )


def _is_user_error(error: Exception) -> bool:
    """Wrong input, files and networks; anything else is a defect and keeps its traceback."""
    if isinstance(error, OSError | ValueError | ModuleNotFoundError | VersionError):
        return True
    # By name: importing their modules (torch, the Hub client) would make every error slow
    return any(kind.__name__ in ("TrainingDiverged", "HTTPError") for kind in type(error).__mro__)
