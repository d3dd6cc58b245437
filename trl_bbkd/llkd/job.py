"""A run of LLKD, whose student classifies, and beside it the same student on all rows and on random ones."""

import copy
import dataclasses
import functools
import gc
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from trl import get_peft_config, get_quantization_config

from ..data.teacher_data import load_teacher_data, row_names
from ..errors import LLKDDataError, RecipeError
from ..host.engines import gathered
from ..host.model_paths import base_of_student, no_model
from ..host.sharding import is_sharded
from ..hub.model_card import library_versions
from ..reports.report import UNDISTILLED
from ..reports.uncertainty import macro_f1_difference, paired_difference
from ..runs.job import Job, display_path, hold_out, timed
from ..runs.progress import TRAINED
from ..runs.recipe import Recipe
from ..runs.trackers import Trackers
from ..seqkd.trainer import CURVE_POINTS
from .config import LLKDConfig
from .label_calibration import reliability_report
from .report import ALL_ROWS, RANDOM_ROWS, LLKDReport, decline, starved_classes
from .rows import count_labels, find_class_names, with_class_numbers
from .trainer import LLKDTrainer, class_logits, classification_metrics


HELD_OUT_ROWS = 1000
FORWARD, BACKWARD = 1, 2  # costs of a row
METRICS = ("accuracy", "macro_f1")
TRUE_LABELS, TEACHERS_LABELS = "the true labels", "the teacher's labels"
# What a report needs, and why
NEEDED_SETTINGS = {
    "load_best_model_at_end": (False, "the student would be chosen by the rows that it is measured on"),
    "dataloader_drop_last": (False, "test rows would be left out"),
    "prediction_loss_only": (False, "there would be no predictions to measure"),
    "eval_do_concat_batches": (True, "predictions are measured together"),
    "label_names": (None, "labels are in the column `label`"),
}


