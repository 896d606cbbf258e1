"""Pictures of finished runs and of prompted models; matplotlib is imported when something is drawn."""

from .attention import draw_attention, draw_prompt_attention, prompt_attention
from .draw import KINDS, draw_curves, draw_tradeoff, plot
from .embeddings import draw_embeddings, draw_prompts, embeddings
from .figures import save_figure
from .gates import draw_gates, gate_openings, prompt_weights, temperatures
from .runs import Run, find_runs, group_runs


__all__ = [
    "KINDS",
    "Run",
    "draw_attention",
    "draw_curves",
    "draw_embeddings",
    "draw_gates",
    "draw_prompt_attention",
    "draw_prompts",
    "draw_tradeoff",
    "embeddings",
    "find_runs",
    "gate_openings",
    "group_runs",
    "plot",
    "prompt_attention",
    "prompt_weights",
    "save_figure",
    "temperatures",
]
