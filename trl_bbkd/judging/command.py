"""`trl-bbkd evaluate`: a judge compares a student's answers with its teacher's."""

import json
import sys
from pathlib import Path

from ..collect.command import key_of
from ..errors import EndpointError, RecipeError
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
    from .measures import measure
    from .pairs import make_pairs, read_teacher_rows, teachers_beside_themselves
    from .report import Evaluation, verdict_lines
    from .student import check_student, is_to_be_sampled, student_answers

    folder = Path(judge.output_dir).expanduser()
    rows = read_teacher_rows(settings)
    make_folder(folder)
    questions = list(dict.fromkeys(METRICS[name] for name in settings.metrics))
    with Journal(Path(judge.journal).expanduser() if judge.journal else folder / "journal.sqlite") as journal:
        if is_to_be_sampled(settings, rows.prompts, folder):
            # Before the student writes for minutes: a judge that cannot be asked is an error; and before it is paid: the student
            check_student(settings, rows.prompts)
            end = ask_judge(judge, Calls(teachers_beside_themselves(rows.prompts), questions), journal, key)
            if end is not None and end.kind == "interrupt":
                return False
            if end is not None:
                raise RecipeError(
                    f"--{end.text}: {getattr(judge, end.text):g} is reached before the judge's first verdicts are there. Raise it."
                )
        answers, cut = student_answers(settings, rows.prompts, folder)
        pairs = make_pairs(rows.prompts, answers)
        _say(f"{len(pairs):,} pairs of answers, to {len(answers):,} prompts.")
        calls = Calls(pairs, questions)
        end = ask_judge(judge, calls, journal, key)
        verdicts = read_verdicts(judge, calls, journal)
        spent = journal.spent()
    if end is not None and end.kind == "interrupt":
        return False
    write_atomically(folder / VERDICTS, verdict_lines(verdicts, pairs))
    stopped = None if end is None else f"stopped at --{end.text} {getattr(judge, end.text):g}"
    measured = {name: measure(name, verdicts, pairs, judge) for name in settings.metrics}
    if not any(metric.pairs for metric in measured.values()):
        why = stopped or f"see {folder / VERDICTS}"
        raise EndpointError(f"no pair of answers has a readable verdict in both orders: {why}.")
    evaluation = Evaluation(settings, rows, pairs, cut, verdicts, measured, spent, stopped)
    write_atomically(folder / JSON, json.dumps(evaluation.as_json(), indent=2, ensure_ascii=False) + "\n")
    page = evaluation.markdown()
    write_atomically(folder / TABLE, page)
    for line in evaluation.warnings:
        _say(f"Warning: {line}")
    print(page, end="")
    _say(f"Written to {folder / TABLE}.")
    return True


def make_folder(folder: Path) -> None:
    """
    Make the folder of `--output_dir`, or one in it.

    Raises:
        [`~errors.RecipeError`]: there cannot be one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--output_dir {folder} cannot be used: {error.strerror}. Name another folder.") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
