"""Runs side by side: students that answered the same held-out prompts, with intervals of what each has and of their differences."""

import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.splitting import input_key
from ..errors import ComparisonError
from ..evaluation.diversity import Curve, SampledCurve, paired_difference_at_equal_diversity
from ..evaluation.intervals import interval_of_mean
from .held_out import HELD_OUT_NAME, read_held_out
from .markdown import code, escape, one_line, table
from .report import without_secrets
from .run_names import short_names
from .text_report import EQUAL_DIVERSITY, format_value, sense
from .uncertainty import paired_difference
from .verdicts import Difference, verdicts


EXAMPLES = 5
NLL = "teacher_nll"


@dataclass
class ComparedRun:
    """
    A finished run.

    Args:
        name (`str`):
            Its folder, as it was named.
        metrics (`dict`):
            Its `metrics.json`.
        lines (`list[dict]`):
            Of each prompt, as [`~reports.held_out.prompt_lines`] gives them, the prompts in the same order for all runs.
        settings (`dict`):
            Every setting that decides on its results, by name.
    """

    name: str
    metrics: dict
    lines: list[dict]
    settings: dict

    @property
    def method(self) -> str:
        return self.metrics["method"]

    @property
    def answers(self) -> list[dict]:
        """Of each prompt what its student said, and how good it was."""
        return [line["students"][self.method] for line in self.lines]

    def values(self, metric: str) -> list[float]:
        return [answers["values"][metric] for answers in self.answers]

    def weights(self, metric: str) -> list[float] | None:
        return [sum(line["teacher_tokens"]) for line in self.lines] if metric == NLL else None

    @property
    def temperatures(self) -> list[str]:
        """As metrics name them, the deciding one first."""
        return list(self.answers[0]["samples"])

    @property
    def samples(self) -> int:
        """Of each prompt, at a temperature that draws."""
        return max(map(len, self.answers[0]["samples"].values()))

    def curve(self, metric: str, samples: int | None = None) -> SampledCurve:
        """Of the first `samples` to each prompt, or of all: among more samples fewer n-grams are distinct."""
        return SampledCurve(
            [[answers["samples"][at][:samples] for answers in self.answers] for at in self.temperatures],
            [self.values(f"{metric}@{at}") for at in self.temperatures],
        )


def read_runs(folders: Sequence[str]) -> list[ComparedRun]:
    """
    Read runs, and put their prompts into one order.

    Raises:
        [`~errors.ComparisonError`]: a folder has no finished run of a student that writes text, or runs were measured on different
            test rows.
    """
    if len(folders) < 2 or len({*map(os.path.realpath, folders)}) < len(folders):
        raise ComparisonError("compare takes the folders of at least two runs, each once.")
    runs = [_read_run(folder) for folder in folders]
    first = {_key(line): number for number, line in enumerate(runs[0].lines)}
    for run in runs[1:]:
        keys = [_key(line) for line in run.lines]
        if {*keys} != {*first}:
            shared = len(first.keys() & {*keys})
            raise ComparisonError(
                f"{run.name} and {runs[0].name} were measured on different test rows: {len(keys)} and {len(first)} prompts, of which "
                f"{shared} are in both with the same answers. Train both with the same dataset_name and eval_prompts."
            )
        run.lines.sort(key=lambda line: first[_key(line)])
    return runs


def _key(line: dict) -> str:
    return input_key([line["prompt"], line["teacher"]])


