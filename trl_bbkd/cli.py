"""The command line: `trl-bbkd train recipe.yaml`. What is heavy is imported by the command that needs it."""

import argparse
import logging
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from .errors import DistillationError
from .host.version import __version__
from .runs.methods import METHODS, load_method
from .runs.new_recipe import methods_that_need


OVERRIDES_HELP = "values that win over the recipe's, such as --learning_rate 1e-6; `--help` lists every key"
RESUME = " --resume_from_checkpoint true"
INTERRUPTED = 130  # as a shell reports it
RECIPE_HELP = "a recipe's file, or the name of one that comes with the package, such as gad"


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `trl-bbkd`."""
    parser = argparse.ArgumentParser(
        prog="trl-bbkd", description="Distil a black-box teacher: one whose text is all you have."
    )
    add_version(parser)
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train a recipe through `accelerate launch`",
        usage="trl-bbkd train RECIPE [--accelerate_config NAME|PATH] [accelerate launch flags] [overrides]",
        description="Train a recipe through `accelerate launch`.",
    )
    train.add_argument("recipe", metavar="RECIPE", help=f"{RECIPE_HELP}: `trl-bbkd recipes` lists them")
    train.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        help="--accelerate_config with one of ddp, zero2, zero3, fsdp2, hsdp or a path; flags of `accelerate launch`, such "
        f"as --num_processes 2; {OVERRIDES_HELP}",
    )
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
    plan.error = exit_with_error  # type: ignore[method-assign,assignment]
    commands.add_parser(
        "recipes",
        help="list the recipes that come with the package",
        description="List the recipes that come with the package, one line each.",
    )
    init = commands.add_parser(
        "init",
        help="write a recipe to start from",
        description="Write a commented recipe to start from, with your student and your teacher's rows.",
    )
    init.add_argument("method", metavar="METHOD", help=listed(METHODS, "or"))
    init.add_argument("--student", required=True, metavar="MODEL", help="folder or Hub id of the student")
    init.add_argument("--data", required=True, metavar="ROWS", help="file, folder or Hub id of the teacher's rows")
    proxy, labels = (listed(methods_that_need(option), "and") for option in ("proxy", "labels"))
    init.add_argument("--proxy", metavar="MODEL", help=f"folder or Hub id of the proxy, for {proxy}")
    init.add_argument("--labels", metavar="NAME", nargs="+", help=f"names of the classes, for {labels}")
    init.add_argument("--teacher", metavar="NAME", help="name of the teacher, for the report and the card")
    init.add_argument("--output", metavar="FILE", help="the file to write, METHOD.yaml by default")
    init.error = exit_with_error  # type: ignore[method-assign,assignment]  # one line, without the usage
    push = commands.add_parser(
        "push",
        help="send a finished student to the Hub",
        description="Send the student of a run, its card and its report to the Hub. Log in first: `hf auth login`.",
    )
    push.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder of a run")
    push.add_argument("repo_id", metavar="REPO", help="repository, such as me/student")
    push.add_argument(
        "--with", dest="folders", metavar="FOLDER", action="append", default=[], help="send a subfolder: discriminator"
    )
    push.add_argument("--private", action="store_true", default=None, help="create the repository private")
    push.add_argument("--revision", help="branch to commit to")
    compare = commands.add_parser(
        "compare",
        help="put finished runs side by side",
        description="Put finished runs side by side that were measured on the same held-out prompts: a table in Markdown with intervals "
        "and differences to the first run, settings that differ, answers.",
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs; differences are to the first")
    compare.add_argument(
        "--metric",
        dest="metrics",
        metavar="NAME",
        action="append",
        default=[],
        help="tell of this one alone; may be repeated",
    )
    compare.add_argument(
        "--html", metavar="FILE", help="also write a page with curves and marked answers, which needs no network"
    )
    compare.error = exit_with_error  # type: ignore[method-assign,assignment]
    collect = commands.add_parser(
        "collect",
        help="ask a teacher for its answers",
        usage="trl-bbkd collect RECIPE [--retry_failed] [overrides]",
        description="Ask a teacher's endpoint for its answers, and leave a set that every method takes. What was answered is "
        "kept and never asked again: the same command goes on with what is missing.",
        allow_abbrev=False,
    )
    collect.add_argument("recipe", metavar="RECIPE", help="a recipe's file, or `collect` for the one of the package")
    collect.error = exit_with_error  # type: ignore[method-assign,assignment]
    if "collect" in (sys.argv[1:2] if arguments is None else arguments[:1]):
        from .collect.reading import add_keys

        add_keys(collect.add_argument_group("keys of the recipe"))
    evaluate = commands.add_parser(
        "evaluate",
        help="have a judge compare a student with its teacher",
        usage="trl-bbkd evaluate MODEL --data ROWS --judge NAME --base_url URL --output_dir FOLDER [options]",
        description="Have a judge, behind any endpoint that is compatible with OpenAI's, compare a student's answers with its teacher's. "
        "What was answered is kept and never asked again.",
        allow_abbrev=False,
    )
    evaluate.add_argument(
        "model", metavar="MODEL", help="folder or Hub id of the student, also an adapter's, or a file of its answers"
    )
    evaluate.error = exit_with_error  # type: ignore[method-assign,assignment]
    if "evaluate" in (sys.argv[1:2] if arguments is None else arguments[:1]):
        from .judging.reading import add_options

        add_options(evaluate)
    options, overrides = parser.parse_known_args(arguments)
    if options.command == "collect":
        collect_answers(options, overrides)
        return
    if options.command == "evaluate":
        evaluate_student(options, overrides)
        return
    if overrides and options.command != "plan":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if options.command == "plan":
        plan_recipe(options, overrides, plan)
    elif options.command == "push":
        push_to_hub(options)
    elif options.command == "compare":
        compare_runs(options)
    elif options.command == "recipes":
        from .runs.shipped import recipe_list

        print(recipe_list())
    elif options.command == "init":
        init_recipe(options)
    else:
        train_with_accelerate(options.recipe, options.arguments)


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


def listed(names: Iterable[str], word: str) -> str:
    """`a, b and c`, with `word` for the last one."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=__version__)


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

    _pass_over_known_noise()
    # `datasets` would tell a server that a file of this format was read
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    try:
        from .runs.recipe import load_recipe
        from .runs.shipped import find_recipe

        return load_recipe(find_recipe(recipe_file), overrides)
    except DistillationError as error:
        exit_with_error(error)


