"""What is said of the verdicts: a table, the same as JSON, and the verdicts one by one."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..collect.budget import Spent
from ..collect.card import endpoint_family
from ..reports.markdown import code, escape, table
from .asking import FAILED, NOT_ASKED, Verdict
from .measures import Measured
from .pairs import Pair, TeacherRows
from .settings import EvaluateConfig


DATE = re.compile(r"-(\d[\d-]{3,}|latest)$")
HEAD = ["metric", "value", "95 % interval", "prompts", "unparsable", "judge", "cost"]
READING = (
    "1 is best, and 0.5 is as good as the teacher. Intervals are over prompts. A pair without a readable verdict in both orders is "
    "left out, and never a tie."
)
DETAILS = {
    "first_is_chosen": "the answer that stood first won {:.0%} of the verdicts without ties",
    "orders_agree": "both orders agree in {:.0%} of the pairs",
    "length_effect": "effect of length {:+.2f} logits",
    "order_effect": "of standing first {:+.2f}",
    "points_of_student": "{:.2f} points for the student",
    "points_of_teacher": "{:.2f} for the teacher",
}


@dataclass
class Evaluation:
    """
    All that a table tells.

    Attributes:
        settings ([`~judging.settings.EvaluateConfig`]): student, rows and judge.
        rows ([`~judging.pairs.TeacherRows`]): the teacher's.
        pairs (`list[Pair]`): what was compared.
        cut (`int`): answers of the student that were cut.
        verdicts (`list[Verdict]`): the judge's.
        measured (`dict[str, Measured]`): the metrics.
        spent ([`~collect.budget.Spent`]): by all requests of the journal.
        stopped (`str` or `None`): why not all verdicts were asked for.
    """

    settings: EvaluateConfig
    rows: TeacherRows
    pairs: list[Pair]
    cut: int
    verdicts: list[Verdict]
    measured: dict[str, Measured]
    spent: Spent
    stopped: str | None

    def __post_init__(self):
        self.judge = self.settings.judge
        models = Counter(verdict.entry.model for verdict in self.verdicts if verdict.entry and verdict.entry.model)
        self.models = list(models)
        self.teachers = [self.settings.teacher_name] if self.settings.teacher_name else self.rows.teachers

    @property
    def warnings(self) -> list[str]:
        """What whoever reads the table should know."""
        said = []
        names = [self.judge.model, *self.models]
        own = next((name for name in self.teachers if any(is_same_model(name, other) for other in names)), None)
        if own is not None:
            said.append(f"the judge is the teacher, {own}: it may favour its own answers. Ask another judge too.")
        if not self.teachers:
            said.append(
                "the teacher's name is not known, so that it is not known whether it judges. Say --teacher_name."
            )
        if len(self.models) > 1:
            said.append(f"the verdicts come from several models: {', '.join(self.models)}.")
        if not self.rows.are_held_out:
            said.append(
                "there is no test split, so all rows are judged. If the student was trained on them, say which were held out "
                "(--test_split_size, as in its recipe), or name others."
            )
        unanswered = len(self.rows.prompts) - len({pair.row for pair in self.pairs})
        if unanswered:
            said.append(f"{unanswered:,} of {len(self.rows.prompts):,} prompts have no answer of the student.")
        if self.cut:
            said.append(f"{self.cut:,} of the student's {len(self.pairs):,} answers were cut at --student_max_tokens.")
        return said + ([f"{self.stopped}. The same command goes on."] if self.stopped else [])

    @property
    def mean_characters(self) -> dict[str, float]:
        """Of an answer, as the judge is shown it."""
        return {
            side: sum(len(getattr(pair, side)) for pair in self.pairs) / len(self.pairs)
            for side in ("student", "teacher")
        }

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON has it: what is unknown is `None`."""
        metrics = {}
        for name, metric in self.measured.items():
            values = vars(metric) | metric.estimate._asdict() | metric.details | {"verdict": metric.verdict}
            del values["estimate"], values["details"]
            metrics[name] = {key: None if _is_nan(value) else value for key, value in values.items()}
        return {
            "student": self.settings.model,
            "teacher": self.teachers,
            "judge": self.judge.model,
            "judge_by_its_endpoint": self.models,
            "metrics": metrics,
            "mean_characters": self.mean_characters,
            "journal": vars(self.spent),
            "warnings": self.warnings,
        }

    def markdown(self) -> str:
        """The page."""
        lines = [f"# {escape(self.settings.model)} beside {escape(', '.join(self.teachers) or 'its teacher')}", ""]
        known = f", which it calls {', '.join(map(code, self.models))}" if self.models else ""
        lines += [f"Judge: {code(self.judge.model)} at {endpoint_family(self.judge.base_url)}{known}.", ""]
        for line in self.warnings:
            lines += [f"> Warning: {escape(line)}", ""]
        lines += [*table(HEAD, [self._row(name, metric) for name, metric in self.measured.items()]), "", READING, ""]
        lines += [f"* `{name}`: {metric.verdict}.{_details(metric)}" for name, metric in self.measured.items()]
        length = self.mean_characters
        spent = f"{self.spent.requests:,}, {self.spent.tokens:,} tokens"
        spent += f", {self._money(self.spent.cost)}" if self.judge.prompt_price is not None else ""
        lines += [
            f"* Characters of an answer: {length['student']:,.0f} of the student's, {length['teacher']:,.0f} of the teacher's.",
            f"* All requests of the journal: {spent}.",
        ]
        return "\n".join([*lines, ""])

    def _row(self, name: str, metric: Measured) -> list[str]:
        value, low, high = metric.estimate
        interval = "–" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
        cost = f"{metric.tokens:,} tokens" if metric.cost is None else self._money(metric.cost)
        shown = "–" if math.isnan(value) else f"{value:.3f}"
        return [
            code(name),
            shown,
            interval,
            f"{metric.prompts:,}",
            f"{metric.unparsable:,}",
            code(self.judge.model),
            cost,
        ]

    def _money(self, amount: float) -> str:
        return f"{amount:,.4f} {escape(self.judge.currency)}"


def is_same_model(name: str, other: str) -> bool:
    """Whether two names are of one model: whoever serves it, and with or without a date."""
    return _bare(name) == _bare(other)


def _bare(name: str) -> str:
    return DATE.sub("", name.lower().rstrip("/").rpartition("/")[2])


def verdict_lines(verdicts: list[Verdict], pairs: list[Pair]) -> str:
    """JSON Lines, one a verdict, by which a table can be worked out by hand."""
    lines = [
        {
            "row": pairs[verdict.pair].row,
            "pair": verdict.pair,
            "question": verdict.question,
            "first": "student" if verdict.student_is_first else "teacher",
            "state": verdict.state,
            "student": verdict.student,
            "teacher": verdict.teacher,
            "answer": pairs[verdict.pair].student,
            "judge": verdict.text,
        }
        for verdict in verdicts
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _details(metric: Measured) -> str:
    texts = [DETAILS[name].format(value) for name, value in metric.details.items() if not math.isnan(value)]
    missing = {FAILED: metric.failed, NOT_ASKED: metric.not_asked}
    texts += [f"{count:,} verdicts {state}" for state, count in missing.items() if count]
    text = ", ".join(texts)
    return f" {text[0].upper()}{text[1:]}." if text else ""


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