class LLKDJob(Job):
    """Rows with the teacher's labels, and the trainings of one recipe."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self._check_settings()
        with self.one_line_errors():
            is_adapter = base_of_student(self.model) is not None
        if is_adapter:
            raise RecipeError(
                f"model_name_or_path={self.model!r} is an adapter; LLKD puts a new head on a whole model. Merge it into its base "
                "model and name that."
            )
        train, test = load_teacher_data(self.script_args, recipe.dataset_args, self.args.text_column)
        if not isinstance(train, Dataset):
            raise RecipeError(
                "LLKD draws pools from shuffled rows and counts their classes: it cannot stream. Take dataset_streaming out."
            )
        try:
            # Before any row is held out: it may be the only one of its class
            names = find_class_names(train, self.args.labels)
            train = self._numbered(train, names, "training")
            if test is None:
                train, test = self._held_out(train)
            else:
                test = self._with_true_labels(self._numbered(test, names, "test"))
        except LLKDDataError as error:
            raise RecipeError(str(error)) from error
        # Numbered anew by the trainer; without a selection nothing looks at confidences
        unused = ("row_id",) if self.args.selection == "llkd" else ("row_id", "teacher_confidence")
        self.train = train.remove_columns([name for name in unused if name in train.column_names])
        self.test = test
        self.held_out_rows = test.to_list()
        if self.args.eval_strategy == "no":
            self.args.eval_strategy, self.args.eval_steps = "steps", 1 / CURVE_POINTS
        quantization = get_quantization_config(recipe.model_args)
        if quantization is not None:
            self.args.model_init_kwargs["quantization_config"] = quantization
        # TRL's default is a language model's, which would leave the head untrained
        self.peft_config = get_peft_config(dataclasses.replace(recipe.model_args, lora_task_type="SEQ_CLS"))

    def _check_settings(self) -> None:
        for name, (needed, reason) in NEEDED_SETTINGS.items():
            if getattr(self.args, name) != needed:
                raise RecipeError(f"{name} must be {needed} in a recipe of LLKD: {reason}.")
        if self.args.max_steps <= 0 and self.args.num_train_epochs <= 0:
            raise RecipeError("num_train_epochs is 0: nothing would be learned.")
        if self._has_baselines and self.args.train_sampling_strategy not in ("random", "sequential"):
            raise RecipeError(
                f"train_sampling_strategy={self.args.train_sampling_strategy!r} gives the baselines other pools. Take it out, or "
                "set baselines: false."
            )

    @property
    def _has_baselines(self) -> bool:
        return self.script_args.baselines and self.args.selection == "llkd"

    @staticmethod
    def _numbered(rows: Dataset, names: list[str], where: str) -> Dataset:
        rows = with_class_numbers(rows, "label", names, where)
        return with_class_numbers(rows, "gold", names, where) if "gold" in rows.column_names else rows

    def _held_out(self, train: Dataset) -> tuple[Dataset, Dataset]:
        """Training rows to measure on, with their true labels if all of those are known, else with the teacher's."""
        train, test = hold_out(train, HELD_OUT_ROWS, self.args.text_column)
        self.truth = TEACHERS_LABELS
        if "gold" in test.column_names and None not in test["gold"][:]:
            test = self._with_true_labels(test)
        return train, test

    def _with_true_labels(self, test: Dataset) -> Dataset:
        self.truth = TRUE_LABELS
        if "gold" not in test.column_names:
            return test
        if None in test["gold"][:]:
            row = row_names(test)[test["gold"][:].index(None)]
            raise RecipeError(
                f"Row {row} of the test rows has no `gold`, the true label. Fill it in, or drop the row; or leave `gold` out if "
                "`label` is the true one."
            )
        return test.remove_columns("label").rename_column("gold", "label")

    def _trainer(self, args: LLKDConfig) -> LLKDTrainer:
        return LLKDTrainer(
            model=self.model,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.test,
            peft_config=copy.deepcopy(self.peft_config),
        )

    def distil(self) -> LLKDReport:
        try:
            with self.one_line_errors((ValueError, ImportError)):
                trainer = self._trainer(self.args)
        except OSError as error:
            raise RecipeError(no_model("model_name_or_path", self.model, "a student", error)) from error
        self.open_progress(trainer)
        self.trackers = Trackers(trainer, self.progress)
        # Only now: the trainer has looked at every row
        self.counts = {"train": count_labels(self.train), "test": count_labels(self.test)}
        self.start_card(trainer)
        undistilled = self.progress.once(UNDISTILLED, lambda: self._undistilled(trainer))
        seconds: dict[str, float] = {}
        if self.is_trained:
            self.recall(trainer)
            found = self.progress[TRAINED]
        else:
            self.run_training(trainer, seconds)
            found = self.finished_training(
                lambda: {
                    **evaluate(trainer),
                    "learned": learned(trainer),
                    # A resumed training was measured in part
                    "seconds": None if self.resume else seconds[trainer._name],
                    "selection": selection_by_class(trainer) if trainer.selector else {},
                    "teacher_labels": self._teacher_labels(trainer),
                }
            )
        distilled = found["metrics"]
        self.max_steps, log = trainer.state.max_steps, trainer.state.log_history
        report = LLKDReport(
            method=trainer._name,
            student=display_path(self.model),
            teacher=self.script_args.teacher_name,
            results={
                UNDISTILLED: undistilled["metrics"],
                trainer._name: distilled | found["learned"] | {"seconds": found["seconds"]},
            },
            curves={trainer._name: curve(undistilled["metrics"], log, self.max_steps, distilled)},
            log_history=log,
            counts=self.counts,
            inputs=self.inputs,
            command=self.card.command,
            settings=self.card.settings,
            versions=library_versions(),
            seconds={} if found["seconds"] is None else {trainer._name: found["seconds"]},
            truth=self.truth,
            class_names=trainer.class_names,
            warmup_steps=self.args.selection_warmup_steps if trainer.selector else 0,
            selection=found["selection"],
            teacher_labels=found["teacher_labels"],
        )
        report.differences[UNDISTILLED] = self._differences(found, undistilled)
        report.warnings = [*starved_classes(report), *decline(report)]
        return report

    def _undistilled(self, trainer: LLKDTrainer) -> dict:
        """
        As [`evaluate`], of the student before it learns. What is to be sharded transformers cannot evaluate before its training:
        the main process does it alone, with the whole student.
        """
        if not is_sharded(self.args):
            return evaluate(trainer)
        with gathered(list(trainer.model.parameters()), is_written=False):
            found = [evaluate_alone(trainer) if self.is_main_process else None]
        return broadcast_object_list(found)[0]

    def _differences(self, own: dict, other: dict) -> dict[str, dict[str, float]]:
        """Of each metric, how far one student is from another, and how sure that is."""
        labels = self.test["label"][:]
        right = [
            [prediction == label for prediction, label in zip(found["predictions"], labels, strict=True)]
            for found in (own, other)
        ]
        classes = self.test.features["label"].num_classes
        return {
            "accuracy": paired_difference(*right),
            "macro_f1": macro_f1_difference(own["predictions"], other["predictions"], labels, classes),
        }

    def _teacher_labels(self, trainer: LLKDTrainer) -> dict:
        if trainer.selector is None or "gold" not in self.train.column_names:
            return {}
        columns = self.train.select_columns(["label", "gold", "teacher_confidence"])
        columns = columns.filter(lambda gold: gold is not None, input_columns="gold").with_format("torch")[:]
        if not len(columns["gold"]):
            return {}
        dropped, kept = trainer.tally.accuracy
        is_right = columns["label"] == columns["gold"]
        return reliability_report(columns["teacher_confidence"], is_right) | {
            "accuracy_kept": kept,
            "accuracy_dropped": dropped,
        }

    def add_baselines(self, report: LLKDReport) -> None:  # type: ignore[override]
        """Train the same student on all rows of the same pools, and on random ones."""
        if not self._has_baselines:
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
            found = self.progress.once(name, functools.partial(self._baseline, name, changes))
            report.seconds[name] = found["seconds"]
            report.results[name] = found["metrics"] | found["learned"] | {"seconds": found["seconds"]}
            report.curves[name] = curve(
                report.results[UNDISTILLED], found["log_history"], self.max_steps, found["metrics"]
            )
            report.differences[name] = self._differences(self.progress[TRAINED], found)
        # The method closes the table
        report.results[report.method] = report.results.pop(report.method)

    def _baseline(self, name: str, changes: dict) -> dict:
        gc.collect()
        torch.cuda.empty_cache()
        seconds: dict[str, float] = {}
        alone = {"max_steps": self.max_steps, "save_strategy": "no", "push_to_hub": False, "report_to": []}
        output_dir = str(Path(self.args.output_dir) / name.replace(" ", "_"))
        # A new one, because a DeepSpeed engine is made from each configuration
        trainer = self._trainer(dataclasses.replace(self.args, **changes, **alone, output_dir=output_dir))
        self.shorten_log(trainer)
        with timed(seconds, name):
            trainer.train()
        trainer.save_model(output_dir)
        return {
            **evaluate(trainer),
            "learned": learned(trainer),
            "seconds": seconds[name],
            "log_history": trainer.state.log_history,
        }


