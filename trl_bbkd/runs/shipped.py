"""The recipes that come with the package, by name. Imports nothing heavy."""

import functools
from pathlib import Path

from ..errors import RecipeError
from .key_names import nearest


PACKAGE = Path(__file__).parents[1]
ACCELERATE_CONFIGS = "accelerate_configs"
COLLECT = "collect.yaml"  # trains nothing


@functools.cache
def recipes_folder() -> Path:
    """Where the recipes lie: a wheel carries them inside the package, in a checkout they are beside it."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


@functools.cache
def shipped_recipes() -> dict[str, Path]:
    """Each recipe by its name: those that bring their data (`gad`), then the others (`qwen2.5-7b-lmsys/gad`)."""
    folder = recipes_folder()
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in files
        if file.parent.name != ACCELERATE_CONFIGS and file.name != COLLECT
    }


def recipe_path(name: str) -> Path:
    """What a command's word for a recipe stands for: a file, or else a recipe of ours, or else a file that is missing."""
    path = Path(name)
    return path if path.is_file() else shipped_recipes().get(name, path)


def find_recipe(name: str) -> Path:
    """
    A recipe's file, given by its path or by its name.

    Raises:
        [`RecipeError`]: there is neither such a file nor such a name; the message names the nearest one.
    """
    path = recipe_path(name)
    if path.is_file():
        return path
    # As the headers and the documentation of a checkout write it
    plain = name.removeprefix("recipes/").removesuffix(".yaml").removesuffix(".yml")
    listed = " `trl-bbkd recipes` lists those that come with the package."
    raise RecipeError(f"there is no recipe {name}{nearest(plain, shipped_recipes())}{listed}")


def find_collect_recipe(name: str) -> Path:
    """
    The recipe of a collection: a file, or by the name `collect` the package's.

    Raises:
        [`RecipeError`]: there is no such file.
    """
    path = Path(name)
    ours = recipes_folder() / COLLECT
    if path.is_file():
        return path
    if name == ours.stem:
        return ours
    raise RecipeError(f"there is no recipe {name}. `{ours.stem}` names the one of the package, {ours}.")


def recipe_list() -> str:
    """One line for each recipe: its name, and what it is by the first line of its header."""
    recipes = shipped_recipes()
    width = max(map(len, recipes))
    lines = {name: f"  {name:{width}}  {_first_line(file)}" for name, file in recipes.items()}
    return "\n".join(
        [
            "They bring models and data, and run on 2 CPU cores (trl-bbkd train gad):",
            *(line for name, line in lines.items() if "/" not in name),
            "They say in their header which data and which GPUs they need:",
            *(line for name, line in lines.items() if "/" in name),
            f"One asks a teacher for its answers (trl-bbkd {COLLECT.partition('.')[0]} my.yaml): {recipes_folder() / COLLECT}",
            f"Files: {recipes_folder()}",
        ]
    )


def _first_line(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        return lines.readline().lstrip("# ").rstrip()
