"""Text that comes from elsewhere, made fit for a screen."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with a question mark for all that is no visible sign: control and bidirectional characters, newlines.

    Names of modules, files and regions are not trusted: a terminal would take some of them for commands, a reader for
    lines of the program.
    """
    return text if text.isprintable() else "".join(sign if sign.isprintable() else "?" for sign in text)
