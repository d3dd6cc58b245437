"""One run of a recipe, from teacher text to a distilled student and its report."""

import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config, get_quantization_config

from .evaluation import evaluate_student, evaluate_teacher
from .hub import push_student
from .methods import METHOD_RUNS
from .model_card import library_versions, write_card
from .recipe import Recipe, RecipeError, RecipeFile, import_callable
from .report import (
    SEQKD,
    TEACHER,
    UNDISTILLED,
    RunReport,
    arguments_without_secrets,
    print_table,
    without_secrets,
    write_report,
)
from .seqkd import curve, train_seqkd
from .teacher_data import TeacherDataError, check_teacher_data, load_teacher_data, tokenize_teacher_data


logger = logging.getLogger(__name__)

EVALUATION_PROMPTS = 256
EVALUATION_SAMPLES = 8
CURVE_SAMPLES = 4
SEED = 0  # of held-out rows and of evaluation samples: the same for every student


def run(recipe: Recipe) -> None:
    """
    Distil a student as `recipe` says and report what it gained over SeqKD.

    In `output_dir` it leaves the student, its tokenizer and card, `discriminator/` or `proxy/`, `seqkd/`, `report.md`,
    `curves.png`, `metrics.json` and `recipe.yaml`. With `push_to_hub` the student goes to the Hub at the end, once all
    of it is written.

    Args:
        recipe ([`~recipe.Recipe`]):
            The recipe.

    Raises:
        [`~recipe.RecipeError`]: no student is named, or `output_dir` holds a run of another recipe.
        [`~teacher_data.TeacherDataError`]: the teacher text cannot be used.
        [`~hub.HubError`]: the student cannot be pushed; before training, or when it is finished and on disk.
    """
    job = _Run(recipe)
    report = job.distil()
    if report is None:
        return
    job.write(report)
    if recipe.script_args.seqkd_baseline:
        job.add_seqkd(report)
        job.write(report)
    if job.is_main_process:
        print_table(report)
        print(f"Student, report.md, curves.png and metrics.json: {recipe.training_args.output_dir}")
        job.push()


