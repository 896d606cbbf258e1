"""Formulas of the site as MathML, which browsers draw without a script of somebody else (a hook of mkdocs)."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert


# What arithmatex makes of $$...$$ and of $...$
_DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Return the HTML of a page with MathML in place of LaTeX."""
    content = _DISPLAY.sub(lambda found: convert(html.unescape(found[1]).strip(), display="block"), content)
    return _INLINE.sub(lambda found: convert(html.unescape(found[1]).strip()), content)
