"""What a model learns: each task in one file, found by the pipeline tag that the Hub and `pipeline` use."""

from .base import Metric, Task, get_task, task_names


__all__ = ["Metric", "Task", "get_task", "task_names"]
