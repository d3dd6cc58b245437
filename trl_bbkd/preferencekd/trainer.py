import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import TrainOutput

from ..host._compat import get_callable_name
from ..host.model_files import adapter_of
from ..host.preflight import refuse_prompt_learning, require_config, require_model
from ..hub.student import StudentHubMixin
from ..preference.trainer import SAME_WHEN_RESUMED
from ..proxy.agreement import teacher_agreement
from ..soft_targets.head import check_head, check_partitioned_head
from .collator import ANSWER, PairsAndAnswers
from .config import PreferenceKDConfig
from .judged_rounds import JudgedRounds, check_judge
from .judges import JudgeFunction


OWN_SETTINGS = (
    "warmup_epochs",
    "warmup_learning_rate",
    "warmup_steps",
    "num_generations",
    "judge",
    "overlap_metric",
    "judge_question",
    "pairing",
    "pair_margin",
    "pair_max_length_ratio",
    "samples_from",
    "discriminator",
    "discriminator_head",
    "discriminator_likelihood_reduction",
    "discriminator_epochs",
    "discriminator_learning_rate",
    "discriminator_weight_decay",
    "discriminator_max_grad_norm",
    "discriminator_sft_weight",
    "discriminator_lora_kwargs",
)


class PreferenceKDTrainer(StudentHubMixin, JudgedRounds):
    r"""
    Trainer for preference distillation: DPO on a student's own samples, of which a judge that sees the teacher's answer
    tells the better from the worse (RefEval, [arXiv 2602.16802](https://huggingface.co/papers/2602.16802)), or on the
    teacher's answer over a sample (SODA, [arXiv 2604.03873](https://huggingface.co/papers/2604.03873)).

    The student learns from the teacher's answers first (`warmup_epochs`). Then, in each of `num_rounds` rounds, it answers
    the prompts of the round's share of rows, `num_generations` times each; `judge` scores the samples; and DPO, with the NLL
    of the teacher's answers, trains on pairs of them. The reference of a round is the student as it was when the round began.

    `train` goes through warm-up and rounds. In `output_dir` it leaves the student, and a folder a round with its samples,
    scores and pairs as Parquet files. A run that was stopped goes on by itself, with the samples and scores it had.

    Example:

    ```python
    from datasets import load_dataset
    from trl_bbkd import PreferenceKDConfig, PreferenceKDTrainer

    trainer = PreferenceKDTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=PreferenceKDConfig(output_dir="student", judge="overlap"),
        train_dataset=load_dataset("json", data_files="teacher.jsonl", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student, as in [`~trl.DPOTrainer`].
        args ([`PreferenceKDConfig`], *optional*):
            Configuration. If `None`, the defaults are used.
        train_dataset ([`~datasets.Dataset`]):
            Teacher text in TRL's prompt-completion format, standard or conversational: `completion` is the teacher's answer
            to `prompt`. Rows may share a prompt.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out teacher text in the same format, of which the NLL and the student's agreement with the teacher's tokens
            are measured before and after every round.
        judge (`Callable[[list, list[str], list[str]], list[float]]`, *optional*):
            A function `(prompts, candidates, teacher_answers) -> scores` with one entry a candidate, instead of
            `args.judge`. The higher the score, the better the candidate.
        processing_class, callbacks, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`].

    Raises:
        TypeError: If `model` is no model, `args` another trainer's configuration, or `processing_class` no tokenizer.
        TeacherDataError: If the teacher text breaks the contract, or there are fewer rows than rounds.
        ImportError: If the judge needs a package that is not installed.
        ValueError: If `output_dir` holds another run; otherwise as in [`~preference.trainer.PreferenceRoundsTrainer`].
    """

    _tag_names = ["trl", "trl-bbkd", "preferencekd"]
    _name = "PreferenceKD"
    _card_settings = ("judge", "num_generations", "num_rounds", "warmup_epochs", "sft_weight")
    _paper = {
        "title": "References Improve LLM Alignment in Non-Verifiable Domains",
        "id": "2602.16802",
        # docstyle-ignore
        "citation": """@inproceedings{shi2026references,
    title        = {{References Improve LLM Alignment in Non-Verifiable Domains}},
    author       = {Kejian Shi and Yixin Liu and Peifeng Wang and Alexander R. Fabbri and Shafiq Joty and Arman Cohan},
    year         = 2026,
    booktitle    = {International Conference on Learning Representations},
    eprint       = {arXiv:2602.16802},
}""",
    }
    _role = "student"
    _training_name = "preference"
    _same_when_resumed = (*SAME_WHEN_RESUMED, *OWN_SETTINGS)

    args: PreferenceKDConfig
    data_collator: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: PreferenceKDConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        judge: JudgeFunction | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        require_model(model, type(self).__name__)
        if args is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            args = PreferenceKDConfig(f"{path.split('/')[-1]}-PreferenceKD")
        require_config(args, PreferenceKDConfig, type(self).__name__)
        if judge is not None:
            args = with_judge(args, f"{get_callable_name(judge)}()")
        self._judge_function = judge
        check_judge(args, judge, model, processing_class)
        refuse_prompt_learning(adapter_of(model) or peft_config, "student", "its samples are of token ids alone")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        (check_partitioned_head if self._is_sharded else check_head)(self.model)
        self._warms_up = False

    def _make(self, **arguments) -> None:
        super()._make(**arguments)
        self.data_collator = PairsAndAnswers(self.data_collator)

    # Run

    def check_output_dir(self, resume_from_checkpoint: str | bool | None = None) -> str | None:
        """
        Find what a stopped run has left in `output_dir`, with which `train` goes on by itself.

        Returns:
            `str`: the file that says what it is made from; `None` for a new run.

        Raises:
            ValueError: it is another run's.
        """
        if self._run is None:
            self._check_run()
        path = self._disk.output_dir / self._disk.run_file
        return str(path) if path.is_file() else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """
        Go through the warm-up and the rounds that are not finished yet.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Ignored: a run in `output_dir` goes on by itself.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: with the optimizer steps of all of them.

        Raises:
            ValueError: `output_dir` holds such a training of another model, or with other rows or settings.
            TeacherDataError: a round has no pair to train on.
        """
        self.card  # noqa: B018  an example of the teacher's rows, while there are no others
        super().train(resume_from_checkpoint, *args, **kwargs)
        self.train_dataset = self._teacher_rows
        log = self.log_history
        self.state.log_history = log
        self.state.global_step = self.state.max_steps = max((line["step"] for line in log), default=0)
        return TrainOutput(self.state.global_step, 0.0, {})

    def create_model_card(self, *args, **kwargs) -> None:
        """As in [`~hub.student.StudentHubMixin`]. A round's checkpoints have none: they are no student to be used."""
        if Path(self.args.output_dir) == self._disk.output_dir:
            super().create_model_card(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A round's checkpoints stay here."""

    # Warm-up

    @property
    def _learns_first(self) -> bool:
        return self.args.warmup_epochs > 0

    def _before_first_round(self) -> list[dict]:
        if self.args.should_save:
            self._disk.begin(self._run)
        if self.args.samples_from == "base":
            if self._is_sharded:
                self._keep(0)
            for number in range(1, self.args.num_rounds + 1):
                self._candidates(self._shard(number), self._disk.folder(number), number)
        if not self._learns_first:
            return []
        set_seed(self.args.seed)
        self.train_dataset = self._teacher_rows.select_columns(["prompt_ids", "teacher_ids"])
        self._answer_length = mean(map(len, self.train_dataset["teacher_ids"]))
        self._warms_up = True
        with self._warmup_arguments():
            log = self._train_on_rows("The warm-up")
        self._warms_up = False
        return log

    @contextlib.contextmanager
    def _warmup_arguments(self) -> Iterator[None]:
        own = {
            "output_dir": str(self._disk.folder(0)),
            "num_train_epochs": self.args.warmup_epochs,
            "max_steps": -1,
            "learning_rate": self.args.warmup_learning_rate,
        }
        of_a_round = {name: getattr(self.args, name) for name in own}
        for name, value in own.items():
            setattr(self.args, name, value)
        yield
        for name, value in of_a_round.items():
            setattr(self.args, name, value)

    # Loss

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*self._signature_columns, "teacher_ids"]

    def _compute_loss(self, model, inputs, return_outputs):
        if self._warms_up:
            return self._answers_nll(model, inputs)
        answers = {name.removeprefix(ANSWER): value for name, value in inputs.items() if name.startswith(ANSWER)}
        pairs = {name: value for name, value in inputs.items() if not name.startswith(ANSWER)}
        loss = super()._compute_loss(model, pairs, return_outputs)
        return loss + self.args.sft_weight * self._answers_nll(model, answers) if answers else loss

    def _answers_nll(self, model, answers: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = answers["input_ids"].masked_fill(answers["completion_mask"] == 0, -100)
        log_probs = model(
            input_ids=answers["input_ids"],
            attention_mask=answers["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        ).log_probs
        # A mean over tokens that is the same however the batch is divided between devices and accumulation steps
        nll = -log_probs.sum(dim=1).mean() / self._answer_length
        self._metrics["train"]["nll"].append(self.accelerator.gather(nll.detach()).mean().item())
        return nll

    def _measured(self, rows: list[dict]) -> dict[str, float]:
        batch_size, pad_id = self.args.per_device_eval_batch_size, self._tokenizer.pad_token_id
        with self._whole() as model:
            return teacher_agreement(model, rows, self.accelerator, batch_size, pad_id)


def with_judge(args: PreferenceKDConfig, name: str) -> PreferenceKDConfig:
    """A configuration whose judge is a function of this name."""
    args = copy.copy(args)
    args.judge = name
    losses = args.own_losses()
    args.loss_type, args.loss_weights = list(losses), list(losses.values())
    return args
