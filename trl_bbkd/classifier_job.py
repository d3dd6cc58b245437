"""A run whose student classifies: LLKD, and beside it the same student on all rows and on random ones."""

import copy
import dataclasses
import gc
from pathlib import Path

import torch
from datasets import Dataset
from trl import get_peft_config, get_quantization_config

from .classifier_report import (
    ALL_ROWS,
    RANDOM_ROWS,
    ClassifierReport,
    last_value,
    mean_over_steps,
    starved_classes,
)
from .job import Job, checkpoint_to_resume, display_path, hold_out, timed
from .llkd.label_calibration import reliability_report
from .llkd.llkd_config import LLKDConfig
from .llkd.llkd_trainer import LLKDTrainer
from .llkd.rows import count_labels, find_class_names, with_class_numbers
from .model_card import library_versions
from .recipe import Recipe, RecipeError
from .report import UNDISTILLED
from .selection.signals import LLKDDataError
from .seqkd import CURVE_POINTS
from .teacher_data import load_teacher_data


HELD_OUT_ROWS = 1000
FORWARD, BACKWARD = 1, 2  # costs of a row
METRICS = ("accuracy", "macro_f1")


class ClassifierJob(Job):
    """Rows with the teacher's labels, and the trainings of one recipe."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        train, test = load_teacher_data(self.script_args, recipe.dataset_args)
        if not isinstance(train, Dataset):
            raise RecipeError(
                "LLKD draws pools from shuffled rows and counts their classes: it cannot stream. Take dataset_streaming out."
            )
        self.truth = "the true labels"
        if test is None:
            train, test = hold_out(train, HELD_OUT_ROWS)
            test = self._with_known_truth(test)
        try:
            names = find_class_names(train, self.args.labels)
            self.train, self.test = self._numbered(train, names, "training"), self._numbered(test, names, "test")
        except LLKDDataError as error:
            raise RecipeError(str(error)) from error
        if self.args.eval_strategy == "no":
            self.args.eval_strategy, self.args.eval_steps = "steps", 1 / CURVE_POINTS
        quantization = get_quantization_config(recipe.model_args)
        if quantization is not None:
            self.args.model_init_kwargs["quantization_config"] = quantization
        # TRL's default is a language model's, which would leave the head untrained
        self.peft_config = get_peft_config(dataclasses.replace(recipe.model_args, lora_task_type="SEQ_CLS"))

    def _with_known_truth(self, test: Dataset) -> Dataset:
        """Held-out training rows: with their true labels if all are known, else with the teacher's."""
        if "gold" in test.column_names and None not in test["gold"][:]:
            return test.remove_columns("label").rename_column("gold", "label")
        self.truth = "the teacher's labels"
        return test

    @staticmethod
    def _numbered(rows: Dataset, names: list[str], where: str) -> Dataset:
        rows = with_class_numbers(rows, "label", names, where)
        return with_class_numbers(rows, "gold", names, where) if "gold" in rows.column_names else rows

    def _trainer(self, args: LLKDConfig) -> LLKDTrainer:
        return LLKDTrainer(
            model=self.model,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.test,
            peft_config=copy.deepcopy(self.peft_config),
        )

    def distil(self) -> ClassifierReport:
        resume = checkpoint_to_resume(self.args.resume_from_checkpoint)
        try:
            trainer = self._trainer(self.args)
            trainer.check_output_dir(resume)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        # Only now: the trainer has looked at every row
        self.counts = {"train": count_labels(self.train), "test": count_labels(self.test)}
        self.start_card(trainer)
        undistilled, seconds = evaluate(trainer), {}
        with timed(seconds, trainer._name):
            trainer.train(resume_from_checkpoint=resume)
        self.save(trainer)
        distilled = evaluate(trainer)
        self.max_steps, log = trainer.state.max_steps, trainer.state.log_history
        share = mean_over_steps(log, "selection/kept_share") if trainer.selector else 1.0
        scores = trainer.selector is not None and trainer.selector.settings.asks_student
        report = ClassifierReport(
            method=trainer._name,
            student=display_path(self.model),
            teacher=self.script_args.teacher_name,
            results={
                UNDISTILLED: undistilled,
                trainer._name: distilled
                | {
                    "learned_share": share,
                    "distinct_rows": last_value(log, "selection/distinct_rows"),
                    "compute": compute(share, scores),
                    "seconds": seconds[trainer._name],
                },
            },
            curves={trainer._name: curve(undistilled, log, self.max_steps, distilled)},
            log_history=log,
            counts=self.counts,
            inputs=self.inputs,
            command=self.card.command,
            settings=self.card.settings,
            versions=library_versions(),
            seconds=seconds,
            truth=self.truth,
            class_names=trainer.class_names,
            warmup_steps=self.args.selection_warmup_steps if scores else 0,
            teacher_labels=self._teacher_labels(log),
        )
        report.selection = self._selection(report) if trainer.selector else {}
        report.warnings = starved_classes(report)
        return report

    def _selection(self, report: ClassifierReport) -> dict[str, dict]:
        log, found = report.log_history, {}
        for number, name in enumerate(report.class_names):
            found[name] = {
                "kept_share": mean_over_steps(log, f"selection/kept_share_{number}", report.warmup_steps),
                "threshold_teacher": last_value(log, f"selection/threshold_teacher_{number}"),
                "threshold_student": last_value(log, f"selection/threshold_student_{number}"),
            }
        return found

    def _teacher_labels(self, log: list[dict]) -> dict:
        if "gold" not in self.train.column_names:
            return {}
        checked = self.train.filter(lambda gold: gold is not None, input_columns="gold")
        if not len(checked):
            return {}
        columns = checked.with_format("torch")[:]
        shares = {
            "kept": lambda entry: entry["selection/kept_share"],
            "dropped": lambda entry: 1 - entry["selection/kept_share"],
        }
        return reliability_report(columns["teacher_confidence"], columns["label"] == columns["gold"]) | {
            f"accuracy_{rows}": mean_over_steps(
                log, f"selection/teacher_accuracy_{rows}", self.args.selection_warmup_steps, share
            )
            for rows, share in shares.items()
        }

    def add_baselines(self, report: ClassifierReport) -> None:
        """Train the same student on all rows of the same pools, and on random ones."""
        if not self.script_args.baselines or self.args.selection == "none":
            return
        share = report.results[report.method]["learned_share"]
        settings = {
            ALL_ROWS: {
                "selection": "none",
                "gradient_accumulation_steps": self.args.gradient_accumulation_steps * self.args.pool_factor,
            },
            RANDOM_ROWS: {
                "selection_rule": "random",
                "selection_budget": share,
                "selection_weighting": "none",
                "selection_warmup_steps": 0,
            },
        }
        if not 0 < share < 1:
            # Nothing was selected, or all: there is no share to draw
            del settings[RANDOM_ROWS]
        for name, changes in settings.items():
            self._add_baseline(report, name, changes)
        # The method closes the table
        report.results[report.method] = report.results.pop(report.method)

    def _add_baseline(self, report: ClassifierReport, name: str, changes: dict) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        args = copy.copy(self.args)
        alone = {"max_steps": self.max_steps, "save_strategy": "no", "push_to_hub": False, "report_to": []}
        output_dir = str(Path(self.args.output_dir) / name.replace(" ", "_"))
        for key, value in {**changes, **alone, "output_dir": output_dir}.items():
            setattr(args, key, value)
        trainer = self._trainer(args)
        with timed(report.seconds, name):
            trainer.train()
        trainer.save_model(output_dir)
        found, log = evaluate(trainer), trainer.state.log_history
        seen = self.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size * args.world_size
        share = mean_over_steps(log, "selection/kept_share") if trainer.selector else 1.0
        report.results[name] = found | {
            "learned_share": share,
            "distinct_rows": last_value(log, "selection/distinct_rows") or min(seen, len(self.train)),
            "compute": compute(share, scores=False),
            "seconds": report.seconds[name],
        }
        report.curves[name] = curve(report.results[UNDISTILLED], log, self.max_steps, found)


def evaluate(trainer: LLKDTrainer) -> dict[str, float]:
    """Accuracy and macro F1 of the student as it is."""
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in METRICS}


def curve(undistilled: dict, log: list[dict], last_step: int, distilled: dict) -> list[dict]:
    """Metrics along the way, from those of the undistilled student to those of the distilled one."""
    measured = {
        entry["step"]: {name: entry[f"eval_{name}"] for name in METRICS} for entry in log if "eval_accuracy" in entry
    }
    points = {0: undistilled, **measured, last_step: distilled}
    return [{"step": step, **{name: points[step][name] for name in METRICS}} for step in sorted(points)]


def compute(share: float, scores: bool) -> float:
    """
    Cost of learning from a share k of every pool, over that of learning from all of it: (1 + 3k) / 3 where the pool is
    scored first, else k, if a backward pass costs two forward passes.

    Args:
        share (`float`):
            k.
        scores (`bool`):
            Whether the pool is scored, without gradients.
    """
    whole = FORWARD + BACKWARD
    return (FORWARD * scores + whole * share) / whole
