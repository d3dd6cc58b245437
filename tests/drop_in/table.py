"""`docs/drop_in.md`, from the tables that the tests hold. Write it with `python -m tests.drop_in.table`."""

import importlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from tests.drop_in import fields


PAGE = Path(__file__).parents[2] / "docs" / "drop_in.md"
INTRODUCTION = """# What of TRL acts, differs or is refused

Each trainer stands where one of TRL stands. Change the class of the trainer and of its configuration, and what you set
keeps its name. Below is what then becomes of each argument of TRL's trainer and each field of its configuration. A
refused one is one error that names it, before anything is loaded; none is taken and left without effect.

This page is made from the tables that the tests check against TRL (`tests/drop_in/fields.py`, `tests/gad/gad_fields.py`):
`python -m tests.drop_in.table` writes it."""


class Section(NamedTuple):
    """A trainer's part of the page."""

    title: str
    config: str
    arguments: dict[str, str]
    fields: dict[str, str]


def sections() -> list[Section]:
    """What the page says, trainer by trainer."""
    found = []
    if importlib.util.find_spec("tests.gad.gad_fields"):
        gad = importlib.import_module("tests.gad.gad_fields")
        found.append(Section("`GADTrainer`, for `GRPOTrainer`", "GRPOConfig", gad.ARGUMENTS, gad.INHERITED))
    return found + [
        Section(
            "`ProxyKDTrainer` and `BayesKDTrainer`, for `SFTTrainer`",
            "SFTConfig",
            fields.PROXY_ARGUMENTS,
            fields.SOFT_TARGETS,
        ),
        Section(
            "`ProxyAlignmentTrainer`, for `DPOTrainer`", "DPOConfig", fields.ALIGNMENT_ARGUMENTS, fields.ALIGNMENT
        ),
        Section(
            "`PreferenceKDTrainer`, for `DPOTrainer`", "DPOConfig", fields.PREFERENCE_ARGUMENTS, fields.PREFERENCE
        ),
        Section(
            "`LLKDTrainer`, for transformers' `Trainer`",
            "TrainingArguments",
            fields.CLASSIFIER_ARGUMENTS,
            fields.CLASSIFIER,
        ),
    ]


def render() -> str:
    """The page."""
    parts = [INTRODUCTION]
    for section in sections():
        parts.append(f"## {section.title}")
        parts += _part("Argument", "arguments", section.arguments)
        parts += _part("Field", f"fields of `{section.config}`", section.fields)
    return "\n\n".join(parts) + "\n"


def _part(head: str, what: str, table: dict[str, str]) -> list[str]:
    verdicts = {name: verdict.partition(": ") for name, verdict in sorted(table.items())}
    rows = [f"| `{name}` | {kind} | {text} |" for name, (kind, _, text) in verdicts.items() if kind != fields.ACTS]
    acting = ", ".join(f"`{name}`" for name, (kind, _, _) in verdicts.items() if kind == fields.ACTS)
    return ["\n".join([f"| {head} | | |", "|---|---|---|", *rows]), f"All other {what} act as in TRL: {acting}."]


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
