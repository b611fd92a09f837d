"""Docstrings carry Sphinx mathematics and "Example:" sections; this griffe extension rewrites them for the site."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_BLOCK = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<line>[^\n]*)\n(?P<body>(?:(?P=indent) +[^\n]*\n|[ \t]*\n)*)", re.MULTILINE
)
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")


def to_markdown(text: str) -> str:
    """``.. math::`` blocks as $$ ... $$, ``:math:`x` `` as $x$, and "Example:" as the section that griffe knows."""

    def block(match: re.Match[str]) -> str:
        formula = (match["line"].strip() + "\n" + textwrap.dedent(match["body"])).strip()
        if "&" in formula:
            formula = f"\\begin{{aligned}}{formula}\\end{{aligned}}"
        lines = ["$$", *formula.splitlines(), "$$"]
        return "\n".join(match["indent"] + line for line in lines) + "\n\n"

    text = _EXAMPLE.sub(r"\1Examples:", text)
    return _INLINE.sub(r"$\1$", _BLOCK.sub(block, text + "\n")).rstrip()


class DocstringMarkup(griffe.Extension):
    """Applies ``to_markdown`` to every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
