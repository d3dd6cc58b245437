"""Runs side by side as one page: a file that needs no network, in light and dark, on a phone too."""

import difflib
import re
from html import escape

from .comparison import Comparison, equal_diversity_explained, label_of
from .line_chart import COLORS, line_chart


STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #d1d5db; --paper: #ffffff; --card: #f6f7f9; --mark: #fde68a; %s }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --paper: #111827; --card: #1f2937; --mark: #854d0e; %s }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
p { color: var(--soft); max-width: 44rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); white-space: normal; min-width: 8rem }
.settings td { white-space: normal; overflow-wrap: anywhere; text-align: left }
small { color: var(--soft); display: block }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 20rem), 1fr)); gap: 1rem }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem } figcaption { font-weight: 600; font-size: .9rem }
svg { width: 100%%; height: auto; display: block } svg text { fill: var(--soft); font-size: 11px } .grid { stroke: var(--line) }
.legend { font-size: .85rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem } .legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%%; margin-right: .35em }
article { background: var(--card); border-radius: .5rem; padding: .75rem; margin: .75rem 0 }
dl { margin: 0 } dt { color: var(--soft); font-size: .85rem; margin-top: .4rem } dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
mark { background: var(--mark); color: inherit }
"""


def page(comparison: Comparison) -> str:
    """The page's HTML. What differs from the teacher's answer is marked in the students'."""
    names = [run.name for run in comparison.runs]
    parts = [
        "<h1>Comparison</h1>",
        _table(["", *names], comparison.table()),
        f"<p>{escape(comparison.explanation)}</p>",
        "<h2>Differences</h2>",
        _table([f"less {names[0]}", *names[1:]], comparison.differences()),
    ]
    if comparison.judged:
        parts.append(f"<p>{escape(equal_diversity_explained(comparison.judged)).replace('`', '')}</p>")
    parts.append(f'<div class="charts">{_curves(comparison)}{_diversity(comparison)}</div>')
    settings = comparison.settings()
    if settings:
        parts += ["<h2>Settings that differ</h2>", _table(["", *names], settings, "wide settings")]
    parts += ["<h2>Answers</h2>", *(_example(example) for example in comparison.examples())]
    light, dark = (" ".join(f"--c{number}: {color};" for number, color in enumerate(colors)) for colors in COLORS)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(', '.join(names))}</title>\n<style>{STYLE % (light, dark)}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _table(head: list[str], rows: list[list[str]], css: str = "wide") -> str:
    def cell(text: str) -> str:
        value, bracket, interval = escape(text).partition(" (")
        # An interval stands below its value, where a phone has room
        return (
            f"<td>{value}<small>{interval.removesuffix(')')}</small></td>"
            if INTERVAL.search(text)
            else f"<td>{escape(text)}</td>"
        )

    lines = ["".join(f"<th>{escape(text)}</th>" for text in head)]
    lines += ["".join([f"<td>{escape(label)}</td>", *map(cell, cells)]) for label, *cells in rows]
    return f'<div class="{css}"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


INTERVAL = re.compile(r"^\S+ \(\S+ to \S+\)$")


def _curves(comparison: Comparison) -> str:
    key = comparison.headline
    series = {
        run.name: [
            (point["step"], point[key]) for point in run.metrics["curves"][run.method] if point.get(key) is not None
        ]
        for run in comparison.runs
    }
    return line_chart(f"{label_of(key)} along the training", "optimizer step", series)


def _diversity(comparison: Comparison) -> str:
    """Each temperature is a point: a better student lies higher, a sharper one only farther left."""
    if not comparison.judged:
        return ""
    series = {run.name: sorted(comparison.diversity_curve(run)) for run in comparison.runs}
    return line_chart(f"{comparison.judged} by diversity, a point a temperature", "distinct 4-grams", series)


def _example(example: dict) -> str:
    teacher = example["teacher"]
    entries = [("prompt", escape(example["prompt"])), ("teacher", escape(teacher))]
    entries += [(name, _marked(answer, teacher)) for name, answer in example["answers"].items()]
    return (
        "<article><dl>"
        + "".join(f"<dt>{escape(name)}</dt><dd>{text}</dd>" for name, text in entries)
        + "</dl></article>"
    )


def _marked(answer: str, teacher: str) -> str:
    """An answer with the words that the teacher's does not have there marked; with characters, in text without spaces."""
    own, other = (re.findall(r"\s+|\S+", text) if " " in teacher.strip() else list(text) for text in (answer, teacher))
    text = ""
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, own, other, autojunk=False).get_opcodes():
        piece = escape("".join(own[start:end]))
        text += f"<mark>{piece}</mark>" if piece.strip() and kind != "equal" else piece
    return text
