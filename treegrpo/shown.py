"""Text from outside, as it may be shown: names of groups and metrics, what a server or a file says."""

from __future__ import annotations


def shown(text: str) -> str:
    """`text` in one line, every character that a terminal would obey, or cannot print, spelled out.

    >>> shown("a\\x1b[2Jb\\n")
    'a\\\\x1b[2Jb\\\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(text: str) -> str:
    """The same for rich, which would read brackets as markup."""
    from rich.markup import escape

    return escape(shown(text))
