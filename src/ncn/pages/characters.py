"""Tokens as characters that can be seen."""

from __future__ import annotations


def label(token: str) -> str:
    """One token as visible characters: a space is ·, a new line ⏎, a tab ⇥; what cannot be printed is escaped."""
    named = {" ": "·", "\n": "⏎", "\t": "⇥"}
    return "".join(named.get(char) or (char if char.isprintable() else escaped(char)) for char in token) or "∅"


def escaped(char: str) -> str:
    """A character as its Python escape, such as \\xa0 or \\u65e5."""
    return char.encode("unicode_escape").decode("ascii")
