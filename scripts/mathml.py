"""A hook of mkdocs: equations of a page become MathML, which a browser shows without a script."""

from __future__ import annotations

import re
from functools import partial
from html import unescape
from typing import Any

from latex2mathml.converter import convert

FORMS = {
    "block": re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL),
    "inline": re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL),
}
"""How pymdownx.arithmatex marks an equation."""


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with the body of each page."""
    for display, form in FORMS.items():
        html = form.sub(partial(_mathml, display=display), html)
    return html


def _mathml(found: re.Match[str], display: str) -> str:
    return str(convert(unescape(found[1]), display=display))
