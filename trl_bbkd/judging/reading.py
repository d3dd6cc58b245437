"""The command line of `trl-bbkd evaluate`, and the key `eval_judge` of recipes. Imports nothing heavy."""

import argparse
from collections.abc import Collection
from dataclasses import fields
from typing import Any, get_type_hints

from ..collect.reading import KEY_ADVICE, NAMES_ELSEWHERE, add_keys, is_a_key, values_of_options
from ..errors import RecipeError
from ..runs.key_names import nearest
from ..runs.recipe_file import convert
from .settings import (
    EVAL_JUDGE_KEYS,
    JUDGE_KEYS,
    METRIC_NAMES,
    OWN_KEYS,
    EvalJudgeConfig,
    EvaluateConfig,
    JudgeConfig,
)


PREFIX = "eval_"
NEEDED = ("data", "judge", "base_url", "output_dir")
# A message of the judge's settings, by the option that says it here
OPTION_OF = {"model": "judge", "dataset_name": "data"}
WHAT = {
    "data": "the teacher's rows, a file, a folder or a Hub id",
    "judge": "the judge, by the endpoint's name for it",
    "base_url": "the address of the judge's endpoint, such as https://api.openai.com/v1",
    "output_dir": "the folder of the table, the verdicts and the journal",
}

EVAL_JUDGE_NAMES = NAMES_ELSEWHERE | {
    **dict.fromkeys(("judge", "judge_model"), ("model",)),
    **dict.fromkeys(("prompts", "num_prompts", "eval_prompts", "limit", "max_samples"), ("max_prompts",)),
    **dict.fromkeys(("max_new_tokens", "max_completion_length"), ("student_max_tokens",)),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """All options of the command."""
    given: dict[str, Any] = {"metavar": "VALUE", "default": argparse.SUPPRESS}
    for name in ("data", "judge", "output_dir"):
        parser.add_argument(f"--{name}", help=f"{WHAT[name][0].upper()}{WHAT[name][1:]}.", **given)
    parser.add_argument(
        "--metric",
        dest="metrics",
        action="append",
        help=f"One of {', '.join(METRIC_NAMES)}; may be repeated. All by default.",
        **given,
    )
    add_keys(parser, EvaluateConfig, OWN_KEYS)
    add_keys(parser.add_argument_group("the judge's endpoint, as for `trl-bbkd collect`"), JudgeConfig, JUDGE_KEYS)


def option_names() -> list[str]:
    return [*NEEDED, "metric", *OWN_KEYS, *JUDGE_KEYS]


def read_options(options: dict[str, Any]) -> EvaluateConfig:
    """
    Check what the command line says.

    Args:
        options (`dict[str, Any]`):
            The options that were given, as text, and `model`.

    Raises:
        [`~errors.RecipeError`]: for the first thing that is wrong.
    """
    missing = next((name for name in NEEDED if not options.get(name, "").strip()), None)
    if missing:
        raise RecipeError(f"--{missing} is missing: {WHAT[missing]}.")
    endpoint = values_of_options(JudgeConfig, {name: options[name] for name in JUDGE_KEYS if name in options})
    own = values_of_options(EvaluateConfig, {name: options[name] for name in OWN_KEYS if name in options})
    if "metrics" in options:
        own["metrics"] = tuple(dict.fromkeys(options["metrics"]))
    try:
        judge = JudgeConfig(
            model=options["judge"], dataset_name=options["data"], output_dir=options["output_dir"], **endpoint
        )
        return EvaluateConfig(model=options["model"], data=options["data"], judge=judge, **own)
    except ValueError as error:
        name, _, text = str(error).partition(":")
        raise RecipeError(f"--{OPTION_OF.get(name, name)}:{text}") from error


def read_eval_judge(values: dict[str, Any]) -> EvalJudgeConfig:
    """
    Check what a recipe's `eval_judge` says.

    Raises:
        [`~errors.RecipeError`]: for the first thing that is wrong; the message begins with its key, `eval_judge.max_cost: `.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"eval_judge: expected keys and values, such as `model` and `base_url`, got {values!r}.")
    checked = {}
    hints, choices = get_type_hints(EvalJudgeConfig), {}
    for entry in fields(EvalJudgeConfig):
        choices[entry.name] = entry.metadata.get("choices")
    for name, value in values.items():
        if is_a_key(name):
            raise RecipeError(f"eval_judge.{name}: {KEY_ADVICE}")
        if name not in EVAL_JUDGE_KEYS:
            raise RecipeError(
                f"eval_judge.{name}: unknown key {name!r}{nearest(str(name), EVAL_JUDGE_KEYS, EVAL_JUDGE_NAMES)}"
            )
        try:
            checked[name] = convert(value, hints[name], choices[name])
        except ValueError as error:
            raise RecipeError(f"eval_judge.{name}: {error}") from error
    for name, what in (("model", WHAT["judge"]), ("base_url", WHAT["base_url"])):
        if not checked.get(name):
            raise RecipeError(f"eval_judge.{name}: it is missing: {what}.")
    try:
        return EvalJudgeConfig(**checked)
    except ValueError as error:
        raise RecipeError(f"eval_judge.{error}") from error


def refuse_unjudged(args: Any, judge: EvalJudgeConfig | None) -> None:
    """
    Refuse to choose the best checkpoint by what no judge says, or the worst one.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the training.
        judge ([`~judging.settings.EvalJudgeConfig`], *optional*):
            The judge.

    Raises:
        [`~errors.RecipeError`]: `metric_for_best_model` is one of a judge's metrics, and there is no such judge, or nothing that it
            is asked of, or less of it is to be better.
    """
    metric = args.metric_for_best_model
    name = (metric or "").removeprefix(PREFIX)
    if name not in METRIC_NAMES:
        return
    if judge is None:
        raise RecipeError(f"metric_for_best_model={metric!r} is what a judge says. Name one with `eval_judge`.")
    if name not in judge.metrics:
        raise RecipeError(
            f"metric_for_best_model={metric!r} is not asked for: add {name} to `metrics` of `eval_judge`, which are "
            f"{', '.join(judge.metrics)}."
        )
    if args.eval_strategy == "no":
        raise RecipeError(
            f"metric_for_best_model={metric!r} is judged at evaluations, and there are none. Set `eval_strategy: steps` and "
            "`eval_steps`."
        )
    if args.greater_is_better is False:
        raise RecipeError(
            f"greater_is_better=False with metric_for_best_model={metric!r} would keep the student that the judge likes least. Take "
            "greater_is_better out."
        )


def refuse_names(metric: str | None, judge: EvalJudgeConfig, others: Collection[str]) -> None:
    """
    Refuse two metrics of one name, and a name that is nearly a judge's.

    Args:
        metric (`str`, *optional*):
            `metric_for_best_model`.
        judge ([`~judging.settings.EvalJudgeConfig`]):
            The judge.
        others (`Collection[str]`):
            Names of the metrics that `sample_metrics` returns.

    Raises:
        [`~errors.RecipeError`]: for the first such name.
    """
    for name in judge.metrics:
        if name in others:
            raise RecipeError(
                f"sample_metrics returns a metric {name!r}, and eval_judge.metrics names {name!r} too: both would be {PREFIX}{name}. "
                "Rename the one of sample_metrics, or take it out of eval_judge.metrics."
            )
    name = (metric or "").removeprefix(PREFIX)
    if name and name not in METRIC_NAMES and name not in others:
        near = nearest(name, METRIC_NAMES, {})
        if near != ".":
            raise RecipeError(f"metric_for_best_model={metric!r} is nothing that eval_judge says{near}")
