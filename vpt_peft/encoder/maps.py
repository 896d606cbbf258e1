"""Alias of [`projections`] under its former name."""

from .projections import apply_projection as apply_head_map


__all__ = ["apply_head_map"]
