"""Strangers' text in Markdown: it shows as it is, and cannot become a link, a table, an image or HTML."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

SPECIAL = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")
BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def escaped(text: object) -> str:
    """The text on one line, for the inside of a paragraph or a cell of a table.

    What could have a meaning becomes a character reference, which Markdown takes literally everywhere but in code.
    Control characters, also those that turn the direction of writing, are left out.
    """
    return SPECIAL.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


def one_line(text: object) -> str:
    """The text without line breaks, control characters and those that turn the direction of writing."""
    line = " ".join(str(text).split())
    return "".join(c for c in line if unicodedata.category(c) not in ("Cc", "Cs") and c not in BIDIRECTIONAL)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already, without the columns that are empty in every row; "" without rows."""
    rows = [list(row) for row in rows]
    filled = [column for column in range(len(header)) if any(row[column] for row in rows)]
    if not filled:
        return ""
    lines = [[header[column] for column in filled], ["---"] * len(filled)]
    lines += [[row[column] or "-" for column in filled] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
