"""A run whose student writes text, and SeqKD beside it."""

import dataclasses
import functools
import gc
import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from datasets import IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from trl import get_peft_config, get_quantization_config

from ..data.answers import count_prompts, first_prompts
from ..data.sameness import sameness_warnings
from ..data.splitting import input_key, rows_by_input
from ..data.student_tokenizer import student_tokenizer
from ..data.teacher_data import check_teacher_data, load_teacher_data, tokenize_teacher_data
from ..errors import RecipeError
from ..evaluation.diversity import SampledCurve, paired_difference_at_equal_diversity
from ..evaluation.intervals import interval_of_mean
from ..evaluation.student import TEMPERATURES, evaluate_student, evaluate_teacher, temperature_name
from ..evaluation.vllm import TrainersVLLM
from ..host._compat import whole_models
from ..host.engines import gathered
from ..host.model_files import load_model
from ..host.model_paths import base_of_student, no_model
from ..host.preflight import refuse_broken_weights
from ..host.sharding import is_sharded
from ..hub.model_card import library_versions
from ..reports.held_out import prompt_lines, write_held_out
from ..reports.report import EVALUATION, SEQKD, TEACHER, UNDISTILLED, duration
from ..reports.text_report import TextReport, decline
from ..reports.uncertainty import paired_difference
from ..seqkd.trainer import CurveCallback, curve, train_seqkd
from .job import SEED, Job, display_path, hold_out, timed
from .methods import load_class
from .progress import TRAINED
from .recipe import Recipe, import_callable, judge_of
from .sampling_plan import EVALUATION_PROMPTS, answers_in_training, sampling_plan
from .trackers import Trackers


logger = logging.getLogger(__name__)


