"""`trl-bbkd plan`: what a recipe takes on GPUs."""

import argparse

from ..errors import DistillationError
from .ends import exit_with_error, pass_over_known_noise
from .train import OVERRIDES_HELP, RECIPE_HELP


def add_parser(commands) -> argparse.ArgumentParser:
    plan = commands.add_parser(
        "plan",
        help="say what a recipe takes on GPUs, before it is trained",
        usage="trl-bbkd plan RECIPE [--gpus N] [--gpu_memory GIB] [options] [overrides]",
        description="Say what a recipe takes on GPUs: memory, what fits, the largest batch, time. Configurations are read, no "
        f"weights. Beside these options stand {OVERRIDES_HELP.partition(';')[0]}.",
        allow_abbrev=False,
    )
    plan.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    plan.add_argument("--gpus", type=more_than(0, int), default=1, metavar="N", help="GPUs of the run, 1 by default")
    positive = more_than(0.0, float)
    plan.add_argument("--gpu_memory", type=positive, default=80, metavar="GIB", help="GiB of each, 80 by default")
    plan.add_argument(
        "--rows", type=more_than(0, int), metavar="N", help="training rows, where no file of them is here"
    )
    plan.add_argument(
        "--tflops", type=positive, default=989, help="of a GPU at most: 989 by default, an H100's in bfloat16"
    )
    plan.add_argument(
        "--utilization", type=positive, default=0.4, help="share of it that a run reaches: 0.4 by default"
    )
    plan.error = exit_with_error
    plan.set_defaults(own_options={*plan._option_string_actions})
    return plan


def more_than(least: float, kind: type):
    """A parser of numbers of a kind that are larger than `least`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = least
        if not value > least:
            raise argparse.ArgumentTypeError(f"{text!r} is no number above {least:g}")
        return value

    return parse


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    """Print what a recipe takes on GPUs."""
    from ..runs.recipe_file import RecipeFile

    pass_over_known_noise()
    try:
        from ..runs.recipe import check_keys
        from ..runs.shipped import find_recipe

        path = find_recipe(options.recipe)
        # Before what is heavy is imported
        check_keys(RecipeFile(path), overrides, options.own_options)
        if options.utilization > 1:
            exit_with_error(f"argument --utilization: {options.utilization:g} is more than all, which is 1")
        from ..plan.plan import Machine, Plan
        from ..plan.reading import read_recipe
        from ..plan.show import print_plan

        machine = Machine(options.gpus, options.gpu_memory, options.tflops, options.utilization)
        recipe = read_recipe(path, overrides, options.gpus)
        print_plan(Plan(recipe, machine, options.rows), options.recipe, overrides)
    except DistillationError as error:
        exit_with_error(error)
