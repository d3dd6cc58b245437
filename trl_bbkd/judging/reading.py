"""The command line of `trl-bbkd evaluate`. Imports nothing heavy."""

import argparse
from typing import Any

from ..collect.reading import add_keys, values_of_options
from ..errors import RecipeError
from .settings import JUDGE_KEYS, METRIC_NAMES, OWN_KEYS, EvaluateConfig, JudgeConfig


NEEDED = ("data", "judge", "base_url", "output_dir")
# A message of the judge's settings, by the option that says it here
OPTION_OF = {"model": "judge", "dataset_name": "data"}
WHAT = {
    "data": "the teacher's rows, a file, a folder or a Hub id",
    "judge": "the judge, by the endpoint's name for it",
    "base_url": "the address of the judge's endpoint, such as https://api.openai.com/v1",
    "output_dir": "the folder of the table, the verdicts and the journal",
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
