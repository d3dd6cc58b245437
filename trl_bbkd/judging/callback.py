"""A judge at each evaluation of a trainer of TRL."""

import logging
import math
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ..data.teacher_files import ROW_COLUMN
from ..data.teacher_tokens import RENDERED_COLUMNS, prompt_ids_of
from ..evaluation.student import generate_completion_ids
from .in_training import Judged, TrainingJudge, on_the_main_process
from .reading import PREFIX, refuse_names, refuse_unjudged
from .settings import EvalJudgeConfig


logger = logging.getLogger(__name__)

MAX_TOKENS = 512
SEED = 0


class JudgeCallback(TrainerCallback):
    r"""
    Has a judge compare the student's answers to held-out prompts with the teacher's, at each evaluation.

    The evaluation gets `eval_win_rate`, `eval_lc_win_rate` and `eval_score`, as far as `judge.metrics` has them, with
    `eval_win_rate_low` and `eval_win_rate_high`, the ends of the interval, and `eval_judge_missing`, the verdicts that failed or
    could not be read. They are in the log, go to the trackers, and may be `metric_for_best_model`. All processes write answers,
    the main one asks. What was asked is in `judge/` of the trainer's `output_dir`, and is not asked again.

    A judge that fails during the training is a warning: the training goes on, and that evaluation has no such metrics. Its
    checkpoint is then not the best one.

    Example:

    ```python
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer
    from trl_bbkd import EvalJudgeConfig, JudgeCallback

    rows = load_dataset("json", data_files={"train": "teacher.jsonl", "test": "held_out.jsonl"})
    trainer = SFTTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=SFTConfig(
            output_dir="student",
            eval_strategy="steps",
            eval_steps=100,
            save_steps=100,
            load_best_model_at_end=True,
            metric_for_best_model="eval_win_rate",
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
    )
    judge = EvalJudgeConfig(base_url="https://api.openai.com/v1", model="gpt-4.1-mini", max_requests=2000)
    trainer.add_callback(JudgeCallback(trainer, rows["test"], judge))
    trainer.train()
    ```

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that the callback is added to. A callback that reads the metrics, such as
            [`~transformers.EarlyStoppingCallback`], is added after it.
        rows ([`~datasets.Dataset`] or `list[dict]`):
            Held-out rows with `prompt` and `completion`, the teacher's answer, as texts or messages.
        judge ([`EvalJudgeConfig`]):
            The judge.

    Raises:
        RecipeError: If the environment has no key, or `metric_for_best_model` is a judge's metric that is not asked for.
        EndpointError: If the judge refuses, cannot be reached, or says nothing that can be read: it is asked about a few of the
            teacher's answers.
        TeacherDataError: If the rows cannot be used.
    """

    def __init__(self, trainer: Trainer, rows: Dataset | list[dict], judge: EvalJudgeConfig):
        args = trainer.args
        refuse_unjudged(args, judge)
        self.trainer = trainer
        self.judge = TrainingJudge(judge, args.output_dir, rows)
        self.judge.check()
        if self.judge.is_the_teacher and trainer.is_world_process_zero():
            logger.warning(f"The judge {judge.model} is the teacher: it may favour its own answers.")
        # At a step of a training: a trainer with several sets of rows evaluates the same student on each
        self._found: Judged | None = None
        self._step = -1

    def on_train_begin(self, args, state, control, **kwargs):
        self._found = None
        if state.is_world_process_zero and args.eval_strategy != "no":
            print(f"eval_judge: {self._cost(args, state)}")

    def _cost(self, args, state) -> str:
        config = self.judge.config
        times = "at each evaluation"
        if args.eval_strategy == "steps":
            each = args.eval_steps if args.eval_steps >= 1 else math.ceil(state.max_steps * args.eval_steps)
            times = f"at each of {int(state.max_steps // each)} evaluations"
        caps = [name for name in ("max_requests", "max_total_tokens", "max_cost") if getattr(config, name) is not None]
        capped = ", ".join(f"{name}={getattr(config, name):g}" for name in caps) or "without a cap"
        return (
            f"{self.judge.requests:,} requests to {config.model} {times}, for {len(self.judge.prompts):,} prompts, {capped}. "
            f"What {self.judge.folder} has is not asked again."
        )

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        # Before anything is asked: of two metrics of one name the first would be lost
        refuse_names(None, self.judge.config, [name.removeprefix(PREFIX) for name in metrics])
        if self._found is None or self._step != state.global_step or not self.trainer.is_in_train:
            answers = self._answers(args, model)
            name = f"step-{state.global_step}"
            self._found = on_the_main_process(lambda: self.judge.judge(answers, name))
            self._step = state.global_step
            if self._found.problem and state.is_world_process_zero:
                logger.warning(
                    f"Step {state.global_step} is not judged: {self._found.problem} The training goes on; this step cannot be "
                    "chosen as the best by a judge."
                )
            if self._found.values:
                # Not the trainer's own method, which would log its samples a second time
                Trainer.log(self.trainer, _of_an_evaluation(self._found))
        metrics.update(_of_an_evaluation(self._found))
        best_by = (args.metric_for_best_model or "").removeprefix(PREFIX)
        if best_by in self.judge.config.metrics:
            # Where it is missing, the trainer would end; this is neither better nor worse than any number
            metrics.setdefault(PREFIX + best_by, math.nan)

    def _answers(self, args, model) -> dict[str, list[str]]:
        """The student's answer to each prompt, on every process."""
        config = self.judge.config
        tokenizer = self.trainer.processing_class
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        rows = [asked.columns for asked in self.judge.prompts.values()]
        batch: dict[str, Any] = {
            name: [row[name] for row in rows]
            for name in ("prompt", "prompt_ids", ROW_COLUMN, *RENDERED_COLUMNS)
            if name in rows[0]
        }
        ids = generate_completion_ids(
            model,
            tokenizer,
            batch["prompt"],
            max_new_tokens=config.student_max_tokens or getattr(args, "max_completion_length", None) or MAX_TOKENS,
            temperature=config.student_temperature,
            batch_size=args.per_device_eval_batch_size,
            seed=SEED,
            prompt_ids=prompt_ids_of(tokenizer, batch, getattr(args, "chat_template_kwargs", None)),
            progress_bar=None if args.disable_tqdm else "answers for the judge",
            is_shared=True,
        )
        texts = [tokenizer.decode(samples[0], skip_special_tokens=True) for samples in ids]
        return {key: [text] for key, text in zip(self.judge.prompts, texts, strict=True)}


def _of_an_evaluation(judged: Judged) -> dict[str, float]:
    return {PREFIX + name: value for name, value in judged.values.items()}
