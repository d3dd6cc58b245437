"""A judge's verdicts along a training: asked by the main process, each once, and kept beside the student."""

import asyncio
import math
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from ..collect.command import key_of
from ..collect.journal import Journal
from ..errors import DistillationError, RecipeError
from ..host.files import write_atomically
from .asking import GOES_ON, UNPARSABLE, Calls, ask_judge, read_verdicts
from .measures import Measured, measure
from .pairs import Pair, make_pairs, prompts_of, teachers_beside_themselves
from .reading import refuse_names
from .report import is_same_model, verdict_lines
from .settings import EvalJudgeConfig
from .verdicts import METRICS, request_text, shown_answer


FOLDER = "judge"
Result = TypeVar("Result")


@dataclass
class Judged:
    """
    What a judge says of one student.

    Attributes:
        measured (`dict[str, Measured]`): the metrics whose pairs were all asked about.
        problem (`str` or `None`): why there are no others.
    """

    measured: dict[str, Measured] = field(default_factory=dict)
    problem: str | None = None

    @property
    def values(self) -> dict[str, float]:
        """Each metric, the ends of its interval where it has one, and how many verdicts are missing."""
        found: dict[str, float] = {}
        for name, metric in self.measured.items():
            value, low, high = metric.estimate
            found |= {name: value} | ({} if math.isnan(low) else {f"{name}_low": low, f"{name}_high": high})
        if found:
            by_question = {METRICS[name].name: metric for name, metric in self.measured.items()}
            found["judge_missing"] = sum(metric.unparsable + metric.failed for metric in by_question.values())
        return found


