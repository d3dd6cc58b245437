"""`python -m trl_bbkd recipe.yaml [overrides]`, for `accelerate launch -m trl_bbkd` and `torchrun -m trl_bbkd`."""

import argparse
import sys

from .cli import add_version
from .commands.train import OVERRIDES_HELP, RECIPE_HELP, run_recipe


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trl_bbkd",
        description="Train a recipe in this process. `trl-bbkd train` starts one process per GPU instead.",
    )
    add_version(parser)
    parser.add_argument("recipe", help=RECIPE_HELP)
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help=OVERRIDES_HELP)
    options = parser.parse_args(arguments)
    run_recipe(options.recipe, options.overrides)


if __name__ == "__main__":
    main(sys.argv[1:])
