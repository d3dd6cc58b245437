"""One recipe trained with several seeds: what is asked for, what is finished, and what is read of it. Imports little until it has to."""

import contextlib
import dataclasses
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from ..errors import ComparisonError, RecipeError
from .methods import load_class, load_method
from .recipe import check_keys
from .recipe_checks import check_values
from .recipe_file import RecipeFile
from .recipe_keys import launcher_options, recipe_keys
from .shipped import find_recipe


SEEDS_NAME = "seeds.json"
LARGEST_SEED = 2**32 - 1
RESUME = ["--resume_from_checkpoint", "true"]


def taken_out(option: str, arguments: list[str]) -> tuple[list[str] | None, list[str]]:
    """
    An option and its values, apart from other arguments.

    Returns:
        `tuple[list[str] | None, list[str]]`: the values, `None` where the option is not there, and all else in its order.
    """
    values: list[str] | None = None
    rest: list[str] = []
    destination = rest
    for word in arguments:
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == option.replace("-", "_"):
            values = destination = [*(values or []), *([value] if equals else [])]
            continue
        if word.startswith("--"):
            destination = rest
        destination.append(word)
    return values, rest


def read_seeds(words: list[str]) -> list[int]:
    """
    Raises:
        [`~errors.RecipeError`]: these are not at least two different seeds.
    """
    for word in words:
        if not (word.isascii() and word.isdigit() and int(word) <= LARGEST_SEED):
            raise RecipeError(f"--seeds {word}: a seed is a whole number from 0 to 2**32 - 1, as in --seeds 0 1 2.")
    seeds = [int(word) for word in words]
    if len(seeds) < 2:
        raise RecipeError("--seeds takes at least two, as in --seeds 0 1 2. One is set by --seed.")
    twice = next((seed for number, seed in enumerate(seeds) if seed in seeds[:number]), None)
    if twice is not None:
        raise RecipeError(f"--seeds names {twice} twice. Name each once.")
    return seeds