class _Run:
    """Data, tokenizer and measurements of one recipe, made before any model is loaded."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.args = copy.copy(recipe.training_args)
        self.script_args, model_args = recipe.script_args, recipe.model_args
        self.model = model_args.model_name_or_path
        self.is_main_process = PartialState().is_main_process
        self.method = METHOD_RUNS[recipe.method](self)
        if self.model is None:
            raise RecipeError("set `model_name_or_path` to the student: a folder or a Hub id.")
        self.inputs = {
            "method": recipe.method,
            "model_name_or_path": self.model,
            "dataset_name": self.script_args.dataset_name,
        }
        refuse_another_run(self.args.output_dir, self.inputs)
        judge = self.script_args.sample_metrics
        self.sample_metrics = import_callable(judge) if judge else None
        self.reward_funcs = [import_callable(name) for name in self.script_args.reward_funcs or []]

        train, test = load_teacher_data(self.script_args, recipe.dataset_args)
        check_teacher_data(train)
        if test is None:
            train, test = hold_out(train)
        else:
            check_teacher_data(test)
        self.args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(self.args.model_init_kwargs or {}),
        }
        self.peft_config = get_peft_config(model_args)
        self.quantization_config = get_quantization_config(model_args)
        self._tokenize(train, test)
        self.measure = functools.partial(
            evaluate_student,
            tokenizer=self.tokenizer,
            rows=self.test,
            sample_metrics=self.sample_metrics,
            max_new_tokens=self.args.max_completion_length,
            num_samples=EVALUATION_SAMPLES,
            batch_size=self.args.per_device_eval_batch_size,
            seed=SEED,
            chat_template_kwargs=self.args.chat_template_kwargs,
        )
        self.measure_briefly = functools.partial(self.measure, temperatures=(1.0,), num_samples=CURVE_SAMPLES)

    def _tokenize(self, train, test) -> None:
        hub = {"revision": self.args.model_init_kwargs["revision"], "trust_remote_code": self.args.trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(self.model, truncation_side="left", padding_side="left", **hub)
        config = AutoConfig.from_pretrained(self.model, **hub).get_text_config()
        tokenize = functools.partial(
            tokenize_teacher_data,
            tokenizer=self.tokenizer,
            max_completion_length=self.args.max_completion_length,
            max_prompt_length=self.args.max_prompt_length,
            max_length=getattr(config, "max_position_embeddings", None),
            chat_template_kwargs=self.args.chat_template_kwargs,
        )
        self.train, train_counts = tokenize(train)
        test, test_counts = tokenize(test)
        self.test = list(itertools.islice(test, EVALUATION_PROMPTS))
        self.counts = {"train": train_counts, "test": test_counts}
        if self.is_main_process:
            print(train_counts)

    def distil(self) -> RunReport | None:
        """Train the student, save it, measure it. `None` where the recipe leaves the student's training out."""
        args, seconds = self.args, {}
        resume = checkpoint_to_resume(args.resume_from_checkpoint)
        try:
            trainer = self.method.trainer()
            trainer.check_output_dir(resume)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        self.card = trainer.card
        self.card.teacher = self.script_args.teacher_name
        self.card.datasets = dataset_names(self.recipe)
        self.card.counts = self.counts
        self.card.settings = settings(self.recipe)
        self.card.command = command(self.recipe.path, sys.argv)
        undistilled = self._on_main_process(lambda: self.measure(trainer.accelerator.unwrap_model(trainer.model)))

        with timed(seconds, trainer._name), self.method.errors():
            output = trainer.train(resume_from_checkpoint=resume)
        if output is None:
            if self.is_main_process:
                print(f"The recipe leaves the student's training out. What it asks for: {args.output_dir}")
            return None
        # `push` sends the student once, when its card has the table
        trainer.args.push_to_hub = False
        # Before anything else can fail
        trainer.save_model(args.output_dir)
        trainer.save_state()
        trainer.create_model_card()

        distilled = self._on_main_process(lambda: self.measure(trainer.accelerator.unwrap_model(trainer.model)))
        self.max_steps = trainer.state.max_steps
        log_history = trainer.state.log_history
        return RunReport(
            method=trainer._name,
            student=display_path(self.model),
            teacher=self.script_args.teacher_name,
            results={
                UNDISTILLED: undistilled,
                trainer._name: distilled,
                **self._on_main_process(lambda: self.method.more_results(trainer)),
                TEACHER: evaluate_teacher(self.test, self.sample_metrics),
            },
            # It starts and ends with the numbers of the table
            curves={
                trainer._name: [
                    {"step": 0, **undistilled},
                    *curve(log_history),
                    {"step": self.max_steps, **distilled},
                ]
            },
            log_history=log_history,
            counts=self.counts,
            inputs=self.inputs,
            command=self.card.command,
            settings=self.card.settings,
            evaluation={
                "prompts": len(self.test),
                "samples": EVALUATION_SAMPLES,
                "max_new_tokens": args.max_completion_length,
                "seed": SEED,
            },
            versions=library_versions(),
            seconds=seconds,
            stages=self.method.stages(trainer),
            calibration=self.method.calibration(trainer),
            warnings=self.method.warnings(trainer),
        )

    def add_seqkd(self, report: RunReport) -> None:
        """Train the baseline and add what its best checkpoint reaches."""
        gc.collect()
        torch.cuda.empty_cache()
        output_dir = str(Path(self.args.output_dir) / "seqkd")
        with timed(report.seconds, SEQKD):
            seqkd = train_seqkd(
                self.model,
                self.args,
                self.train,
                self.tokenizer,
                self.measure_briefly,
                is_better=lambda new, old: quality(new, report) > quality(old, report),
                output_dir=output_dir,
                max_steps=self.max_steps,
                learning_rate=self.script_args.seqkd_learning_rate or self.method.sft_learning_rate,
                samples_per_prompt=self.method.samples_per_prompt,
                peft_config=self.peft_config,
                quantization_config=self.quantization_config,
            )
        best = self._on_main_process(lambda: self.measure(self._load(output_dir)))
        undistilled = report.results[UNDISTILLED]
        points = [
            point if point["step"] != seqkd.best_step else {"step": seqkd.best_step, **best} for point in seqkd.curve
        ]
        report.curves[SEQKD] = [{"step": 0, **undistilled}, *points]
        method = report.results.pop(report.method)
        report.results |= {SEQKD: best, report.method: method}
        report.seqkd = dataclasses.asdict(seqkd)
        del report.seqkd["curve"]

    def _load(self, folder: str):
        kwargs = {key: value for key, value in self.args.model_init_kwargs.items() if key != "revision"}
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=self.quantization_config, **kwargs)
        return model if self.quantization_config else model.to(self.args.device)

    def write(self, report: RunReport) -> None:
        if self.is_main_process:
            write_report(report, self.args.output_dir)
            self.card.report = report
            write_card(self.card, self.args.output_dir)

    def push(self) -> None:
        """Send the student to the Hub, if the recipe says so."""
        if self.args.push_to_hub:
            url = push_student(
                self.args.output_dir,
                self.card.repo_id,
                folders=self.card.folders,
                token=self.args.hub_token,
                private=self.args.hub_private_repo,
                revision=self.args.hub_revision,
                commit_message="End of training",
            )
            print(f"On the Hub: {url}")

    def _on_main_process(self, measure: Callable[[], dict]) -> dict:
        """What the main process measures; an empty dictionary on the others, which wait."""
        metrics = measure() if self.is_main_process else {}
        PartialState().wait_for_everyone()
        return metrics


