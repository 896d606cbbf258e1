"""Pictures of finished runs; matplotlib is imported when something is drawn."""

from .draw import KINDS, draw_curves, draw_tradeoff, plot
from .runs import Run, find_runs, group_runs


__all__ = ["KINDS", "Run", "draw_curves", "draw_tradeoff", "find_runs", "group_runs", "plot"]
