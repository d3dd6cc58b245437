"""Runs side by side as one page: a file that needs no network, in light and dark, on a phone too."""

import difflib
import re
from html import escape

from .comparison import Comparison, equal_diversity_explained, label_of
from .line_chart import COLORS, line_chart
from .verdicts import BETTER, UNCLEAR, WORSE, Difference


STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #5b6472; --line: #d1d5db; --paper: #ffffff; --card: #f3f4f6; --mark: #fde68a;
  --better: #047857; --worse: #b91c1c; %s }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #a3acb9; --line: #374151; --paper: #111827; --card: #1f2937; --mark: #854d0e;
    --better: #34d399; --worse: #f87171; %s }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; line-height: 1.25; margin: 0 0 .5rem } h2 { font-size: 1.1rem; margin: 1.75rem 0 .5rem }
h2 small { display: inline; font-weight: 400 }
p { color: var(--soft); max-width: 44rem; font-size: .9rem }
.verdict { background: var(--card); border-radius: .5rem; padding: .75rem; margin: .75rem 0 } .verdict h2 { margin: 0 0 .35rem }
.verdict ul { list-style: none; margin: 0; padding: 0 } .verdict li { display: flex; gap: .5rem }
.verdict i { font-style: normal; width: 1rem; flex: none } .verdict li small { display: inline; white-space: nowrap }
.better i, .better b { color: var(--better) } .worse i, .worse b { color: var(--worse) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
td { white-space: nowrap } th { overflow-wrap: break-word; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); white-space: normal; padding-left: 0 }
.settings td, .settings th { white-space: normal; overflow-wrap: break-word; text-align: left }
small { color: var(--soft); display: block; font-size: .8em }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 20rem), 1fr)); gap: 1rem; margin: 1rem 0 }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem } figcaption { font-weight: 600; font-size: .9rem }
svg { width: 100%%; height: auto; display: block } svg text { fill: var(--soft); font-size: 11px } .grid { stroke: var(--line) }
.legend { font-size: .85rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem } .legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%%; margin-right: .35em }
article { background: var(--card); border-radius: .5rem; padding: .75rem; margin: .75rem 0 }
dl { margin: 0 } dt { color: var(--soft); font-size: .85rem; margin-top: .4rem } dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
mark { background: var(--mark); color: inherit }
details { border-top: 1px solid var(--line) } summary { padding: .75rem 0; cursor: pointer; font-weight: 600 }
@media (max-width: 30rem) { table { font-size: .82rem } th, td { padding: .3rem .35rem } }
"""


def page(comparison: Comparison) -> str:
    """The page's HTML. What differs from the teacher's answer is marked in the students'."""
    names = comparison.names
    rows, differences = comparison.table(), comparison.differences()
    known = len(comparison.deciding)
    parts = [
        f"<h1>{_breaking(' · '.join(names))}</h1>",
        f"<p>{escape(comparison.explanation)}</p>",
        *map(_verdict, names[1:], comparison.deciding_differences, [names[0]] * len(names[1:])),
        _table(["", *names], rows[:known]),
        f'<div class="charts">{_curves(comparison)}{_diversity(comparison)}</div>',
    ]
    if comparison.judged:
        parts.append(f"<p>{escape(equal_diversity_explained(comparison.judged)).replace('`', '')}</p>")
    parts += ["<h2>Answers</h2>", *(_example(example, names) for example in comparison.examples())]
    parts.append("<h2>More</h2>")
    if rows[known:]:
        parts.append(_folded("At other temperatures", _table(["", *names], rows[known:])))
    parts.append(_folded("All differences", _table([f"less {names[0]}", *names[1:]], differences)))
    if settings := comparison.settings():
        parts.append(
            _folded(f"Settings that differ: {len(settings)}", _table(["", *names], settings, "wide settings"))
        )
    folders = [[name, run.name] for name, run in zip(names, comparison.runs, strict=True)]
    parts.append(_folded("Folders", _table(["run", "folder"], folders, "wide settings")))
    light, dark = (" ".join(f"--c{number}: {color};" for number, color in enumerate(colors)) for colors in COLORS)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(', '.join(names))}</title>\n<style>{STYLE % (light, dark)}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _verdict(name: str, found: list[Difference], first: str) -> str:
    """What a run is better and worse in than the first, each with its interval."""
    lines = []
    for kind, sign in SIGNS.items():
        for each in (each for each in found if each.kind == kind):
            ends = f"{each.signed('low')} to {each.signed('high')}"
            value = "" if kind == UNCLEAR else f"<b>{each.signed('difference')}</b> "
            lines.append(
                f'<li class="{kind.split()[0]}"><i>{sign}</i><span>{kind}: {escape(each.label)} {value}<small>{ends}</small></span></li>'
            )
    told = f"<ul>{''.join(lines)}</ul>" if lines else "<p>No verdict without an interval.</p>"
    return (
        f'<section class="verdict"><h2>{_breaking(name)} <small>beside {_breaking(first)}</small></h2>{told}</section>'
    )