def hold_out(train):
    """
    Divide rows without a test split: at most 5 % of them, and 256, are held out for evaluation, always the same ones.

    Args:
        train ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            All rows. Of a streaming set the first 256 are held out.

    Returns:
        `tuple`: training rows and held-out rows.

    Raises:
        [`~teacher_data.TeacherDataError`]: there is only one row.
    """
    if isinstance(train, IterableDataset):
        rows = EVALUATION_PROMPTS
        parts = train.skip(rows), train.take(rows)
    else:
        rows = min(EVALUATION_PROMPTS, max(1, len(train) // 20))
        if len(train) == 1:
            raise TeacherDataError("One row of teacher data is too little: evaluation needs a held-out row.")
        split = train.train_test_split(test_size=rows, seed=SEED)
        parts = split["train"], split["test"]
    logger.warning(f"The teacher data has no test split: {rows} of its rows are held out for evaluation.")
    return parts


def quality(metrics: dict[str, float], report: RunReport) -> tuple[float, ...]:
    """Compares checkpoints: the judge's metric at temperature 1 if there is one, then the NLL of the teacher's answers."""
    judged = (metrics[report.headline],) if report.judged_metrics else ()
    return (*judged, -metrics["teacher_nll"])


def refuse_another_run(output_dir: str, inputs: dict) -> None:
    """Raise [`~recipe.RecipeError`] if `output_dir` reports a run of other inputs: its files would be mixed up."""
    path = Path(output_dir) / "metrics.json"
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8")).get("inputs", {})
    differing = [key for key, value in inputs.items() if found.get(key) != value]
    if differing:
        there = ", ".join(f"{key}: {found.get(key)}" for key in differing)
        raise RecipeError(
            f"`output_dir: {output_dir}` holds another run ({there}). Choose another `output_dir` or delete that folder."
        )


def dataset_names(recipe: Recipe) -> list[str]:
    """Where the teacher's text comes from: paths, or ids of the Hub."""
    names = []
    for entry in recipe.dataset_args.datasets or []:
        files = entry.data_files.values() if isinstance(entry.data_files, dict) else [entry.data_files]
        # `path` is the name of a file format where the files are named beside it
        names += [entry.path] if entry.data_files is None else files
    names = names or [recipe.script_args.dataset_name]
    return [name for item in names for name in (item if isinstance(item, list) else [item])]


def checkpoint_to_resume(resume_from_checkpoint: str | None) -> str | bool | None:
    """`True`, the last checkpoint, where a recipe or a command line says `true`; else a path or `None`."""
    flags = {"true": True, "false": None}
    return flags.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str):
    """Put the wall-clock time of the block into `seconds[name]`."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def display_path(path: str | None) -> str | None:
    """A path below the current directory as it would be typed there; anything else as it is."""
    if path is None or not os.path.isabs(path):
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def command(recipe_path: Path | None, argv: list[str]) -> str | None:
    """
    The command that repeats this run, without secrets; `None` for a recipe that no command line named.

    Args:
        recipe_path (`Path`, *optional*):
            The recipe.
        argv (`list[str]`):
            The process's `sys.argv`: the recipe is its program or its first argument.
    """
    named = [index for index, argument in enumerate(argv[:2]) if recipe_path and same_file(recipe_path, argument)]
    if not named:
        return None
    overrides = argv[named[0] + 1 :]
    path = display_path(str(recipe_path))
    return shlex.join(["trl-bbkd", "train", path, *arguments_without_secrets(overrides)])


def same_file(path: Path, other: str) -> bool:
    return path.resolve() == Path(other).resolve()


def settings(recipe: Recipe) -> dict:
    """What the recipe's file says, without secrets and the `env` block."""
    if recipe.path is None:
        return {}
    return without_secrets({"method": recipe.method, **RecipeFile(recipe.path).values})
