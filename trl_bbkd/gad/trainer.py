import copy
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import LoraConfig, PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from ..data.answers import AnswersByPrompt
from ..data.teacher_data import INTERNAL_COLUMNS, end_token_id
from ..discriminator.embeddings import match_embeddings
from ..discriminator.model import Discriminator
from ..discriminator.stabilizers import without_length_effect
from ..discriminator.trainer import DiscriminatorTrainer, PairBatch, PairScores
from ..errors import DivergedError
from ..evaluation.means import EvaluationMeans
from ..evaluation.student import SampleMetrics, with_one_end, without_router_logits
from ..host._compat import (
    fused_forward,
    keep_4bit_weights_differentiable,
    references_sharded_like_students,
    wait_for_each_other,
)
from ..host.model_paths import refuse_adapter_path
from ..host.preflight import refuse_adapted_head, refuse_broken_weights, refuse_frozen_adapter, require_tokenizer
from ..host.reference import add_reference_adapter
from ..hub.student import StudentHubMixin
from .advantage_estimator import AdvantageEstimator
from .checks import check_arguments, check_checkpoint, check_rewards, check_student
from .config import GADConfig
from .critic import CriticTrainer, build_critic
from .discriminator_setup import check_sharded_models, resolve_discriminator, start_discriminator
from .held_out import MeasuredHeldOut
from .resume import DISCRIMINATOR_FOLDER, ResumableGAD
from .rewards import TEACHER_COMPLETION, without_what_grpo_does_not_pass
from .teacher_rows import TeacherRows
from .vllm import SampledWithVLLM, check_vllm
from .warmup import TwoStageGAD


logger = logging.getLogger(__name__)


