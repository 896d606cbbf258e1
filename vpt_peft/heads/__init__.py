"""Task heads: found, wrapped for each adapter, resized to its labels."""

from .find import check_heads, check_task_type, find_task_head, modules_to_wrap, trained_modules
from .labels import Labels, LabelSwitch, apply_labels, read_labels
from .resize import build_heads, fit_head
from .wrapper import HeadWrapper, unwrap_heads, wrap_heads


__all__ = [
    "HeadWrapper",
    "LabelSwitch",
    "Labels",
    "apply_labels",
    "build_heads",
    "check_heads",
    "check_task_type",
    "find_task_head",
    "fit_head",
    "modules_to_wrap",
    "read_labels",
    "trained_modules",
    "unwrap_heads",
    "wrap_heads",
]