def evaluate(trainer: LLKDTrainer) -> dict:
    """Accuracy and macro F1 of the student as it is, `metrics`, and its `predictions`, one a row."""
    output = trainer.predict(trainer.eval_dataset)
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    return {
        "metrics": {name: output.metrics[f"test_{name}"] for name in METRICS},
        "predictions": logits.argmax(axis=1).tolist(),
    }


@torch.no_grad()
def evaluate_alone(trainer: LLKDTrainer) -> dict:
    """As [`evaluate`], on this process alone, of a student that no training has wrapped yet."""
    student, loader = trainer.model.eval(), trainer.get_test_dataloader(trainer.eval_dataset)
    if not any(hasattr(parameter, "ds_id") for parameter in student.parameters()):
        # Sharding brings it there when the training begins
        student.to(trainer.args.device)
    logits, labels = [], []
    for batch in DataLoader(loader.dataset, trainer.args.eval_batch_size, collate_fn=loader.collate_fn):
        with trainer.accelerator.autocast():
            found = class_logits(trainer._forward(student, batch.to(trainer.args.device)))
        logits.append(found.float().cpu())
        labels.append(batch["labels"].cpu())
    prediction = EvalPrediction(torch.cat(logits).numpy(), torch.cat(labels).numpy())
    return {
        "metrics": classification_metrics(prediction),
        "predictions": prediction.predictions.argmax(axis=1).tolist(),
    }


def curve(undistilled: dict, log: list[dict], last_step: int, distilled: dict) -> list[dict]:
    """Metrics along the way, from those of the undistilled student to those of the distilled one."""
    measured = {
        entry["step"]: {name: entry[f"eval_{name}"] for name in METRICS} for entry in log if "eval_accuracy" in entry
    }
    points = {0: undistilled, **measured, last_step: distilled}
    return [{"step": step, **{name: points[step][name] for name in METRICS}} for step in sorted(points)]


def learned(trainer: LLKDTrainer) -> dict[str, float]:
    """What a trainer learned from: the share of the rows it looked at, how many different ones, and at which cost."""
    if trainer.selector is None:
        batch = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
        seen = trainer.state.max_steps * batch * trainer.args.world_size
        return {"learned_share": 1.0, "distinct_rows": min(seen, len(trainer.train_dataset)), "compute": 1.0}
    share = trainer.tally.kept_share
    return {
        "learned_share": share,
        "distinct_rows": trainer.tally.distinct_rows,
        "compute": compute(share, trainer.selector.settings.asks_student),
    }


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


def selection_by_class(trainer: LLKDTrainer) -> dict[str, dict]:
    """Of each class, by name, the share kept after the warm-up and the last thresholds."""
    thresholds = trainer.selector.thresholds()
    columns = (
        trainer.class_names,
        trainer.tally.kept_share_by_group,
        thresholds.teacher.tolist(),
        thresholds.student.tolist(),
    )
    return {
        name: {"kept_share": share, "threshold_teacher": teacher, "threshold_student": student}
        for name, share, teacher, student in zip(*columns, strict=True)
    }