class GADTrainer(ResumableGAD, TwoStageGAD, SampledWithVLLM, MeasuredHeldOut, StudentHubMixin, GRPOTrainer):
    r"""
    Trainer for Generative Adversarial Distillation ([arXiv 2511.10643](https://huggingface.co/papers/2511.10643)).

    A student is distilled from the text of a teacher that can only be queried. A discriminator, trained beside it,
    learns to tell the teacher's answers from the student's samples; its raw score is the reward of GRPO. One call to
    `train` runs both stages: warm-up (cross-entropy on the teacher's answers for the student, fresh samples for the
    discriminator), then the adversarial stage, whose KL reference is the warmed-up student.

    Example:

    ```python
    from datasets import load_dataset
    from trl_bbkd import GADConfig, GADTrainer

    trainer = GADTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=GADConfig(output_dir="student"),
        train_dataset=load_dataset("json", data_files="teacher.jsonl", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student, as in [`~trl.GRPOTrainer`].
        reward_funcs (`Callable | str | PreTrainedModel` or `list`, *optional*):
            Rewards added to the discriminator's score, as in [`~trl.GRPOTrainer`]. `args.reward_weights` has one
            weight for each of them; the discriminator's weight is 1. Callables that take `teacher_completion`, or any
            keyword argument, receive the teacher's answer by that name.
        args ([`GADConfig`], *optional*):
            Configuration. If `None`, the defaults are used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Teacher text in TRL's prompt-completion format, standard or conversational: `completion` is the teacher's
            answer to `prompt`. Other columns are passed to `reward_funcs`.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], or a dict of them, *optional*):
            Held-out teacher text in the same format.
        discriminator (`str`, [`~transformers.PreTrainedModel`] or [`Discriminator`], *optional*):
            Where the discriminator starts, or `"shared"`; instead of `args.discriminator`.
        discriminator_peft_config ([`~peft.PeftConfig`], *optional*):
            Train the discriminator as an adapter; instead of `args.discriminator_lora_kwargs`.
        sample_metrics (`Callable[[list, list[str]], dict[str, list[float]]]`, *optional*):
            Judge of the samples of an evaluation: prompts and completions to named lists with one number a completion.
            Their means are metrics of the evaluation (`eval_<name>`), usable as `metric_for_best_model`, as is
            `eval_teacher_nll`.
        processing_class, reward_processing_classes, callbacks, optimizers, quantization_config, peft_config, rollout_func:
            As in [`~trl.GRPOTrainer`]. `optimizers` are the student's. `rollout_func` must not return `env_mask`.
        tools, environment_factory:
            Not supported: the teacher's answers are text, written without the tools or the environment of a rollout.

    Raises:
        TypeError: If a model is none, `args` no [`GADConfig`], or `processing_class` no tokenizer.
        TeacherDataError: If the teacher text breaks the contract, before any model is loaded.
        ValueError: If a model that is to be trained is frozen, has no embedding for some token or no adapter that can
            learn; if there are fewer prompts than one generation batch has; with `tools` or `environment_factory`.
        ValueError: If the discriminator cannot be trained beside this student (see
            [`~discriminator_setup.resolve_discriminator`]), or not sharded in the way that is asked for (see
            [`~host.sharding.check_sharding`]).
    """

    _tag_names = ["trl", "trl-bbkd", "gad"]
    args: GADConfig

    _name = "GAD"
    _card_settings = (
        "num_generations",
        "warmup_epochs",
        "warmup_learning_rate",
        "discriminator_learning_rate",
        "beta",
        "temperature",
        "max_completion_length",
    )
    _card_note = "The discriminator's score is not quality: it moves with the discriminator."
    _paper = {
        "title": "Black-Box On-Policy Distillation of Large Language Models",
        "id": "2511.10643",
        # docstyle-ignore
        "citation": """@article{gad2025,
    title        = {{Black-Box On-Policy Distillation of Large Language Models}},
    year         = 2025,
    eprint       = {arXiv:2511.10643},
}""",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Callable | str | PreTrainedModel | list | None = None,
        args: GADConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Callable | dict[str, Callable] | None = None,
        discriminator: str | PreTrainedModel | Discriminator | None = None,
        discriminator_peft_config: PeftConfig | None = None,
        sample_metrics: SampleMetrics | None = None,
    ) -> None:
        check_arguments(model, discriminator, reward_funcs, args, optimizers, tools, environment_factory)
        refuse_adapter_path(model, "student")
        refuse_broken_weights(model, "student")
        student_path = model if isinstance(model, str) else model.config._name_or_path
        args = GADConfig(f"{student_path.split('/')[-1]}-GAD") if args is None else copy.copy(args)
        check_sharded_models(args, quantization_config)
        check_vllm(args)

        init_kwargs = dict(args.model_init_kwargs or {})
        init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        hub_kwargs = {key: init_kwargs[key] for key in ("revision", "trust_remote_code") if key in init_kwargs}
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                student_path, truncation_side="left", padding_side="left", **hub_kwargs
            )
        require_tokenizer(processing_class, "GADTrainer")
        config = AutoConfig.from_pretrained(model, **hub_kwargs) if isinstance(model, str) else model.config
        check_student(model, peft_config, config, processing_class, args.critic)
        discriminator, discriminator_peft_config = resolve_discriminator(
            args, discriminator, discriminator_peft_config, model, peft_config, processing_class
        )
        critic_adapter = LoraConfig(**args.critic_lora_kwargs) if args.critic_lora_kwargs else None
        refuse_frozen_adapter(critic_adapter, "critic")
        check_checkpoint(model, student_path, peft_config, discriminator, args)
        self._teacher_rows = TeacherRows(args, processing_class, config)
        train_dataset = self._teacher_rows.prepare_training(train_dataset)
        eval_dataset = self._teacher_rows.prepare_evaluation(eval_dataset)
        self._training_answers = self._held_out_answers = AnswersByPrompt(train_dataset)

        self._end_id = end_token_id(processing_class, next(iter(train_dataset))["prompt"])
        if args.use_vllm and self._end_id != processing_class.eos_token_id:
            args.generation_kwargs = {"stop_token_ids": [self._end_id], **(args.generation_kwargs or {})}

        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        check_rewards(reward_funcs, args.reward_weights, reward_processing_classes)
        reward_funcs = [without_what_grpo_does_not_pass(reward) for reward in reward_funcs]
        if args.reward_weights is not None:
            args.reward_weights = [1.0, *args.reward_weights]
        if isinstance(reward_processing_classes, list):
            reward_processing_classes = [None, *reward_processing_classes]
        elif reward_processing_classes is not None:
            reward_processing_classes = [None, reward_processing_classes]

        with references_sharded_like_students(GRPOTrainer):
            super().__init__(
                model=model,
                reward_funcs=[self.discriminator_score, *reward_funcs],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                rollout_func=rollout_func,
            )
        refuse_adapted_head(self._unwrapped_policy(), "student")
        if self.ref_model is not None:
            match_embeddings(self._unwrapped_reference(), self._unwrapped_policy())

        self._stop_at_the_end_of_a_turn()
        self._start_vllm()
        student_kwargs = {
            key: init_kwargs[key]
            for key in ("dtype", "attn_implementation", "trust_remote_code", "revision")
            if key in init_kwargs
        }
        self.discriminator_trainer = DiscriminatorTrainer(
            start_discriminator(
                args, discriminator, discriminator_peft_config, self.model, student_path, student_kwargs
            ),
            args,
            self.accelerator,
            self._tokenizer.pad_token_id,
        )
        self.critic_trainer = None
        if args.critic is not None:
            critic = build_critic(
                args.critic, self._unwrapped_policy(), student_path, critic_adapter, **student_kwargs
            )
            self.critic_trainer = CriticTrainer(critic, args, self.accelerator)
        self._estimate_advantages = AdvantageEstimator(args, self.accelerator, self.critic_trainer)
        self.sample_metrics = sample_metrics
        self._held_out = EvaluationMeans(self.accelerator)
        if self.accelerator.device.type == "cpu":
            keep_4bit_weights_differentiable(self.model, self.discriminator)
            # A saturated discriminator's gradients are denormal numbers, on which CPUs are many times slower
            torch.set_flush_denormal(True)
        self._sft_forward = fused_forward(
            self._unwrapped_policy(), temperature=1.0, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32
        )
        if args.warmup_epochs > 0 and args.beta != 0 and isinstance(self.model, PeftModel):
            add_reference_adapter(self.accelerator.unwrap_model(self.model))
        self.card.counts = self._teacher_rows.counts
        self._student_path = student_path
        self._begin()

    @property
    def discriminator(self) -> Discriminator:
        """The discriminator, unwrapped."""
        return self.discriminator_trainer.discriminator

    def _hub_folders(self):
        return [DISCRIMINATOR_FOLDER] if self.args.push_discriminator else []

    def _save_hub_folders(self):
        if self.args.push_discriminator:
            self.discriminator_trainer.save_discriminator(Path(self.args.output_dir) / DISCRIMINATOR_FOLDER)

    def _stop_at_the_end_of_a_turn(self) -> None:
        """Have the student stop where the teacher's answers end, now and when it is used, if its settings do not say so."""
        if self._end_id in self.eos_token_ids:
            return
        self.eos_token_ids = [*self.eos_token_ids, self._end_id]
        self._unwrapped_policy().generation_config.eos_token_id = self.eos_token_ids
        if not self.use_vllm:
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids
            self.generation_config.eos_token_id = self.eos_token_ids

    def _unwrapped_policy(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _unwrapped_reference(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)

    # Rows, whichever door they come through

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """
        Run both stages. A second call begins again at the warm-up, with the weights of the first.

        Raises:
            ValueError: As in [`~host.resume.ResumableRun.train`]; if there are fewer prompts than one generation batch has.
        """
        self.train_dataset = self._teacher_rows.prepare_training(self.train_dataset)
        if self.train_dataset is not self._training_answers.rows:
            self._training_answers = AnswersByPrompt(self.train_dataset)
        self._begin()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        if eval_dataset is None or isinstance(eval_dataset, str):
            self.eval_dataset = self._teacher_rows.prepare_evaluation(self.eval_dataset)
        else:
            eval_dataset = self._teacher_rows.prepare(eval_dataset, "evaluation")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return super().get_test_dataloader(self._teacher_rows.prepare(test_dataset, "evaluation"))

    # Generation and rewards

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in ("completion", "prompt_ids", "teacher_ids"):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def _tokenize_prompts(self, prompts):
        # Rendered with the row's own tools and template settings, as the teacher's answer beside it
        return [list(row["prompt_ids"]) for row in self._rows], None, {}

    def _generate(self, prompts):
        is_training = self.model.training
        wait_for_each_other(self.accelerator.unwrap_model(self.model))
        with without_router_logits(self._unwrapped_policy()):
            output = super()._generate(prompts)
        # Continuous batching leaves the model in training mode, by which an evaluation would be taken for a step
        self.model.train(is_training)
        if output[2] is not None:
            raise ValueError(
                "rollout_func returned `env_mask`: the discriminator would read what the environment wrote as the student's. "
                "Return the student's own tokens alone."
            )
        self._prompt_ids = output[0]
        return output

    def _generate_and_score_completions(self, inputs):
        self._rows = inputs
        if self.model.training:
            self._start_generation_batch()
        else:
            self._are_new = self._held_out.are_new(len(inputs))
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            self._measure_answers(output, inputs)
            return output
        updates, metrics = self._estimate_advantages(output, self._rewards, self._evidence.student_tokens)
        self._log_metrics("train", metrics)
        output.update(updates)
        if self._policy_is_held:
            output["policy_is_held"] = torch.ones((), device=self.accelerator.device)
        if self._in_warmup or self.args.sft_weight > 0:
            output.update(self._teacher_tensors(inputs))
        return output

    def _log_metrics(self, mode: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    @property
    def _samples_per_prompt(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _prompt_numbers(self, num_rows: int) -> list[int]:
        """Number of each local row's prompt in the global batch, in which a prompt's samples are neighbours."""
        num_generations = self._samples_per_prompt
        first = self.accelerator.process_index * num_rows
        return [row // num_generations for row in range(first, first + num_rows)]

    def _collect_pairs(self, inputs: list[dict], completion_ids: list[list[int]]) -> PairBatch:
        student_ids = [with_one_end(list(ids), self.eos_token_ids, self._end_id) for ids in completion_ids]
        numbers = self._prompt_numbers(len(inputs))
        first_rows = [row for row, number in enumerate(numbers) if row == 0 or number != numbers[row - 1]]
        return PairBatch.with_all_answers(
            prompt_ids=[list(self._prompt_ids[row]) for row in first_rows],
            answers=[self._answers_to(self._prompt_ids[row], inputs[row]["teacher_ids"]) for row in first_rows],
            student_ids=student_ids,
            prompt_index=[number - numbers[0] for number in numbers],
        )

    def _answers_to(self, prompt_ids: list[int], own: list[int]) -> list[list[int]]:
        """All answers to a prompt that are trained, or evaluated, on: the row's own first."""
        answers = self._training_answers if self.model.training else self._held_out_answers
        return answers(prompt_ids, own)

    def discriminator_score(self, prompts, completions, completion_ids, log_extra, teacher_completion, **kwargs):
        """Reward function: the discriminator's score of each sample, as it was before this batch's update."""
        log_extra(TEACHER_COMPLETION, teacher_completion)
        return self._evidence.student.tolist()

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        pairs = self._collect_pairs(inputs, completion_ids_list)
        self._scores = self.discriminator_trainer.score(pairs)
        if not torch.isfinite(self._scores.student).all() or not torch.isfinite(self._scores.teacher).all():
            raise DivergedError(
                f"The discriminator's scores are not finite at step {self.state.global_step}. Lower "
                "discriminator_learning_rate or discriminator_max_grad_norm, and resume from the last checkpoint."
            )
        self._evidence = self._scores
        if self.args.discriminator_entropy > 0:
            self._evidence = self.discriminator_trainer.less_student_likelihood(
                self._scores, pairs, self._own_log_probs(pairs), self.args.discriminator_entropy
            )
        # TRL drops a column named `completion`: pass the teacher's answer under another name
        own = [{name: value for name, value in row.items() if name not in INTERNAL_COLUMNS} for row in inputs]
        inputs = [{**row, TEACHER_COMPLETION: row["completion"]} for row in own]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.args.length_control:
            lengths = self.accelerator.gather(
                torch.tensor([len(ids) for ids in completion_ids_list]).to(rewards.device)
            )
            rewards[:, 0] = without_length_effect(rewards[:, 0], lengths, self._samples_per_prompt)
        self._rewards = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)

        metrics = self.discriminator_trainer.measure(pairs, self._scores)
        metrics["completions/length_ratio"] = self._length_ratio(pairs)
        if self.model.training:
            metrics |= self._step_discriminator(pairs, self._scores, metrics)
        else:
            self._judge_samples(prompts, completions)
        self._log_metrics("train" if self.model.training else "eval", metrics)
        return rewards

    def _step_discriminator(
        self, pairs: PairBatch, scores: PairScores, measured: dict[str, float]
    ) -> dict[str, float]:
        """Warn of trouble, apply the gate, update the discriminator. Returns the metrics of this."""
        entropy = {"entropy": self.monitor.entropy} if self.monitor.entropy is not None else {}
        warnings = self.monitor.observe(
            self.state.global_step, measured | entropy, self._in_warmup, pairs.teacher_ids, pairs.student_ids
        )
        for warning in warnings:
            if self.accelerator.is_main_process:
                logger.warning(f"Step {warning.step}: {warning.text}")
        accuracy, metrics = measured["discriminator/accuracy"], {"adversarial_phase": float(not self._in_warmup)}
        low, high = self.args.policy_min_accuracy, self.args.discriminator_max_accuracy
        self._policy_is_held = low is not None and accuracy < low and not self._in_warmup
        is_too_sure = high is not None and accuracy > high and not self._in_warmup
        discriminator_is_held = is_too_sure or self._discriminator_has_stopped()
        if low is not None:
            metrics["gate/policy_held"] = float(self._policy_is_held)
        if high is not None or self.args.discriminator_patience is not None:
            metrics["gate/discriminator_held"] = float(discriminator_is_held)
        if not discriminator_is_held:
            metrics |= self.discriminator_trainer.update(pairs, scores, self._in_warmup)
        return metrics

    def _length_ratio(self, pairs: PairBatch) -> float:
        student = sum(map(len, pairs.student_ids))
        lengths = pairs.by_prompt(torch.tensor([len(ids) for ids in pairs.teacher_ids], dtype=torch.float64))
        teacher = lengths[pairs.prompt_index].sum().item()
        totals = torch.tensor([[student, teacher]], dtype=torch.float32, device=self.accelerator.device)
        student, teacher = self.accelerator.gather(totals).sum(dim=0).tolist()
        return student / teacher

    # The student's loss

    def _compute_loss(self, model, inputs):
        if "returns" in inputs and self.model.training:
            self._train_critic(inputs)
        if "policy_is_held" in inputs:
            return self._no_loss()
        if self.model.training and self._in_warmup:
            if self.state.global_step < self._discriminator_only_steps:
                return self._no_loss()
            return self._sft_loss(model, inputs)
        anchor = self._anchor(model, inputs) if "teacher_ids" in inputs else 0.0
        loss = super()._compute_loss(model, inputs)
        if self.model.training:
            # Kept, because TRL forgets its metrics whenever it logs
            self.monitor.entropy = self._metrics["train"]["entropy"][-1]
        return loss + anchor

    def _train_critic(self, inputs: dict[str, torch.Tensor]) -> None:
        # With mask_truncated_completions there may be no token at all
        loss = self.critic_trainer.backward(inputs, self._tokens_per_window(inputs["num_items_in_batch"].clamp(min=1)))
        totals = self.accelerator.reduce(torch.stack([loss, inputs["completion_mask"].sum()]))
        self._log_metrics("train", {"critic/loss": (totals[0] / totals[1].clamp(min=1)).item()})
        if self.accelerator.sync_gradients:
            self._log_metrics("train", {"critic/grad_norm": self.critic_trainer.step()})