class TrainingJudge:
    """
    A judge of the students of one run.

    Args:
        config ([`~judging.settings.EvalJudgeConfig`]):
            The judge.
        output_dir (`str`):
            Folder of the run. Journal and verdicts are in `judge/` there.
        rows ([`~datasets.Dataset`] or `list[dict]`):
            Held-out rows with `prompt` and the teacher's `completion`.

    Raises:
        [`~errors.TeacherDataError`]: the rows cannot be used.
        [`~errors.RecipeError`]: the environment has no key.
    """

    def __init__(self, config: EvalJudgeConfig, output_dir: str, rows: Dataset | list[dict]):
        self.config = config
        self.folder = Path(output_dir) / FOLDER
        self.prompts, teachers = prompts_of(
            rows if isinstance(rows, Dataset) else Dataset.from_list(rows), config.max_prompts
        )
        self.teachers = [config.teacher_name] if config.teacher_name else teachers
        self.questions = list(dict.fromkeys(METRICS[name] for name in config.metrics))
        self._key = key_of(config)

    @property
    def requests(self) -> int:
        """Of one evaluation, where the journal has nothing."""
        return 2 * len(self.questions) * len(self.prompts)

    @property
    def is_the_teacher(self) -> bool:
        return any(is_same_model(name, self.config.model) for name in self.teachers)

    def refuse_names(self, metric: str | None, others: Callable[[], Collection[str]]) -> None:
        """[`~judging.reading.refuse_names`], of names that the main process finds. All processes call this."""
        refuse_names(metric, self.config, on_the_main_process(others))

    def check(self) -> None:
        """
        Ask about a few of the teacher's answers, each beside itself, before anything is trained. All processes call this.

        Raises:
            [`~errors.EndpointError`]: the judge refuses, cannot be reached, or says nothing that can be read.
            [`~errors.RecipeError`]: a cap leaves no request for it.
        """

        def ask() -> DistillationError | None:
            try:
                end, _ = self._asked(teachers_beside_themselves(self.prompts))
            except DistillationError as error:
                return type(error)(f"eval_judge: {_in_a_training(error)}")
            if end is not None:
                return RecipeError(
                    f"eval_judge.{end}: {getattr(self.config, end):g} is reached before the judge's first verdicts are there. "
                    "Raise it."
                )
            return None

        error = on_the_main_process(ask)
        if error is not None:
            raise error

    def judge(self, answers: dict[str, list[str]], name: str) -> Judged:
        """
        Have a student's answers judged beside the teacher's.

        Args:
            answers (`dict[str, list[str]]`):
                By the prompts' keys.
            name (`str`):
                Of the file of verdicts.
        """
        return self.judge_pairs(make_pairs(self.prompts, answers), name)

    def judge_pairs(self, pairs: list[Pair], name: str) -> Judged:
        """As [`TrainingJudge.judge`], of pairs of answers."""
        try:
            end, verdicts = self._asked(pairs)
        except DistillationError as error:
            return Judged(problem=_in_a_training(error))
        write_atomically(self.folder / f"{name}.jsonl", verdict_lines(verdicts, pairs))
        measured = {metric: measure(metric, verdicts, pairs, self.config) for metric in self.config.metrics}
        # Students that were judged by different prompts could not be compared
        whole = {metric: found for metric, found in measured.items() if found.pairs and not found.not_asked}
        problem = None
        if len(whole) < len(measured):
            unread = sum(verdict.state == UNPARSABLE for verdict in verdicts)
            problem = (
                f"{end}={getattr(self.config, end):g} is reached."
                if end
                else f"no pair has a readable verdict in both orders; {unread:,} of {len(verdicts):,} cannot be read."
            )
        return Judged(whole, problem)

    def report(self, lines: list[dict], students: list[str], at: str) -> tuple[dict, list[str]]:
        """
        Have the students of a run judged, after it is said what is asked for. The main process alone calls this.

        Args:
            lines (`list[dict]`):
                What they said, as [`~reports.held_out.prompt_lines`] has it.
            students (`list[str]`):
                Their names.
            at (`str`):
                Name of the temperature whose first sample is judged.

        Returns:
            `tuple`: what the report has, and what went wrong.
        """
        lines = lines[: self.config.max_prompts]
        each = 2 * len(self.questions) * len(lines)
        print(
            f"eval_judge: for the report, at most {each * len(students):,} requests to {self.config.model}, {each:,} of each "
            f"student. What {self.folder} has is not asked again."
        )
        found, problems, missing = {}, [], 0
        for student in students:
            pairs = []
            for line in lines:
                place = f"Row {line['rows'][0]}"
                own, teacher = line["students"][student]["samples"][at][0], line["teacher"][0]
                shown = [shown_answer(text, place) for text in (own, teacher)]
                pairs.append(Pair(line["rows"][0], request_text(line["prompt"], place), *shown))
            judged = self.judge_pairs(pairs, f"report-{student}")
            if judged.problem:
                problems.append(f"the judge did not compare all of {student}'s answers: {judged.problem}")
            missing += int(judged.values.get("judge_missing", 0))
            found[student] = {
                name: {**metric.estimate._asdict(), "prompts": metric.prompts, "unparsable": metric.unparsable}
                | {"failed": metric.failed, "verdict": metric.verdict}
                for name, metric in judged.measured.items()
            }
        return {"judge": self.config.model, "students": found, "missing": missing}, problems

    def _asked(self, pairs: list[Pair]):
        """The cap that was reached, if any, and the verdicts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        calls = Calls(pairs, self.questions)
        path = Path(self.config.journal).expanduser() if self.config.journal else self.folder / "journal.sqlite"

        def ask():
            # Open for as long as it is written alone: another command may read on between two evaluations
            with Journal(path) as journal:
                return ask_judge(self.config, calls, journal, self._key), read_verdicts(self.config, calls, journal)

        end, verdicts = beside_a_loop(ask)
        if end is not None and end.kind == "interrupt":
            raise KeyboardInterrupt
        return None if end is None else end.text, verdicts


def on_the_main_process(work: Callable[[], Result]) -> Result:
    """What `work` returns there, on every process."""
    found: list[Any] = [work() if PartialState().is_main_process else None]
    broadcast_object_list(found)
    return found[0]


def beside_a_loop(work: Callable[[], Result]) -> Result:
    """Call what runs an event loop; in a thread of its own where one is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def _in_a_training(error: DistillationError) -> str:
    """An error of `trl-bbkd evaluate`, without what only its command line has."""
    return str(error).removesuffix(GOES_ON).replace("--max_tokens", "max_tokens")