def _pass_over_known_noise() -> None:
    """What libraries say at their start that is no news to whoever trains."""
    # TRL's configurations set a field under the name that transformers is about to drop
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing", FutureWarning)
    # bitsandbytes misses a kernel for CPUs, without which it is slower there
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _train(recipe) -> None:
    # Only now: the recipe's `env` block has to be set before the libraries that read it are imported.
    import torch.distributed

    from .runs.run import run

    try:
        run(recipe)
    except DistillationError as error:
        exit_with_error(error)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _say_how_to_go_on(recipe) -> None:
    """After Ctrl-C. A second one, while this is found out, is of no more use."""
    if recipe is None:
        print("\nStopped before anything was trained.", file=sys.stderr)
        return
    from .runs.job import command
    from .runs.progress import can_go_on

    again = command(recipe.path, sys.argv).removesuffix(RESUME)
    if load_method(recipe.method).goes_on_by_itself:
        print(f"\nStopped. To go on: {again}", file=sys.stderr)
    elif can_go_on(recipe.training_args.output_dir):
        print(f"\nStopped. To go on: {again}{RESUME}", file=sys.stderr)
    else:
        print(f"\nStopped before the first checkpoint. To start again: {again}", file=sys.stderr)


def train_with_accelerate(recipe_file: str, arguments: list[str]) -> None:
    """Start `accelerate launch -m trl_bbkd` on a recipe, after its keys and the overrides have been checked."""
    from .runs.recipe_file import RecipeFile
    from .runs.recipe_keys import launcher_options

    _pass_over_known_noise()
    try:
        from .runs.recipe import check_keys
        from .runs.shipped import find_recipe

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

    from .runs.recipe import check_recipe
    from .runs.recipe_file import one_line
    from .runs.shipped import find_recipe

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


