"""A run whose student writes text: GAD, Proxy-KD, Bayes-KD, and SeqKD beside them."""

import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config, get_quantization_config

from .evaluation import evaluate_student, evaluate_teacher
from .job import SEED, Job, checkpoint_to_resume, display_path, hold_out, timed
from .methods import METHOD_RUNS
from .model_card import library_versions
from .recipe import Recipe, RecipeError, import_callable
from .report import TEACHER, UNDISTILLED
from .seqkd import curve, train_seqkd
from .teacher_data import check_teacher_data, load_teacher_data, tokenize_teacher_data
from .text_report import SEQKD, TextReport


EVALUATION_PROMPTS = 256
EVALUATION_SAMPLES = 8
CURVE_SAMPLES = 4


class TextJob(Job):
    """Data, tokenizer and measurements of one recipe, made before any model is loaded."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.method = METHOD_RUNS[recipe.method](self)
        judge = self.script_args.sample_metrics
        self.sample_metrics = import_callable(judge) if judge else None
        self.reward_funcs = [import_callable(name) for name in self.script_args.reward_funcs or []]

        train, test = load_teacher_data(self.script_args, recipe.dataset_args)
        check_teacher_data(train)
        if test is None:
            train, test = hold_out(train, EVALUATION_PROMPTS)
        else:
            check_teacher_data(test)
        self.peft_config = get_peft_config(recipe.model_args)
        self.quantization_config = get_quantization_config(recipe.model_args)
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
        try:
            config = AutoConfig.from_pretrained(self.model, **hub).get_text_config()
            self.tokenizer = AutoTokenizer.from_pretrained(
                self.model, truncation_side="left", padding_side="left", **hub
            )
        except OSError as error:
            raise RecipeError(
                f"model_name_or_path={self.model!r} is neither a folder with a student nor a model on the Hub: {error}"
            ) from error
        tokenize = functools.partial(
            tokenize_teacher_data,
            tokenizer=self.tokenizer,
            max_completion_length=self.args.max_completion_length,
            max_prompt_length=self.args.max_prompt_length,
            max_length=getattr(config, "max_position_embeddings", None),
            chat_template_kwargs=self.args.chat_template_kwargs,
            reasoning=self.args.reasoning,
        )
        self.train, train_counts = tokenize(train)
        test, test_counts = tokenize(test, held_out=True)
        self.test = list(itertools.islice(test, EVALUATION_PROMPTS))
        self.counts = {"train": train_counts, "test": test_counts}
        if self.is_main_process:
            print(train_counts)

    def distil(self) -> TextReport | None:
        args, seconds = self.args, {}
        resume, args.resume_from_checkpoint = checkpoint_to_resume(args.resume_from_checkpoint), None
        try:
            trainer = self.method.trainer()
            trainer.check_output_dir(resume)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        self.start_card(trainer)
        undistilled = self._on_main_process(lambda: self.measure(trainer.accelerator.unwrap_model(trainer.model)))

        with timed(seconds, trainer._name), self.method.errors():
            output = trainer.train(resume_from_checkpoint=resume)
        if output is None:
            if self.is_main_process:
                print(f"The recipe leaves the student's training out. What it asks for: {args.output_dir}")
            return None
        self.save(trainer)
        distilled = self._on_main_process(lambda: self.measure(trainer.accelerator.unwrap_model(trainer.model)))
        self.max_steps = trainer.state.max_steps
        log_history = trainer.state.log_history
        return TextReport(
            method=trainer._name,
            student=display_path(self.model),
            teacher=self.script_args.teacher_name,
            results={
                UNDISTILLED: undistilled,
                trainer._name: distilled,
                **self._on_main_process(lambda: self.method.more_results(trainer)),
                TEACHER: evaluate_teacher(self.test, self.sample_metrics, self.tokenizer),
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

    def add_baselines(self, report: TextReport) -> None:
        """Train SeqKD and add what its best checkpoint reaches."""
        if not self.script_args.seqkd_baseline:
            return
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

    def _on_main_process(self, measure: Callable[[], dict]) -> dict:
        """What the main process measures; an empty dictionary on the others, which wait."""
        metrics = measure() if self.is_main_process else {}
        PartialState().wait_for_everyone()
        return metrics

    def _load(self, folder: str):
        kwargs = {key: value for key, value in self.args.model_init_kwargs.items() if key != "revision"}
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=self.quantization_config, **kwargs)
        return model if self.quantization_config else model.to(self.args.device)


def quality(metrics: dict[str, float], report: TextReport) -> tuple[float, ...]:
    """Compares checkpoints: the judge's metric at temperature 1 if there is one, then the NLL of the teacher's answers."""
    judged = (metrics[report.headline],) if report.judged_metrics else ()
    return (*judged, -metrics["teacher_nll"])
