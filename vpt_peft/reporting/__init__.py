"""What people read of finished work: tables, and how metrics are named and shown."""

from .metrics import SPLITS, Shown, describe, metric_names, shown
from .tables import markdown_table


__all__ = ["SPLITS", "Shown", "describe", "markdown_table", "metric_names", "shown"]
