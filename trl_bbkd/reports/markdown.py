"""Values put into Markdown so that none of them can break a line, a table or a block."""

import re


SPECIAL = re.compile(r"[\\`*\[\]<>|#~]|(?<!\w)_|_(?!\w)")


def escape(value) -> str:
    """`value` on one line, with every character that Markdown would read as markup escaped."""
    return SPECIAL.sub(r"\\\g<0>", one_line(value))


def one_line(value) -> str:
    return " ".join(str(value).split())


def code(value) -> str:
    """`value` as a code span, on one line."""
    text = one_line(value)
    ticks = "`" * (_longest_run(text) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{padding}{text}{padding}{ticks}"


def fenced(text: str, language: str) -> str:
    """`text` as a code block, inside a fence longer than any in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table whose first column is text and whose others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    # Within a table a bar ends the cell, in code spans too
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", one_line(cell)) for cell in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in cells]


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
