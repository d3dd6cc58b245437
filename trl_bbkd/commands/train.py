"""`trl-bbkd train`: a recipe through `accelerate launch`, or in this process."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from ..errors import DistillationError
from ..runs.methods import load_method
from .ends import INTERRUPTED, ONE_OF_SEVERAL, be_silent_to_the_hub, exit_with_error, pass_over_known_noise
from .seeds import train_seeds


OVERRIDES_HELP = "values that win over the recipe's, such as --learning_rate 1e-6; `--help` lists every key"
RESUME = " --resume_from_checkpoint true"
RECIPE_HELP = "a recipe's file, or the name of one that comes with the package, such as gad"


def add_parser(commands) -> argparse.ArgumentParser:
    train = commands.add_parser(
        "train",
        help="train a recipe through `accelerate launch`",
        usage="trl-bbkd train RECIPE [--seeds N N ...] [--accelerate_config NAME|PATH] [accelerate launch flags] [overrides]",
        description="Train a recipe through `accelerate launch`.",
    )
    train.add_argument("recipe", metavar="RECIPE", help=f"{RECIPE_HELP}: `trl-bbkd recipes` lists them")
    train.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        help="--seeds with at least two, each of which is trained, and what they come to together; --accelerate_config with one of ddp, zero2, zero3, fsdp2, hsdp or a path; flags of `accelerate launch`, such "
        f"as --num_processes 2; {OVERRIDES_HELP}",
    )
    return train


def run(options: argparse.Namespace) -> None:
    from ..runs.seeds import taken_out

    seeds, arguments = taken_out("--seeds", options.arguments)
    if seeds is None or {"-h", "--help", "--help-all", "--help_all"}.intersection(arguments):
        train_with_accelerate(options.recipe, arguments)
    else:
        train_seeds(options.recipe, seeds, arguments)


def run_recipe(recipe_file: str, overrides: list[str]) -> None:
    """
    Train a recipe in this process. Errors in the user's input end it with one line and exit status 2, Ctrl-C with one
    line and exit status 130.
    """
    recipe = None
    try:
        recipe = _checked_recipe(recipe_file, overrides)
        _train(recipe)
    except KeyboardInterrupt:
        _say_how_to_go_on(recipe)
        sys.exit(INTERRUPTED)


def _checked_recipe(recipe_file: str, overrides: list[str]):
    pass_over_known_noise()
    be_silent_to_the_hub()
    try:
        from ..runs.recipe import load_recipe
        from ..runs.shipped import find_recipe

        return load_recipe(find_recipe(recipe_file), overrides)
    except DistillationError as error:
        exit_with_error(error)


def _train(recipe) -> None:
    # Only now: the recipe's `env` block has to be set before the libraries that read it are imported.
    import torch.distributed

    from ..runs.run import run

    try:
        run(recipe)
    except DistillationError as error:
        exit_with_error(error)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _say_how_to_go_on(recipe) -> None:
    """After Ctrl-C. A second one, while this is found out, is of no more use."""
    if ONE_OF_SEVERAL in os.environ:
        return
    if recipe is None:
        print("\nStopped before anything was trained.", file=sys.stderr)
        return
    from ..runs.job import command
    from ..runs.progress import can_go_on

    again = command(recipe.path, sys.argv).removesuffix(RESUME)
    if load_method(recipe.method).goes_on_by_itself:
        print(f"\nStopped. To go on: {again}", file=sys.stderr)
    elif can_go_on(recipe.training_args.output_dir):
        print(f"\nStopped. To go on: {again}{RESUME}", file=sys.stderr)
    else:
        print(f"\nStopped before the first checkpoint. To start again: {again}", file=sys.stderr)


def train_with_accelerate(recipe_file: str, arguments: list[str]) -> None:
    """Start `accelerate launch -m trl_bbkd` on a recipe, after its keys and the overrides have been checked."""
    from ..runs.recipe_file import RecipeFile
    from ..runs.recipe_keys import launcher_options

    pass_over_known_noise()
    try:
        from ..runs.recipe import check_keys
        from ..runs.shipped import find_recipe

        # Before the launcher, which takes seconds to import
        check_keys(RecipeFile(find_recipe(recipe_file)), arguments, {*launcher_options(), "--accelerate_config"})
        _launch(recipe_file, arguments)
    except DistillationError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        # The training process has said how to go on
        sys.exit(INTERRUPTED)


def _launch(recipe_file: str, arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    from ..runs.recipe import check_recipe
    from ..runs.recipe_file import one_line
    from ..runs.shipped import find_recipe

    launch_parser = launch_command_parser()
    launch_parser.add_argument("--accelerate_config", dest="config_file", type=find_accelerate_config)
    launch_parser.error = exit_with_error  # without pages of usage
    launch_flags, overrides = check_recipe(find_recipe(recipe_file), arguments, launch_parser._option_string_actions)
    launch_arguments = launch_parser.parse_args([*launch_flags, "--module", "trl_bbkd", recipe_file, *overrides])
    _refuse_machines_without_address(launch_arguments)
    try:
        launch_command(launch_arguments)
    except subprocess.CalledProcessError as error:
        # The training process has said what went wrong; accelerate's own traceback would bury it.
        sys.exit(error.returncode)
    except ImportError as error:
        advice = ' With our extra: `pip install "trl-bbkd[deepspeed]"`.' if "deepspeed" in str(error).lower() else ""
        exit_with_error(one_line(error) + advice)
    except ValueError as error:
        exit_with_error(one_line(error))


def _refuse_machines_without_address(arguments: argparse.Namespace) -> None:
    """The launcher would wait for a machine of no name."""
    from accelerate.commands.config.config_args import load_config_from_file

    if arguments.config_file is None:
        machines, address = arguments.num_machines, arguments.main_process_ip
    else:
        config = load_config_from_file(arguments.config_file)
        machines = arguments.num_machines or getattr(config, "num_machines", 1)
        address = arguments.main_process_ip or getattr(config, "main_process_ip", None)
    if (machines or 1) > 1 and not address:
        exit_with_error(
            f"{machines} machines need an address to meet at. Add --main_process_ip, the first machine's, and --machine_rank; on one "
            "machine --num_machines 1."
        )


def find_accelerate_config(name_or_path: str) -> str:
    """Path of an `accelerate` configuration: a file, or one of ours by name."""
    if Path(name_or_path).is_file():
        return name_or_path
    from ..runs.shipped import ACCELERATE_CONFIGS, recipes_folder

    folder = recipes_folder() / ACCELERATE_CONFIGS
    if not (folder / f"{name_or_path}.yaml").is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise argparse.ArgumentTypeError(f"{name_or_path!r} is neither a file nor one of {names}")
    return str(folder / f"{name_or_path}.yaml")
