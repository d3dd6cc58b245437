"""Pages of the site whose text lies elsewhere in the repository, so that there is one copy of it."""

import ast
import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "skills/black-box-distillation/SKILL.md": "skill.md",
}
EXAMPLES, EXAMPLES_PAGE = "examples", "examples.md"
LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<target>(?!https?://|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
SHORT_CODE = re.compile(r"<code>([^<]{1,28})</code>")
REFERENCE = re.compile(r"\[<code>~?(?:\w+\.)*(\w+)</code>\]")


def on_files(files, config):
    """Add the pages."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_with_links(text, source)))
    files.append(File.generated(config, EXAMPLES_PAGE, content=_with_links(_examples(), f"{EXAMPLES}/README.md")))
    return files


def on_page_content(html, **_):
    """
    Show names that docstrings refer to, in TRL's way of writing (`[`~module.Name`]`), as names, and keep what is short in one
    line.
    """
    return SHORT_CODE.sub(r'<code class="short">\1</code>', REFERENCE.sub(r"<code>\1</code>", html))


def _with_links(text: str, source: str) -> str:
    """The text of a file of the repository, its links as they are from `docs`. What is not on the site stays as a name."""

    def from_docs(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        page = PAGES.get(target) or (EXAMPLES_PAGE if target.startswith(EXAMPLES) else None)
        if target.startswith("docs/"):
            page = target.removeprefix("docs/")
        return f"{link['text']}({page}{link['anchor'] or ''})" if page else link["text"][1:-1]

    return LINK.sub(from_docs, text)


def _examples() -> str:
    """Every script with its docstring, and every notebook, as one page."""
    folder = ROOT / EXAMPLES
    parts = ["# Examples", "Each file stands in the folder `examples` of the repository, and a test runs it in small."]
    for script in sorted(folder.glob("*.py")):
        source = script.read_text(encoding="utf-8")
        tree = ast.parse(source)
        code = "\n".join(source.splitlines()[tree.body[0].end_lineno :]).strip()
        parts += [f"## {script.name}", ast.get_docstring(tree), f"```python\n{code}\n```"]
    for notebook in sorted(folder.glob("*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        parts += [f"## {notebook.name}", *map(_cell, cells)]
    return "\n\n".join(parts) + "\n"


def _cell(cell: dict) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] == "code":
        return f"```python\n{text}\n```"
    # A notebook is a section of the page
    return re.sub(r"^#+ (.*)$", r"**\1**", text, flags=re.MULTILINE)