SIGNS = {BETTER: "▲", WORSE: "▼", UNCLEAR: "="}


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _breaking(text: str) -> str:
    """Text that a narrow column breaks after these signs, and not within a word."""
    return re.sub(r"([_/,])", r"\1<wbr>", escape(text))


def _table(head: list[str], rows: list[list[str]], css: str = "wide") -> str:
    def cell(text: str) -> str:
        value, bracket, interval = escape(text).partition(" (")
        # An interval stands below its value, where a phone has room
        return (
            f"<td>{value}<small>{interval.removesuffix(')')}</small></td>"
            if INTERVAL.search(text)
            else f"<td>{_breaking(text)}</td>"
        )

    lines = ["".join(f"<th>{_breaking(text)}</th>" for text in head)]
    lines += ["".join([f"<td>{_breaking(label)}</td>", *map(cell, cells)]) for label, *cells in rows]
    return f'<div class="{css}"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


INTERVAL = re.compile(r"^\S+ \(\S+ to \S+\)$")


def _curves(comparison: Comparison) -> str:
    key = comparison.headline
    series = {
        name: [
            (point["step"], point[key]) for point in run.metrics["curves"][run.method] if point.get(key) is not None
        ]
        for name, run in zip(comparison.names, comparison.runs, strict=True)
    }
    return line_chart(f"{label_of(key)} along the training", "optimizer step", series)


def _diversity(comparison: Comparison) -> str:
    """Each temperature is a point: a better student lies higher, a sharper one only farther left."""
    if not comparison.judged:
        return ""
    series = {
        name: sorted(comparison.diversity_curve(run))
        for name, run in zip(comparison.names, comparison.runs, strict=True)
    }
    return line_chart(f"{comparison.judged} by diversity, a point a temperature", "distinct 4-grams", series)


def _example(example: dict, names: list[str]) -> str:
    teacher = example["teacher"].strip()
    entries = [("prompt", escape(example["prompt"])), ("teacher", escape(teacher))]
    entries += [
        (name, _marked(answer.strip(), teacher)) for name, answer in zip(names, example["answers"], strict=True)
    ]
    return (
        "<article><dl>"
        + "".join(f"<dt>{_breaking(name)}</dt><dd>{text}</dd>" for name, text in entries)
        + "</dl></article>"
    )


def _marked(answer: str, teacher: str) -> str:
    """An answer with the words that the teacher's does not have there marked; with characters, in text without spaces."""
    own, other = (re.findall(r"\s+|\S+", text) if " " in teacher else list(text) for text in (answer, teacher))
    text = ""
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, own, other, autojunk=False).get_opcodes():
        piece = escape("".join(own[start:end]))
        text += f"<mark>{piece}</mark>" if piece.strip() and kind != "equal" else piece
    return text