class SeveralSeeds:
    """
    Runs of one recipe, each with a seed of its own in a folder of its own.

    Args:
        recipe (`str`):
            The recipe, as the command line names it.
        seeds (`list[str]`):
            The seeds, as the command line names them.
        arguments (`list[str]`):
            The launcher's options, and overrides of the recipe.

    Raises:
        [`~errors.RecipeError`]: for the first thing that is wrong, before anything is trained.
    """

    def __init__(self, recipe: str, seeds: list[str], arguments: list[str]):
        self.seeds = read_seeds(seeds)
        self.recipe = recipe
        self.recipe_file = RecipeFile(find_recipe(recipe))
        check_keys(self.recipe_file, arguments, {*launcher_options(), "--accelerate_config"})
        self.command = shlex.join(["trl-bbkd", "train", recipe, "--seeds", *seeds, *arguments])
        self.settings = self._settings(arguments)
        self._refuse_keys(arguments)
        self.output_dir = Path(self._checked_output_dir()).expanduser()
        self.arguments = taken_out("--output_dir", arguments)[1]
        self.finished = self._read_finished()

    def _settings(self, arguments: list[str]) -> dict[str, str]:
        """The recipe's keys, as they are written with the overrides."""
        keys = recipe_keys(self.recipe_file.method)
        given: dict[str, list[str]] = {}
        words: list[str] = []
        for word in arguments:
            if word.startswith("--"):
                name, equals, value = word[2:].partition("=")
                words = given[name.replace("-", "_")] = [value] if equals else []
            else:
                words.append(word)
        overrides = {
            name: " ".join(words) for name, words in given.items() if keys is None or self._is_key(name, keys)
        }
        values = {"method": self.recipe_file.method, **self.recipe_file.values}
        return {name: str(value) for name, value in (values | overrides).items() if value is not None}

    @staticmethod
    def _is_key(name: str, keys: set[str]) -> bool:
        return name in keys or name.removeprefix("no_") in keys

    def _refuse_keys(self, arguments: list[str]) -> None:
        if taken_out("--seed", arguments)[0] is not None:
            raise RecipeError("--seed stands beside --seeds, which sets it. Take --seed out.")
        if self.settings.get("resume_from_checkpoint", "false").lower() != "false":
            raise RecipeError(
                "--seeds goes on by itself with what was stopped: take resume_from_checkpoint out, and start the same command again."
            )
        if self.settings.get("push_to_hub", "false").lower() != "false" and "no_push_to_hub" not in self.settings:
            raise RecipeError(
                "--seeds trains several students, and push_to_hub names one repository: take it out, and send one of them "
                "afterwards, as in `trl-bbkd push output/student/seed-0 me/student`."
            )

    def _checked_output_dir(self) -> str:
        output_dir = self.settings.get("output_dir")
        if not output_dir:
            raise RecipeError("--seeds needs `output_dir`: each seed's run has a folder in it. Set it in the recipe.")
        check_values({"output_dir": output_dir, "deepspeed": None}, self.recipe_file)
        found = next((name for name in ("metrics.json", "progress.json") if Path(output_dir, name).is_file()), None)
        if found:
            raise RecipeError(
                f"output_dir: {output_dir} holds a single run ({found}), and --seeds puts a run for each seed into a folder below: the "
                "two would be mixed up. Name another folder with --output_dir."
            )
        return output_dir

    def _read_finished(self) -> set[int]:
        try:
            found = json.loads((self.output_dir / SEEDS_NAME).read_text(encoding="utf-8"))
            settings, finished = dict(found["settings"]), {*found["finished"]}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # Each run knows its own settings, and is gone on with
            return set()
        if settings != self.settings:
            self._refuse_other(settings)
        return finished

    def _refuse_other(self, settings: dict[str, str]) -> None:
        # Only now: what it imports takes seconds
        from .job import UNDECISIVE_ARGUMENTS, UNTOLD_ARGUMENTS

        undecisive = (*UNDECISIVE_ARGUMENTS, *UNTOLD_ARGUMENTS)
        names = sorted(
            name
            for name in settings.keys() | self.settings.keys()
            if settings.get(name) != self.settings.get(name) and not name.startswith(undecisive)
        )
        if names:
            there, now = (
                ", ".join(f"{name}: {found.get(name)}" for name in names) for found in (settings, self.settings)
            )
            raise RecipeError(
                f"output_dir: {self.output_dir} holds seeds of other settings ({there}; now {now}). Name another --output_dir, or "
                "delete that folder."
            )

    def folder(self, seed: int) -> Path:
        return self.output_dir / f"seed-{seed}"

    def is_finished(self, seed: int) -> bool:
        return seed in self.finished and (self.folder(seed) / "metrics.json").is_file()

    def run_of(self, seed: int) -> list[str]:
        """The arguments of `trl-bbkd` that train this seed, or go on with it where it was stopped."""
        folder = str(self.folder(seed))
        return [
            "train",
            self.recipe,
            *self.arguments,
            "--seed",
            str(seed),
            "--output_dir",
            folder,
            *self._resume(folder),
        ]

    def _resume(self, folder: str) -> list[str]:
        if load_method(self.recipe_file.method).goes_on_by_itself or not Path(folder).is_dir():
            return []
        from .progress import can_go_on

        return RESUME if can_go_on(folder) else []

    def finish(self, seed: int) -> None:
        """
        Keep that a seed's run is finished.

        Raises:
            [`~errors.RecipeError`]: it ended without a report.
        """
        if not (self.folder(seed) / "metrics.json").is_file():
            raise RecipeError(
                f"{self.folder(seed)} has no metrics.json: the recipe leaves the student's training out. Take `stages` out."
            )
        self.finished.add(seed)
        self._write({})

    def _write(self, summed_up: dict) -> None:
        kept = {"command": self.command, "settings": self.settings, "finished": sorted(self.finished)}
        # Whole or not at all: the command may be killed while it writes
        unfinished = self.output_dir / f"{SEEDS_NAME}.tmp"
        unfinished.write_text(json.dumps(kept | summed_up, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, self.output_dir / SEEDS_NAME)

    def summed_up(self):
        """
        Read what the seeds left, and write what they come to together.

        Returns:
            [`~reports.seeds.SeedsReport`]

        Raises:
            [`~errors.ComparisonError`]: the runs in the folder differ in more than their seed, or cannot be read.
        """
        from ..reports.seeds import SeedsReport, write_seeds_report

        found = SeedsReport(self._read_runs(), self.command)
        write_seeds_report(found, self.output_dir)
        self._write(found.as_dict())
        return found

    def _read_runs(self) -> list:
        from ..reports.held_out import HELD_OUT_NAME, read_held_out
        from ..reports.seeds import SeedRun

        report_class = load_class(load_method(self.recipe_file.method).report)
        fields = [field.name for field in dataclasses.fields(report_class)]
        runs: list[SeedRun] = []
        settings: list[dict] = []
        for seed in self.seeds:
            folder = self.folder(seed)
            with _told(folder):
                metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
                lines = read_held_out(folder) if (folder / HELD_OUT_NAME).is_file() else []
                runs.append(SeedRun(seed, report_class(**{name: metrics[name] for name in fields}), lines))
                progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
                settings.append(_without_seed(progress["settings"]))
            differing = [name for name in settings[0] if settings[0][name] != settings[-1].get(name)]
            if differing:
                raise ComparisonError(
                    f"{self.folder(self.seeds[0])} and {folder} differ in more than their seed: {', '.join(differing)}. Delete the one "
                    "that is out of date, and start the command again."
                )
            with _told(folder):
                if [line["rows"] for line in lines] != [line["rows"] for line in runs[0].lines]:
                    raise ValueError(f"{HELD_OUT_NAME} has other prompts than {self.folder(self.seeds[0])}")
        return runs


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Say of files that are gone or broken how they are made again."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ComparisonError(
            f"{folder} cannot be read ({type(error).__name__}: {error}). Delete its metrics.json, and start the command again: what is "
            "missing is made anew."
        ) from error


def _without_seed(settings: dict) -> dict:
    """Settings of a run, flat, but for its seed."""
    flat = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    for part in ("arguments", "script", "model"):
        flat |= settings[part]
    return {name: value for name, value in flat.items() if name != "seed"}