def init_recipe(options: argparse.Namespace) -> None:
    """Write a recipe to start from."""
    from .runs.new_recipe import write_recipe

    arguments = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        path = write_recipe(**arguments)
    except DistillationError as error:
        exit_with_error(error)
    print(f"Wrote {path}. Train it with: {shlex.join(['trl-bbkd', 'train', str(path)])}")


def plan_recipe(options: argparse.Namespace, overrides: list[str], parser: argparse.ArgumentParser) -> None:
    """Print what a recipe takes on GPUs."""
    from .runs.recipe_file import RecipeFile

    _pass_over_known_noise()
    try:
        from .runs.recipe import check_keys
        from .runs.shipped import find_recipe

        path = find_recipe(options.recipe)
        # Before what is heavy is imported
        check_keys(RecipeFile(path), overrides, set(parser._option_string_actions))
        if options.utilization > 1:
            exit_with_error(f"argument --utilization: {options.utilization:g} is more than all, which is 1")
        from .plan.plan import Machine, Plan
        from .plan.reading import read_recipe
        from .plan.show import print_plan

        machine = Machine(options.gpus, options.gpu_memory, options.tflops, options.utilization)
        recipe = read_recipe(path, overrides, options.gpus)
        print_plan(Plan(recipe, machine, options.rows), options.recipe, overrides)
    except DistillationError as error:
        exit_with_error(error)


def compare_runs(options: argparse.Namespace) -> None:
    """Print runs side by side, and write the page."""
    _pass_over_known_noise()
    try:
        from .reports.comparison import Comparison, read_runs

        comparison = Comparison(read_runs(options.runs), options.metrics)
        print(comparison.markdown(), end="")
        if options.html:
            from .reports.comparison_page import page

            Path(options.html).write_text(page(comparison), encoding="utf-8")
    except OSError as error:
        exit_with_error(f"--html {options.html}: {error.strerror}. Name a file in a folder that is there.")
    except DistillationError as error:
        exit_with_error(error)


def collect_answers(options: argparse.Namespace, unknown: list[str]) -> None:
    """Ask a teacher, and write the set."""
    from .collect.command import collect
    from .collect.reading import read_settings, refuse_unknown
    from .runs.shipped import find_collect_recipe

    # `datasets` would tell a server that a file of this format was read
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    overrides = {name: value for name, value in vars(options).items() if name not in ("command", "recipe")}
    try:
        if unknown:
            refuse_unknown(unknown)
        settings = read_settings(find_collect_recipe(options.recipe), overrides)
        finished = collect(settings)
    except DistillationError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        finished = False
    exit_if_stopped(finished)


def exit_if_stopped(finished: bool) -> None:
    """End with a status of its own where Ctrl-C left something to go on with."""
    if not finished:
        print("Stopped. The same command goes on.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def evaluate_student(options: argparse.Namespace, unknown: list[str]) -> None:
    """Ask a judge, and write the table."""
    from .collect.reading import refuse_unknown
    from .judging.command import evaluate
    from .judging.reading import option_names, read_options

    _pass_over_known_noise()
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    try:
        if unknown:
            refuse_unknown(unknown, option_names())
        finished = evaluate(read_options(vars(options)))
    except DistillationError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        finished = False
    exit_if_stopped(finished)


def push_to_hub(options: argparse.Namespace) -> None:
    """Send a finished student to the Hub."""
    from .hub.push import push_student

    try:
        url = push_student(
            options.output_dir,
            options.repo_id,
            folders=options.folders,
            private=options.private,
            revision=options.revision,
        )
    except DistillationError as error:
        exit_with_error(error)
    print(f"On the Hub: {url}")


def find_accelerate_config(name_or_path: str) -> str:
    """Path of an `accelerate` configuration: a file, or one of ours by name."""
    if Path(name_or_path).is_file():
        return name_or_path
    from .runs.shipped import ACCELERATE_CONFIGS, recipes_folder

    folder = recipes_folder() / ACCELERATE_CONFIGS
    if not (folder / f"{name_or_path}.yaml").is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise argparse.ArgumentTypeError(f"{name_or_path!r} is neither a file nor one of {names}")
    return str(folder / f"{name_or_path}.yaml")


def exit_with_error(error: Exception | str) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
