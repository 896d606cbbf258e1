"""`vpt-peft train [file.json | file.yaml] [flags]`."""

from __future__ import annotations

from collections.abc import Sequence

from .options import need_training


def run(argv: Sequence[str]) -> int:
    """Train as the flags say and print what came out."""
    need_training()
    from ..training.arguments import parse_args
    from ..training.train import train

    arguments = parse_args(argv)
    metrics = train(arguments)
    if arguments.training.process_index == 0:
        results = [
            f"{title} accuracy {metrics[name]:.4f}"
            for name, title in (("eval_accuracy", "validation"), ("test_accuracy", "test"))
            if name in metrics
        ]
        seconds, output_dir = metrics["train_runtime"], arguments.training.output_dir
        print(f"{', '.join(results)}; trained in {seconds:.1f} s; saved in {output_dir}")
    return 0