class TextJob(Job):
    """Data, tokenizer and measurements of one recipe, made before any model is loaded."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        judge = self.script_args.sample_metrics
        self.sample_metrics = import_callable(judge) if judge else None
        self.reward_funcs = [import_callable(name) for name in self.script_args.reward_funcs or []]

        most = self.script_args.eval_prompts or EVALUATION_PROMPTS
        train, test = load_teacher_data(self.script_args, recipe.dataset_args)
        check_teacher_data(train)
        if test is None:
            train, test = hold_out(train, most)
        else:
            check_teacher_data(test)
        self.peft_config = get_peft_config(recipe.model_args)
        self.quantization_config = get_quantization_config(recipe.model_args)
        with self.one_line_errors():
            self.base = base_of_student(self.model)
        if self.base and (self.peft_config or self.quantization_config):
            raise RecipeError(
                f"model_name_or_path={self.model!r} is an adapter, which is trained on: take use_peft, load_in_4bit and "
                "load_in_8bit out. Or merge it into its base model and name that."
            )
        self._tokenize(train, test, most)
        self.temperatures = [float(value) for value in self.script_args.eval_temperatures or TEMPERATURES]
        steps = self._planned_steps()
        learned = steps * self._rows_of_a_step
        self.plan = sampling_plan(
            self.script_args,
            steps,
            count_prompts(self.test),
            self.script_args.seqkd_baseline,
            answers_in_training(self.method.samples_per_prompt(self.args), learned),
            self.method.samples_of_a_row(self.args) * learned,
        )
        self.held_out_rows = first_prompts(self.test, self.plan.prompts)
        self.data_warnings = sameness_warnings(self.train, self.held_out_rows, self.counts)
        for warning in self.data_warnings if self.is_main_process else []:
            if warning["kind"] != "cut answers":  # which the tokeniser has told of
                logger.warning(warning["text"])
        self.judge = judge_of(self.script_args)
        if self.judge is not None:
            # Before any weights are loaded, a judge that cannot be asked is an error
            training_judge = self._training_judge()
            training_judge.refuse_names(self.args.metric_for_best_model, self._names_of_sample_metrics)
            training_judge.check()
        self.vllm: TrainersVLLM | None = None
        self._measuring = 0.0  # seconds since they were asked for
        self.measure = functools.partial(
            self._evaluate,
            tokenizer=self.tokenizer,
            rows=self.held_out_rows,
            sample_metrics=self.sample_metrics,
            max_new_tokens=self.args.max_completion_length,
            temperatures=self.temperatures,
            num_samples=self.plan.samples,
            batch_size=self.args.per_device_eval_batch_size,
            seed=SEED,
            chat_template_kwargs=self.args.chat_template_kwargs,
            progress_bar=None if self.args.disable_tqdm else "sampling for the report",
        )
        self.last_measured: dict[str, dict] = {"by_row": {}, "samples": {}}  # along the way
        self.measure_briefly = functools.partial(
            self.measure,
            temperatures=self.temperatures[:1],
            num_samples=self.plan.curve_samples,
            **self.last_measured,
        )

    def _evaluate(self, model, **settings) -> dict[str, float]:
        seconds: dict[str, float] = {}
        with timed(seconds, EVALUATION):
            # What samples is known once there is a trainer
            found = evaluate_student(model, vllm=self.vllm, **settings)
        self._measuring += seconds[EVALUATION]
        return found

    def _measuring_seconds(self) -> float:
        """What measuring students has taken since this was last asked."""
        seconds, self._measuring = self._measuring, 0.0
        return seconds

    def _parted(self, seconds: float) -> dict[str, float]:
        """A training's time, apart from what its measurements along the way took."""
        along = self._measuring_seconds()
        return {"seconds": seconds - along, EVALUATION: along}

    @property
    def _evaluation_seconds(self) -> float:
        """What all measurements of the run took, those along the way included."""
        # Others are lists, as of the trackers that have the report
        parts = [part for part in self.progress.parts.values() if isinstance(part, dict)]
        along = sum(part.get(EVALUATION, 0.0) for part in parts)
        return along + sum(part.get("seconds", 0.0) for part in parts if "by_row" in part)

    def _training_judge(self):
        return load_class("trl_bbkd.judging.in_training:TrainingJudge")(self.judge, self.args.output_dir, self.test)

    def _names_of_sample_metrics(self) -> list[str]:
        """Of what `sample_metrics` returns, by one of the teacher's answers; none where no evaluation has them."""
        if self.sample_metrics is None or self.args.eval_strategy == "no":
            return []
        found = evaluate_teacher(self.held_out_rows[:1], self.sample_metrics, self.tokenizer)
        return [name.partition("@")[0] for name in found]

    def _planned_steps(self) -> int:
        args = self.args
        if args.max_steps > 0:
            return args.max_steps
        if isinstance(self.train, IterableDataset):
            raise RecipeError(
                "A stream has no end that is known, so that num_train_epochs means nothing. Set max_steps."
            )
        samples = args.num_train_epochs * len(self.train) * self.method.samples_per_prompt(args)
        return math.ceil(samples / self._rows_of_a_step)

    @property
    def _rows_of_a_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _tokenize(self, train, test, most: int) -> None:
        hub = {"revision": self.args.model_init_kwargs["revision"], "trust_remote_code": self.args.trust_remote_code}
        has_tokenizer = self.base is None or (Path(self.model) / "tokenizer_config.json").is_file()
        source, sides = (
            (self.model if has_tokenizer else self.base),
            {"truncation_side": "left", "padding_side": "left"},
        )
        try:
            config = AutoConfig.from_pretrained(self.base or self.model, **hub)
        except (OSError, ValueError) as error:
            name = f"base_model_name_or_path of the adapter {self.model}" if self.base else "model_name_or_path"
            raise RecipeError(no_model(name, self.base or self.model, "a student", error)) from error
        with self.one_line_errors():
            self.tokenizer = student_tokenizer(source, self.args, **sides, **hub)
        if not config.architectures:
            raise RecipeError(
                f"model_name_or_path={self.model!r}: its config.json names no `architectures`, by which TRL finds the model's "
                'class. Add them, such as "architectures": ["Qwen2ForCausalLM"].'
            )
        model_class = getattr(transformers, config.architectures[0], None)
        if model_class is not None and not issubclass(model_class, GenerationMixin):
            raise RecipeError(
                f"model_name_or_path={self.model!r} is a {config.architectures[0]}, which writes no text: take a causal language "
                "model. (For a classifier there is `method: llkd`.)"
            )
        tokenize = functools.partial(
            tokenize_teacher_data,
            tokenizer=self.tokenizer,
            max_completion_length=self.args.max_completion_length,
            max_prompt_length=self.args.max_prompt_length,
            max_length=getattr(config.get_text_config(), "max_position_embeddings", None),
            chat_template_kwargs=self.args.chat_template_kwargs,
            reasoning=self.args.reasoning,
        )
        self.train, train_counts = tokenize(train, answers_per_prompt=self.args.answers_per_prompt)
        test, test_counts = tokenize(test, held_out=True)
        self.test = first_prompts(test, most)
        self.counts = {"train": train_counts, "test": test_counts}
        if self.is_main_process:
            print(train_counts)

    def student(self):
        """The student as trainers take it: its path, or an adapter on its base model, in memory."""
        if self.base is None:
            return self.model
        refuse_broken_weights(self.model, "student")
        refuse_broken_weights(self.base, "student's base model")
        kwargs = {key: value for key, value in self.args.model_init_kwargs.items() if value is not None}
        return load_model(self.model, trainable=True, **kwargs)

    def trainer_arguments(self) -> dict:
        """What the run hands a trainer of TRL, but for what it evaluates on."""
        return {
            "model": self.student(),
            "args": self.args,
            "train_dataset": self.train,
            "processing_class": self.tokenizer,
            "callbacks": [CurveCallback(self.measure_briefly, at_end=False)],
            "peft_config": self.peft_config,
            "quantization_config": self.quantization_config,
        }

    def distil(self) -> TextReport | None:
        args = self.args
        seconds: dict[str, float] = {}
        with self.one_line_errors():
            trainer = self.method.trainer(self)
        if hasattr(trainer, "vllm_generation") and self.quantization_config is None:
            self.vllm = TrainersVLLM(trainer.vllm_generation)
        if self.judge is not None:
            trainer.add_callback(load_class("trl_bbkd.judging.callback:JudgeCallback")(trainer, self.test, self.judge))
        self.open_progress(trainer)
        name = trainer._name
        self.trackers = Trackers(
            trainer, self.progress, lambda: prompt_lines(self.held_out_rows, {name: self.last_measured})
        )
        self.start_card(trainer)
        # Without the student's training there is no report
        undistilled = self._undistilled(trainer) if "distil" in getattr(args, "stages", ["distil"]) else {}
        if self.is_trained:
            self.recall(trainer)
            found = self.progress[TRAINED]
        else:
            with self.one_line_errors(self.method.errors):
                output = self.run_training(trainer, seconds)
            if output is None:
                if self.is_main_process:
                    print(f"The recipe leaves the student's training out. What it asks for: {args.output_dir}")
                return None
            found = self.finished_training(
                lambda: {
                    **self._parted(seconds[trainer._name]),
                    "more results": self.method.more_results(self, trainer),
                    "findings": self.method.findings(trainer),
                    "warnings": self.method.warnings(trainer),
                }
            )
        distilled = self._measured(
            trainer._name,
            lambda: (
                self._load(args.output_dir) if self.is_trained else trainer.accelerator.unwrap_model(trainer.model)
            ),
        )
        self.max_steps = trainer.state.max_steps
        log_history = trainer.state.log_history
        report = load_class(self.method.report)(
            method=trainer._name,
            student=display_path(self.model),
            teacher=self.script_args.teacher_name,
            results={
                UNDISTILLED: undistilled,
                trainer._name: distilled,
                **found["more results"],
                TEACHER: evaluate_teacher(
                    self.held_out_rows, self.sample_metrics, self.tokenizer, self.temperatures[0]
                )
                if self.is_main_process
                else {},
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
                "prompts": self.plan.prompts,
                "samples": self.plan.samples,
                "temperatures": self.temperatures,
                "max_new_tokens": args.max_completion_length,
                "seed": SEED,
            },
            versions=library_versions(),
            seconds={trainer._name: found["seconds"]},
            **found["findings"],
        )
        if self.is_main_process:
            report.differences[UNDISTILLED] = self._differences(trainer._name, UNDISTILLED)
            report.intervals = self._intervals(trainer._name)
            report.warnings = [*self.data_warnings, *found["warnings"], *decline(report)]
        return report

    def add_baselines(self, report: TextReport) -> None:  # type: ignore[override]
        """Train SeqKD and add what its best checkpoint reaches; then have the students judged, if the recipe says so."""
        if self.script_args.seqkd_baseline:
            self._add_seqkd(report)
        if self.judge is not None and self.is_main_process:
            students = [name for name in report.results if name in self.progress]
            lines = self._held_out(*students)
            report.verdicts_of_judge, problems = self._training_judge().report(lines, students, report.at)
            report.warnings += [{"kind": "judge", "step": self.max_steps, "text": text} for text in problems]

    def _add_seqkd(self, report: TextReport) -> None:
        if self.vllm is not None:
            self.vllm.outlive_the_trainer()
        gc.collect()
        torch.cuda.empty_cache()
        output_dir = str(Path(self.args.output_dir) / "seqkd")
        seqkd = dict(self.progress.once("SeqKD's training", lambda: self._train_seqkd(report, output_dir)))
        report.seconds[SEQKD] = seqkd.pop("seconds")
        seqkd.pop(EVALUATION, None)
        best = self._measured(SEQKD, lambda: self._load(output_dir))
        undistilled = report.results[UNDISTILLED]
        points = [
            point if point["step"] != seqkd["best_step"] else {"step": seqkd["best_step"], **best}
            for point in seqkd.pop("curve")
        ]
        report.curves[SEQKD] = [{"step": 0, **undistilled}, *points]
        method = report.results.pop(report.method)
        report.results |= {SEQKD: best, report.method: method}
        report.seqkd = seqkd
        if self.is_main_process:
            report.differences[SEQKD] = self._differences(report.method, SEQKD)

    def _train_seqkd(self, report: TextReport, output_dir: str) -> dict:
        seconds: dict[str, float] = {}
        with timed(seconds, SEQKD):
            seqkd = train_seqkd(
                self.student(),
                self.args,
                self.train,
                self.tokenizer,
                self.measure_briefly,
                is_better=lambda new, old: quality(new, report) > quality(old, report),
                output_dir=output_dir,
                max_steps=self.max_steps,
                learning_rate=self.script_args.seqkd_learning_rate or self.method.sft_learning_rate(self.args),
                samples_per_prompt=self.method.samples_per_prompt(self.args),
                peft_config=self.peft_config,
                quantization_config=self.quantization_config,
            )
        return dataclasses.asdict(seqkd) | self._parted(seconds[SEQKD])

    def _undistilled(self, trainer) -> dict[str, float]:
        """What the student is before it learns, and how long the report's sampling will take."""
        is_new = UNDISTILLED not in self.progress
        if is_new and self.is_main_process:
            print(self.plan)
        seconds: dict[str, float] = {}
        student = trainer.accelerator.unwrap_model(trainer.model)
        parameters = list(student.parameters()) if is_new else []
        if is_new and is_sharded(self.args) and not any(hasattr(parameter, "ds_id") for parameter in parameters):
            # Sharding brings it to its device, when the training begins
            student.to(self.args.device)
        # Before its training nothing gathers what ZeRO-3 has partitioned
        with timed(seconds, UNDISTILLED), gathered(parameters, is_written=False):
            undistilled = self._measured(UNDISTILLED, lambda: student)
        if is_new and self.is_main_process:
            rest = seconds[UNDISTILLED] * (self.plan.all / self.plan.once - 1)
            print(f"report: that took {duration(seconds[UNDISTILLED])}; at this pace the rest takes {duration(rest)}")
        return undistilled

    def _measured(self, name: str, model: Callable) -> dict[str, float]:
        """What all processes measure of a student, once, and the main one gets; an empty dictionary on the others."""

        def measure():
            by_row, samples = {}, {}
            metrics = self.measure(model(), by_row=by_row, samples=samples)
            return {
                "metrics": metrics,
                "by_row": by_row,
                "samples": samples,
                "seconds": self._measuring_seconds(),
            }

        return self.progress.once(name, measure).get("metrics", {})

    def _differences(self, method: str, other: str) -> dict[str, dict[str, float]]:
        """Of each metric, how far the method's student is from another, and how sure that is."""
        own, others = (self.progress[name]["by_row"] for name in (method, other))
        found = {name: paired_difference(own[name], others[name], **self._prompts_of(name)) for name in own}
        found = {name: {key: self._scale(name) * value for key, value in found[name].items()} for name in found}
        if self.sample_metrics is not None and len(self.temperatures) > 1:
            judged = next(iter(own)).partition("@")[0]
            found[f"{judged}@equal_diversity"] = self._at_equal_diversity(judged, method, other)
        return found

    def _intervals(self, student: str) -> dict[str, tuple[float, float]]:
        """Of each metric, the interval of a student's own value."""
        found = {
            name: interval_of_mean(values, **self._prompts_of(name))
            for name, values in self.progress[student]["by_row"].items()
        }
        return {name: (self._scale(name) * low, self._scale(name) * high) for name, (low, high) in found.items()}

    def _prompts_of(self, metric: str) -> dict:
        """Prompt and weight of each value: the judge's metrics and others of the samples are of prompts, the NLL of answers."""
        prompts = [input_key(row["prompt"]) for row in self.held_out_rows]
        if metric == "teacher_nll":
            return {"weights": [len(row["teacher_ids"]) for row in self.held_out_rows], "groups": prompts}
        return {"weights": None, "groups": [prompts[numbers[0]] for numbers in self._rows_by_prompt]}

    def _scale(self, metric: str) -> int:
        """A number of answers is a sum over prompts, all else a mean."""
        return len(self._rows_by_prompt) if metric.startswith("distinct_valid") else 1

    @functools.cached_property
    def _rows_by_prompt(self) -> list[list[int]]:
        return rows_by_input(tuple(row["prompt_ids"]) for row in self.held_out_rows)

    def _at_equal_diversity(self, judged: str, method: str, other: str) -> dict[str, float]:
        lines = self._held_out(method, other)
        names = [temperature_name(temperature) for temperature in self.temperatures]

        def curve_of(student: str) -> SampledCurve:
            found = [line["students"][student] for line in lines]
            return SampledCurve(
                [[answers["samples"][at] for answers in found] for at in names],
                [[answers["values"][f"{judged}@{at}"] for answers in found] for at in names],
            )

        return paired_difference_at_equal_diversity(curve_of(method), curve_of(other), len(lines))

    def _held_out(self, *students: str) -> list[dict]:
        """What students said to held-out prompts, a dictionary for each."""
        return prompt_lines(self.held_out_rows, {name: self.progress[name] for name in students})

    def answers(self, report: TextReport) -> list[dict]:  # type: ignore[override]
        return self._held_out(*(name for name in report.results if name in self.progress))

    def write(self, report: TextReport) -> None:  # type: ignore[override]
        report.seconds.pop(EVALUATION, None)
        report.seconds[EVALUATION] = self._evaluation_seconds
        super().write(report)
        if self.is_main_process:
            write_held_out(self.answers(report), self.args.output_dir)

    def _load(self, folder: str):
        kwargs = {key: value for key, value in self.args.model_init_kwargs.items() if key != "revision"}
        # vLLM is handed an adapter's student merged, which PEFT's own models can be
        load = AutoModelForCausalLM.from_pretrained if self.vllm is None else load_model
        with whole_models():
            model = load(folder, quantization_config=self.quantization_config, **kwargs)
        return model if self.quantization_config else model.to(self.args.device)


def quality(metrics: dict[str, float], report: TextReport) -> tuple[float, ...]:
    """Compares checkpoints: the judge's deciding metric if there is one, then the NLL of the teacher's answers."""
    judged = (metrics[report.headline],) if report.judged_metrics else ()
    return (*judged, -metrics["teacher_nll"])
