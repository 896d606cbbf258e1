"""`vpt-peft train [file.json | file.yaml] [flags]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .options import need_training


def run(argv: Sequence[str]) -> int:
    """Train, print the results, and push the folder if that was asked for."""
    need_training()
    from ..tasks import get_task
    from ..training.arguments import parse_args
    from ..training.train import train

    arguments = parse_args(argv)
    metrics = train(arguments)
    training = arguments.training
    if training.process_index != 0:
        return 0
    task = get_task(arguments.model.task)
    best = next(metric for metric in task.metrics if metric.name == task.best_metric)
    results = [
        f"{title} {best.title.lower()} {metrics[name]:.4f}"
        for title, name in (("validation", f"eval_{best.name}"), ("test", f"test_{best.name}"))
        if name in metrics
    ]
    print(f"{', '.join(results)}; trained in {metrics['train_runtime']:.1f} s; saved in {training.output_dir}")
    if training.push_to_hub:
        from ..hub import push_adapter

        folder = Path(training.output_dir or ".")
        private, token = bool(training.hub_private_repo), training.hub_token
        print(
            push_adapter(folder, training.hub_model_id or folder.resolve().name, token, private, training.hub_revision)
        )
    return 0
