"""Pages of the site whose text lies elsewhere in the repository, so that there is one copy of it."""

import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<target>(?!https?://|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
SHORT_CODE = re.compile(r"<code>([^<]{1,28})</code>")
REFERENCE = re.compile(r"\[<code>~?(?:\w+\.)*(\w+)</code>\]")


def on_files(files, config):
    """Add the pages."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=LINK.sub(_from_docs, text)))
    return files


def on_page_content(html, **_):
    """
    Show names that docstrings refer to, in TRL's way of writing (`[`~module.Name`]`), as names, and keep what is short in one
    line.
    """
    return SHORT_CODE.sub(r'<code class="short">\1</code>', REFERENCE.sub(r"<code>\1</code>", html))


def _from_docs(link: re.Match) -> str:
    """A link of a file in the root, as it is from `docs`. What is not on the site stays as a name."""
    target, anchor = link["target"], link["anchor"] or ""
    if target in PAGES:
        return f"{link['text']}({PAGES[target]}{anchor})"
    if target.startswith("docs/"):
        return f"{link['text']}({target.removeprefix('docs/')}{anchor})"
    return link["text"][1:-1]
