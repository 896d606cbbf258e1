"""Options that the commands on a trained adapter share."""

from __future__ import annotations

from argparse import ArgumentParser


def add_adapter_options(parser: ArgumentParser) -> None:
    """Add where the adapter is, its backbone, and how the forward pass runs."""
    parser.add_argument("adapter", help="folder or Hub id of the adapter")
    parser.add_argument("--base_model", help="backbone to use in place of the one it was trained on")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter on the Hub")
    parser.add_argument("--subfolder", help="folder inside the Hub repository")
    parser.add_argument("--token", help="Hub token")
    parser.add_argument("--cache_dir", help="where Hub downloads are kept")
    parser.add_argument("--batch_size", type=int, default=64, help="images per forward pass")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
