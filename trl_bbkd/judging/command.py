"""`trl-bbkd evaluate`: a judge compares a student's answers with its teacher's."""

import json
import sys
from collections import Counter
from pathlib import Path

from ..collect.command import key_of
from ..errors import EndpointError
from .settings import EvaluateConfig
from .verdicts import METRICS


TABLE, JSON, VERDICTS = "evaluation.md", "evaluation.json", "verdicts.jsonl"


def evaluate(settings: EvaluateConfig) -> bool:
    """
    Ask for the verdicts that are missing, and write the table of those that are there.

    Args:
        settings ([`~judging.settings.EvaluateConfig`]):
            Student, rows and judge.

    Returns:
        `bool`: whether the run came to its end, or to a cap, and was not interrupted.

    Raises:
        [`~errors.DistillationError`]: something in the settings, the rows, the student or the journal does not fit, or the
            judge refuses. What was answered before is kept.
    """
    judge = settings.judge
    key = key_of(judge)
    # Only now: what reads data sets and models takes seconds to import
    from ..collect.journal import Journal
    from ..host.files import write_atomically
    from .asking import Calls, ask_judge, read_verdicts
    from .pairs import make_pairs, read_teacher_rows
    from .report import as_json, markdown, measure
    from .student import student_answers

    folder = Path(judge.output_dir).expanduser()
    teacher_rows = read_teacher_rows(settings)
    folder.mkdir(parents=True, exist_ok=True)
    answers, cut = student_answers(settings, teacher_rows.prompts, folder)
    pairs = make_pairs(teacher_rows.prompts, answers)
    calls = Calls(pairs, list(dict.fromkeys(METRICS[name] for name in settings.metrics)))
    _say(f"{len(pairs):,} pairs of answers to {len(answers):,} prompts.")
    with Journal(Path(judge.journal).expanduser() if judge.journal else folder / "journal.sqlite") as journal:
        end = ask_judge(judge, calls, journal, key)
        verdicts = read_verdicts(judge, calls, journal)
        spent = journal.spent()
    if end is not None and end.kind == "interrupt":
        return False
    measured = {name: measure(name, verdicts, pairs, judge) for name in settings.metrics}
    stopped = f"stopped at `--{end.text} {getattr(judge, end.text):g}`" if end is not None else ""
    if not any(metric.pairs for metric in measured.values()):
        why = stopped or "the judge's endpoint refused all requests: see verdicts.jsonl"
        _write_verdicts(folder, verdicts, pairs)
        raise EndpointError(f"no pair has a verdict in both orders: {why}.")

    models = Counter(verdict.entry.model for verdict in verdicts if verdict.entry and verdict.entry.model)
    teachers = [settings.teacher_name] if settings.teacher_name else teacher_rows.teachers
    warnings = _warnings(judge.model, models, teachers)
    if not teacher_rows.are_held_out:
        warnings.append(
            "there is no test split, so that all rows are judged. If the student was trained on them, say which were held out "
            "(--test_split_size as in its recipe), or name others."
        )
    unanswered = len(teacher_rows.prompts) - len(answers)
    if unanswered:
        warnings.append(f"{unanswered:,} of {len(teacher_rows.prompts):,} prompts have no answer of the student.")
    if cut:
        warnings.append(f"{cut:,} of {len(pairs):,} answers were cut at --student_max_tokens.")
    if stopped:
        warnings.append(f"{stopped}; the same command goes on.")
    lengths = [sum(len(pair[side]) for pair in pairs) / len(pairs) for side in (2, 3)]
    cost = f", {spent.cost:,.4f} {judge.currency}" if judge.prompt_price is not None else ""
    facts = [
        f"Characters of an answer: {lengths[0]:,.0f} of the student's, {lengths[1]:,.0f} of the teacher's.",
        f"All requests of the journal: {spent.requests:,}, {spent.tokens:,} tokens{cost}.",
    ]
    if models:
        facts.append(f"The endpoint calls the judge {', '.join(models)}.")
    teacher = ", ".join(teachers) or "the teacher"
    page = markdown(measured, judge, settings.model, teacher, facts, warnings)
    found = {
        "student": settings.model,
        "teacher": teachers,
        "judge": judge.model,
        "judge_by_its_endpoint": list(models),
        "metrics": as_json(measured),
        "mean_characters": {"student": lengths[0], "teacher": lengths[1]},
        "journal": vars(spent),
        "warnings": warnings,
    }
    _write_verdicts(folder, verdicts, pairs)
    write_atomically(folder / JSON, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / TABLE, page)
    for line in warnings:
        _say(f"Warning: {line}")
    print(page, end="")
    _say(f"Written to {folder / TABLE}.")
    return True


def _write_verdicts(folder: Path, verdicts, pairs) -> None:
    """One line a verdict: by it the table can be worked out by hand."""
    from ..host.files import write_atomically

    lines = [
        {
            "row": pairs[verdict.pair].row,
            "pair": verdict.pair,
            "question": verdict.question,
            "first": "student" if verdict.student_is_first else "teacher",
            "state": verdict.state,
            "student": verdict.student,
            "teacher": verdict.teacher,
            "judge_said": verdict.text,
        }
        for verdict in verdicts
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(folder / VERDICTS, text)


def _warnings(judge: str, models: Counter, teachers: list[str]) -> list[str]:
    from .report import is_same_model

    said = []
    if len(models) > 1:
        said.append(f"the verdicts come from several models: {', '.join(models)}.")
    names = [judge, *models]
    own = next((teacher for teacher in teachers if any(is_same_model(name, teacher) for name in names)), None)
    if own is not None:
        said.append(f"the judge is the teacher, {own}: it may favour its own answers. Ask another judge too.")
    if not teachers:
        said.append(
            "the teacher's name is not known, so that a judge that is the teacher goes unnoticed. Say --teacher_name."
        )
    return said


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
