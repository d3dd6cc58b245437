"""Runs side by side as one page: a file that needs no network, in light and dark, on a phone too."""

import difflib
import re
from collections.abc import Sequence
from html import escape

from .comparison import NLL, ComparedRun, Comparison, equal_diversity_explained, label_of
from .line_chart import line_chart, line_mark
from .page_style import style
from .verdicts import BETTER, NO_VERDICT, UNCLEAR, WORSE, Difference, by_kind


# Shape and word say it too, where colour does not
KIND_MARKS = {BETTER: ("▲", "better"), WORSE: ("▼", "worse"), UNCLEAR: ("≈", "unclear")}
OPEN_EXAMPLES = 2
NOTHING_FETCHED = "default-src 'none'; style-src 'unsafe-inline'"
INTERVAL = re.compile(r"^(\S+) \((\S+) to (\S+)\)$")


def page(comparison: Comparison) -> str:
    """The page's HTML: verdicts, what decides, pictures, and folded what is left."""
    first = breakable(comparison.names[0])
    parts = [
        f"<h1>{' · '.join(map(breakable, comparison.names))}</h1>",
        _runs(comparison),
        f"<p>{escape(comparison.explanation)}</p>",
        *_values(comparison),
        f'<div class="charts">{_curves(comparison)}{_diversity(comparison)}</div>',
    ]
    if comparison.judged:
        explained = escape(equal_diversity_explained(comparison.judged)).replace("`", "")
        parts.append(
            f"<p>{explained} In the picture a better student lies higher, a sharper one only farther left.</p>"
        )
    head = [f"less {first}", *_heads(comparison)[1:]]
    parts.append(_folded("All differences", _table(head, comparison.differences())))
    if settings := comparison.settings():
        parts.append(_folded("Settings that differ", _table(["", *_heads(comparison)], settings, "wide settings")))
    parts += _answers(comparison)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NOTHING_FETCHED}">\n'
        f"<title>{escape(', '.join(comparison.names))}</title>\n<style>{style()}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def breakable(text: str) -> str:
    """Text that a narrow column breaks after underscores and slashes, not within words."""
    return re.sub(r"([_/])(?=\w)", r"\1<wbr>", escape(text))


def _runs(comparison: Comparison) -> str:
    """A card for each run: what it is, and how it stands beside the first."""
    first = breakable(comparison.names[0])
    cards = ["<p>The others are compared with it.</p>"]
    cards += [_verdict(found, first) for found in comparison.found]
    heads = map(_run_head, range(len(cards)), comparison.names, comparison.runs)
    return (
        '<div class="runs">'
        + "".join(f"<section>{head}{card}</section>" for head, card in zip(heads, cards, strict=True))
        + "</div>"
    )


def _run_head(number: int, name: str, run: ComparedRun) -> str:
    return (
        f"<h3>{line_mark(number)}{breakable(name)}</h3><small>{escape(run.method)}, in {breakable(run.name)}</small>"
    )


def _verdict(found: Sequence[Difference], first: str) -> str:
    parts = []
    for kind, differences in by_kind(found).items():
        mark, css = KIND_MARKS[kind]
        than = "" if kind == UNCLEAR else f" than {first}"
        parts.append(f'<h4 class="{css}">{mark} {kind}{than}</h4><ul>')
        parts += [f"<li>{breakable(each.label)}{_number(str(each), 'span')}</li>" for each in differences]
        parts.append("</ul>")
    return "".join(parts) or f"<p>{NO_VERDICT}</p>"


def _values(comparison: Comparison) -> list[str]:
    deciding = len(comparison.deciding)
    rows, heads = comparison.table(), ["", *_heads(comparison)]
    parts = [_table(heads, rows[:deciding])] if deciding else []
    return parts + (
        [_folded("More rows, other temperatures", _table(heads, rows[deciding:]))] if rows[deciding:] else []
    )


def _heads(comparison: Comparison) -> list[str]:
    return [
        f'<span title="{escape(run.name)}">{line_mark(number)}{breakable(name)}</span>'
        for number, (name, run) in enumerate(zip(comparison.names, comparison.runs, strict=True))
    ]


def _table(heads: list[str], rows: list[list[str]], css: str = "wide") -> str:
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    lines += [
        "".join([f"<td>{breakable(label)}</td>", *(_number(cell, "td") for cell in cells)]) for label, *cells in rows
    ]
    return f'<div class="{css}"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _number(text: str, tag: str) -> str:
    """A value with its interval small beside it, which is broken before its upper end if at all."""
    found = INTERVAL.match(text)
    inner = breakable(text)
    if found:
        value, low, high = map(escape, found.groups())
        inner = f"{value} <small>{low}&nbsp;to {high}</small>"
    return f"<{tag}>{inner}</{tag}>"


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _curves(comparison: Comparison) -> str:
    key = comparison.headline
    if key == NLL and not comparison.has_one_tokenizer:
        return ""
    series = {
        name: [
            (point["step"], point[key]) for point in run.metrics["curves"][run.method] if point.get(key) is not None
        ]
        for name, run in zip(comparison.names, comparison.runs, strict=True)
    }
    return line_chart(f"{label_of(key)}, along the training", "optimizer step", series)


def _diversity(comparison: Comparison) -> str:
    """Each temperature is a point: a better student lies higher, a sharper one only farther left."""
    if not comparison.judged:
        return ""
    curves = map(comparison.diversity_curve, comparison.runs)
    series = {name: sorted(curve) for name, curve in zip(comparison.names, curves, strict=True)}
    return line_chart(f"{comparison.judged} by diversity, a point a temperature", "distinct 4-grams", series)


def _answers(comparison: Comparison) -> list[str]:
    examples = [_example(example) for example in comparison.examples()]
    parts = ["<h2>Answers</h2>", "<p>Marked: what the teacher's answer does not have there.</p>"]
    parts += examples[:OPEN_EXAMPLES]
    more = examples[OPEN_EXAMPLES:]
    return parts + ([_folded(f"{len(more)} more", "".join(more))] if more else [])


def _example(example: dict) -> str:
    teacher = example["teacher"]
    entries = [("prompt", escape(example["prompt"])), ("teacher", escape(teacher))]
    entries += [(name, _marked(answer, teacher)) for name, answer in example["answers"].items()]
    return (
        "<article><dl>"
        + "".join(f"<dt>{breakable(name)}</dt><dd>{text}</dd>" for name, text in entries)
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