def _read_run(folder: str) -> ComparedRun:
    path = Path(folder)
    try:
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        lines = read_held_out(path)
        progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))["settings"]
        settings = {key: value for part in ("arguments", "script", "model") for key, value in progress[part].items()}
        settings |= {key: progress[key] for key in ("method", "processes", "model_name_or_path", "dataset_name")}
        _require(metrics, "method", "headline", "results")
        for line in lines:
            _require(line, "prompt", "teacher", "teacher_tokens", "students")
        has_answers = bool(lines) and all(metrics["method"] in line["students"] for line in lines)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        why = (
            "no run has finished there"
            if missing == "metrics.json"
            else "it is of an older version, or its student is a classifier"
        )
        raise ComparisonError(
            f"{folder} has no {missing}: {why}. Name the output_dir of a finished run whose student writes text."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(
            f"{folder} cannot be read ({one_line(error)}). Name the output_dir of a finished run."
        ) from error
    if not has_answers:
        raise ComparisonError(f"{folder}/{HELD_OUT_NAME} has no answers of its student. Finish that run first.")
    return ComparedRun(str(folder), metrics, lines, without_secrets(settings))


def _require(found: dict, *keys: str) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        raise KeyError(f"no {', '.join(missing)}")


class Comparison:
    """
    Runs beside the first one.

    Args:
        runs (`list[ComparedRun]`):
            At least two, of [`read_runs`].
        metrics (`Sequence[str]`, *optional*):
            Which to tell of, by their names or what stands before the temperature; `()` is all that every run has.

    Raises:
        [`~errors.ComparisonError`]: a metric that not every run has.
    """

    def __init__(self, runs: list[ComparedRun], metrics: Sequence[str] = ()):
        self.runs = runs
        self.names = short_names([run.name for run in runs])
        known = [
            name for name in runs[0].answers[0]["values"] if all(name in run.answers[0]["values"] for run in runs)
        ]
        self.has_one_tokenizer = all(
            [line["teacher_tokens"] for line in run.lines] == [line["teacher_tokens"] for line in runs[0].lines]
            for run in runs
        )
        if not self.has_one_tokenizer:
            known = [name for name in known if name != NLL and not name.startswith("length")]
        self.samples = min(run.samples for run in runs)
        self.has_as_many_samples = all(run.samples == self.samples for run in runs)
        if not self.has_as_many_samples:
            known = [name for name in known if not name.startswith(("distinct_valid", "distinct_share"))]
        if not all(map(self._counts_valid_answers, runs)):
            known = [name for name in known if not name.startswith("distinct_valid")]
        for metric in metrics:
            if not any(metric in (name, name.partition("@")[0]) for name in known):
                raise ComparisonError(f"--metric {metric}: not every run has it. All have: {', '.join(known)}.")
        known = [name for name in known if not metrics or {name, name.partition("@")[0]} & {*metrics}]
        self.deciding = {name for name in known if name in metrics or self._is_deciding(name)}
        kinds = list(dict.fromkeys(name.partition("@")[0] for name in known))
        kinds.sort(key=lambda kind: not sense(kind))
        self.metrics = sorted(known, key=lambda name: (name not in self.deciding, kinds.index(name.partition("@")[0])))
        judges = {self._judged(run) for run in runs}
        self.judged = judges.pop() if len(judges) == 1 else None
        self.tells_of_the_judge = not metrics or any(name.partition("@")[0] == self.judged for name in metrics)

    @staticmethod
    def _judged(run: ComparedRun) -> str | None:
        """The judge's deciding metric."""
        name = run.metrics["headline"]
        return None if name == NLL else name.partition("@")[0]

    @classmethod
    def _counts_valid_answers(cls, run: ComparedRun) -> bool:
        """Whether its judge gives 0 or 1: each prompt's mean is a share of its answers."""
        judged, at = cls._judged(run), run.temperatures[0]
        if judged is None:
            return False
        means = np.array(run.values(f"{judged}@{at}"))
        right = means * [len(answers["samples"][at]) for answers in run.answers]
        return bool(((means >= 0) & (means <= 1)).all() and np.allclose(right, right.round()))

    def _is_deciding(self, metric: str) -> bool:
        """Whether it is of the deciding temperature or of none. Where no answer is cut, that decides nothing."""
        name, _, at = metric.partition("@")
        is_seen = name != "truncated" or any(any(run.values(metric)) for run in self.runs)
        return at in ("", self.runs[0].temperatures[0]) and is_seen

    @property
    def headline(self) -> str:
        """What the curves are of."""
        found = {run.metrics["headline"] for run in self.runs}
        return found.pop() if len(found) == 1 else NLL

    def table(self) -> list[list[str]]:
        """A line for each metric, those that decide first: its label, then each run's value with its interval."""
        return [[label_of(name), *(self._value(run, name) for run in self.runs)] for name in self.metrics]

    def _value(self, run: ComparedRun, metric: str) -> str:
        value = run.metrics["results"][run.method].get(metric)
        low, high = (end * _scale(metric, run) for end in interval_of_mean(run.values(metric), run.weights(metric)))
        text = format_value(metric, value)
        return text if math.isnan(low) else f"{text} ({format_value(metric, low)} to {format_value(metric, high)})"

    @functools.cached_property
    def found(self) -> list[list[Difference]]:
        """Of each run but the first, how far it is from the first by each metric."""
        return [self._found(run) for run in self.runs[1:]]

    def _found(self, run: ComparedRun) -> list[Difference]:
        lines = [
            Difference(label_of(name), name, self.difference(run, name), name in self.deciding)
            for name in self.metrics
        ]
        if self.judged and self.tells_of_the_judge:
            lines.insert(0, Difference(EQUAL_DIVERSITY, "", self.at_equal_diversity(run)))
        return lines

    def differences(self) -> list[list[str]]:
        """A line for each metric: its label, then how far each run is from the first."""
        return [[line[0].label, *(str(difference) for difference in line)] for line in zip(*self.found, strict=True)]

    def difference(self, run: ComparedRun, metric: str) -> dict[str, float]:
        """How far a run is from the first one: of [`~reports.uncertainty.paired_difference`]."""
        found = paired_difference(run.values(metric), self.runs[0].values(metric), run.weights(metric))
        return {name: value * _scale(metric, run) for name, value in found.items()}

    def at_equal_diversity(self, run: ComparedRun) -> dict[str, float]:
        first = self.runs[0]
        if len(run.temperatures) < 2 or len(first.temperatures) < 2:
            return {}
        curves = run.curve(self.judged, self.samples), first.curve(self.judged, self.samples)
        return paired_difference_at_equal_diversity(*curves, len(run.lines))

    def diversity_curve(self, run: ComparedRun) -> Curve:
        """Diversity and judged quality at each temperature."""
        return run.curve(self.judged, self.samples)(np.arange(len(run.lines))) if self.judged else []

    def settings(self) -> list[list[str]]:
        """A line for each setting that differs: its name, then each run's value."""
        names = dict.fromkeys(name for run in self.runs for name in run.settings)
        named = {name for run in self.runs for name in run.metrics.get("settings", {})}
        lines = []
        for name in sorted(names):
            values = [json.dumps(run.settings[name]) if name in run.settings else "–" for run in self.runs]
            # What only one of two methods has is told where a recipe names it
            if len({*values}) > 1 and ("–" not in values or name in named):
                lines.append([name, *values])
        return lines

    def examples(self) -> list[dict]:
        """The first prompts with the teacher's answer and each run's: the greedy one, or the first sample."""
        found = []
        for number, line in enumerate(self.runs[0].lines[:EXAMPLES]):
            answers = {}
            for name, run in zip(self.names, self.runs, strict=True):
                samples = run.answers[number]["samples"]
                answers[name] = samples.get("greedy", next(iter(samples.values())))[0]
            found.append({"prompt": prompt_text(line["prompt"]), "teacher": line["teacher"][0], "answers": answers})
        return found

    @property
    def explanation(self) -> str:
        prompts = len(self.runs[0].lines)
        text = (
            f"Measured on the same {prompts} held-out prompts, with 95 % intervals over prompts drawn anew (none with fewer than 6). "
            "They say nothing of another seed of the training. Where two students do not differ, about one interval in 20 says that they do."
        )
        if not self.has_as_many_samples:
            text += (
                f" They were sampled differently often: numbers of distinct answers are left out, and diversity is that of {self.samples} "
                "answers a prompt."
            )
        if not self.has_one_tokenizer:
            text += " The students have different tokenizers: lengths and NLL, which count tokens, are left out."
        return text

    def markdown(self) -> str:
        names = [escape(name) for name in self.names]
        lines = ["# Comparison", "", *(f"* {text}" for text in verdicts(self.found, names)), "", self.explanation, ""]
        lines += [
            f"* {name} is the run of {run.method} in {code(run.name)}."
            for name, run in zip(names, self.runs, strict=True)
        ]
        lines += ["", "## Values", "", *table(["", *names], self.table()), ""]
        lines += ["## Differences", "", *table([f"less {names[0]}", *names[1:]], self.differences()), ""]
        if self.judged:
            lines += [equal_diversity_explained(self.judged), ""]
        if self.settings():
            rows = [[escape(name), *map(code, values)] for name, *values in self.settings()]
            lines += ["## Settings that differ", "", *table(["", *names], rows), ""]
        lines += ["## Answers", ""]
        for example in self.examples():
            lines += [f"* prompt: {code(example['prompt'])}", f"    * teacher: {code(example['teacher'])}"]
            lines += [f"    * {escape(name)}: {code(answer)}" for name, answer in example["answers"].items()]
        return "\n".join(lines) + "\n"


def equal_diversity_explained(judged: str) -> str:
    return (
        f"Quality at equal diversity is the mean difference of `{judged}` where both students' answers, sampled at several "
        "temperatures, have as many distinct 4-grams: sampling colder gains nothing there."
    )


def prompt_text(prompt) -> str:
    """A prompt on the page: messages one after the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def label_of(metric: str) -> str:
    """As the report's table names it."""
    name, _, at = metric.partition("@")
    name = {NLL: "teacher NLL", "distinct_valid": "distinct valid answers", "distinct_share": "distinct answers"}.get(
        name, name
    )
    return f"{name}, {at.replace('t', 'T=') if at != 'greedy' else at}" if at else name


def _scale(metric: str, run: ComparedRun) -> float:
    """A number of answers is a sum over prompts, all else a mean."""
    return len(run.lines) if metric.startswith("distinct_valid") else 1
