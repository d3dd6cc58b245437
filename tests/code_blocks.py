"""The code blocks that a reader copies: those of the README, the documentation, the examples' docstrings and the skill."""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt


ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class CodeBlock:
    file: str  # from the repository's root
    line: int
    language: str
    code: str

    @property
    def first_line(self) -> str:
        return self.code.partition("\n")[0]

    def __str__(self):
        return f"{self.file}:{self.line}"


def readable_files() -> list[Path]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [*pages, *sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "skills").rglob("*.md"))]


def code_blocks(file: str | Path) -> list[CodeBlock]:
    """The fenced blocks of a page, or of a script's docstring, without the indentation of a list around them."""
    path = ROOT / file
    text = path.read_text(encoding="utf-8")
    first_line = 1
    if path.suffix == ".py":
        docstring = ast.parse(text).body[0]
        text, first_line = ast.get_docstring(ast.parse(text), clean=False), docstring.lineno
    name = path.relative_to(ROOT).as_posix()
    return [
        CodeBlock(name, first_line + token.map[0], token.info, token.content)
        for token in MarkdownIt("commonmark").enable("table").parse(text)
        if token.type == "fence"
    ]


def code(file: str | Path, language: str | None = None) -> list[str]:
    return [block.code for block in code_blocks(file) if language in (None, block.language)]


def commands(code: str) -> list[list[str]]:
    """The words of each command of a shell block: lines that go on and `&&` are taken apart, comments left out."""
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [found for found in words if found]
