"""A recipe as it would be read on the machine that it is planned for."""

import contextlib
import copy
import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import RecipeError
from ..runs.held_models import Phase
from ..runs.methods import load_class, load_method
from ..runs.recipe import Recipe, load_recipe
from ..runs.recipe_file import RecipeFile


YES = ("true", "1", "yes")
# Without a GPU transformers refuses bfloat16, and what is computed on a CPU is not what is planned
HERE = ("--use_cpu", "true", "--bf16", "false", "--fp16", "false")


def read_recipe(path: Path, overrides: Collection[str], devices: int) -> Recipe:
    """
    Read a recipe for a number of GPUs, on a machine that may have none.

    Args:
        path (`Path`):
            The recipe.
        overrides (`Collection[str]`):
            Options that win over it.
        devices (`int`):
            GPUs of the run: settings of batches are checked for them.

    Raises:
        [`~errors.RecipeError`]: for the first thing that is wrong.
    """
    config = load_class(load_method(RecipeFile(path).method).config)
    with _world_of(config, devices):
        recipe = load_recipe(path, [*overrides, *HERE])
    recipe.training_args.bf16 = computes_in_bfloat16(recipe, overrides)
    if not recipe.model_args.model_name_or_path:
        raise RecipeError(f"{path}: model_name_or_path is missing; it names the student.")
    return recipe


@contextlib.contextmanager
def _world_of(config: type, devices: int) -> Iterator[None]:
    # The property of transformers asks how many processes there are here
    config.world_size = property(lambda self: devices)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del config.world_size  # type: ignore[attr-defined]


def computes_in_bfloat16(recipe: Recipe, overrides: Collection[str]) -> bool:
    """What the recipe says of `bf16`; where it says nothing, what TRL's configurations do on a GPU."""
    words = list(overrides)
    given = [words[place + 1] for place, word in enumerate(words[:-1]) if word == "--bf16"]
    given += [word.partition("=")[2] for word in words if word.startswith("--bf16=")]
    values = RecipeFile(recipe.path).values
    if given:
        return given[-1].lower() in YES
    return bool(values.get("bf16", not values.get("fp16", False)))


def phases_of(recipe: Recipe, rows: int | None = None) -> list[Phase]:
    """
    The phases of a run, with another `per_device_train_batch_size` if `rows` is given: as many rows as before make a step.
    """
    method = load_method(recipe.method)
    if rows is None:
        return method.phases(recipe)
    args = copy.copy(recipe.training_args)
    accumulation = accumulation_for(recipe, rows)
    if getattr(args, "steps_per_generation", None):
        samples = args.per_device_train_batch_size * args.steps_per_generation
        args.steps_per_generation = max(1, samples // rows)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = rows, accumulation
    return method.phases(replace(recipe, training_args=args))


def accumulation_for(recipe: Recipe, rows: int) -> int:
    """`gradient_accumulation_steps` that makes up for another `per_device_train_batch_size`."""
    return max(1, rows_of_a_step(recipe) // rows)


def rows_of_a_step(recipe: Recipe) -> int:
    args = recipe.training_args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


def count_rows(recipe: Recipe) -> int | None:
    """Training rows, as far as a file of JSON lines tells."""
    name = recipe.script_args.dataset_name
    if not name or not Path(name).is_file() or Path(name).suffix not in (".jsonl", ".json"):
        return None
    with Path(name).open("rb") as file:
        return sum(1 for line in file if line.strip())


def steps_of(recipe: Recipe, rows: int | None, devices: int) -> int | None:
    """Optimizer steps of the student's training, as a run counts them; `None` if that takes rows that are not known."""
    args = recipe.training_args
    if args.max_steps > 0:
        return args.max_steps
    if rows is None:
        return None
    samples = load_method(recipe.method).samples_per_prompt(args)
    return math.ceil(args.num_train_epochs * rows * samples / (rows_of_a_step(recipe) * devices))
