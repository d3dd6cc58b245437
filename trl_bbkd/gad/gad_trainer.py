import contextlib
import copy
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import LoraConfig, PeftConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import GRPOTrainer

from .._compat import fused_forward, pad
from ..teacher_data import tokenize_teacher_data
from .discriminator import Discriminator, build_discriminator
from .discriminator_trainer import DiscriminatorTrainer, PairBatch
from .gad_config import GADConfig


logger = logging.getLogger(__name__)

DISCRIMINATOR_FOLDER = "discriminator"
WARMED_UP_STUDENT_FOLDER = "warmed_up_student"
STATE_NAME = "gad_state.json"


class GADTrainer(GRPOTrainer):
    r"""
    Trainer for Generative Adversarial Distillation ([arXiv 2511.10643](https://huggingface.co/papers/2511.10643)).

    A student is distilled from the text of a teacher that can only be queried. A discriminator, trained beside it, learns
    to tell the teacher's answers from the student's samples; its raw score is the reward of GRPO. One call to `train`
    runs both stages: warm-up (cross-entropy on the teacher's answers for the student, fresh samples for the
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
            weight for each of them; the discriminator's weight is 1. Callables also receive the teacher's answer as
            `teacher_completion`.
        args ([`GADConfig`], *optional*):
            Configuration. If `None`, the defaults are used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Teacher text in TRL's prompt-completion format, standard or conversational: `completion` is the teacher's
            answer to `prompt`. Other columns are passed to `reward_funcs`.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], or a dict of them, *optional*):
            Held-out teacher text in the same format.
        discriminator (`str`, [`~transformers.PreTrainedModel`] or [`Discriminator`], *optional*):
            Where the discriminator starts; instead of `args.discriminator`.
        discriminator_peft_config ([`~peft.PeftConfig`], *optional*):
            Train the discriminator as an adapter; instead of `args.discriminator_lora_kwargs`.
        processing_class, reward_processing_classes, callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.GRPOTrainer`].

    Raises:
        TeacherDataError: If the teacher text breaks the contract, before any model is loaded.
        ValueError: Under DeepSpeed or FSDP, which are not supported yet.
    """

    _tag_names = ["trl", "trl-bbkd", "gad"]
    _name = "GAD"
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
        discriminator: str | PreTrainedModel | Discriminator | None = None,
        discriminator_peft_config: PeftConfig | None = None,
    ):
        student_path = model if isinstance(model, str) else model.config._name_or_path
        args = GADConfig(f"{student_path.split('/')[-1]}-GAD") if args is None else copy.copy(args)
        _refuse_sharding(args)
        if discriminator is not None and args.discriminator is not None:
            raise ValueError("Pass `discriminator` to the trainer or set it in `args`, not both.")
        if discriminator_peft_config is not None and args.discriminator_lora_kwargs is not None:
            raise ValueError("Pass `discriminator_peft_config` or set `args.discriminator_lora_kwargs`, not both.")

        init_kwargs = dict(args.model_init_kwargs or {})
        init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        hub_kwargs = {key: init_kwargs[key] for key in ("revision", "trust_remote_code") if key in init_kwargs}
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                student_path, truncation_side="left", padding_side="left", **hub_kwargs
            )
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ValueError(f"GAD distils text: a tokenizer is needed, got {type(processing_class).__name__}.")
        config = AutoConfig.from_pretrained(model, **hub_kwargs) if isinstance(model, str) else model.config
        tokenize_kwargs = {
            "max_completion_length": args.max_completion_length,
            "max_prompt_length": args.max_prompt_length,
            "max_length": getattr(config.get_text_config(), "max_position_embeddings", None),
            "chat_template_kwargs": args.chat_template_kwargs,
        }

        def tokenize(dataset):
            if dataset is None or "teacher_ids" in (dataset.column_names or []):
                return dataset
            dataset, counts = tokenize_teacher_data(dataset, processing_class, **tokenize_kwargs)
            logger.info(counts)
            return dataset

        train_dataset = tokenize(train_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: tokenize(dataset) for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = tokenize(eval_dataset)

        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        if args.reward_weights is not None:
            args.reward_weights = [1.0, *args.reward_weights]
        if isinstance(reward_processing_classes, list):
            reward_processing_classes = [None, *reward_processing_classes]
        elif reward_processing_classes is not None:
            reward_processing_classes = [None, reward_processing_classes]

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
        )

        if discriminator_peft_config is None and args.discriminator_lora_kwargs is not None:
            discriminator_peft_config = LoraConfig(**args.discriminator_lora_kwargs)
        discriminator_kwargs = {
            key: init_kwargs[key]
            for key in ("dtype", "attn_implementation", "trust_remote_code")
            if key in init_kwargs
        }
        if discriminator is None and args.discriminator is None:
            discriminator_kwargs["revision"] = init_kwargs.get("revision", "main")
        self.discriminator_trainer = DiscriminatorTrainer(
            build_discriminator(
                discriminator or args.discriminator or student_path,
                args.discriminator_head,
                args.discriminator_likelihood_reduction,
                discriminator_peft_config,
                args.seed,
                **discriminator_kwargs,
            ),
            args,
            self.accelerator,
            self._tokenizer.pad_token_id,
        )
        if self.accelerator.device.type == "cpu":
            # A saturated discriminator's gradients are denormal numbers, on which CPUs are many times slower
            torch.set_flush_denormal(True)
        self._sft_forward = fused_forward(self._unwrapped_policy(), temperature=1.0)
        if args.warmup_epochs > 0 and args.beta != 0 and isinstance(self.model, PeftModel):
            self._add_reference_adapter()
        self._warmup_steps = None
        self._in_warmup = False
        self._reference_is_set = False

    @property
    def discriminator(self) -> Discriminator:
        """The discriminator, unwrapped."""
        return self.discriminator_trainer.discriminator

    def _unwrapped_policy(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    # The phase of the run

    def _count_warmup_steps(self, max_steps: int) -> int:
        share = self.args.warmup_epochs / self.args.num_train_epochs
        steps_per_batch = max(
            1, self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps
        )
        # Round away what floating point adds, then up to a step at which a generation batch starts
        return int(-(-round(max_steps * share, 6) // steps_per_batch)) * steps_per_batch

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.warmup_learning_rate is None:
            return scheduler
        warmup_steps = self._count_warmup_steps(num_training_steps)
        factor = self.args.warmup_learning_rate / self.args.learning_rate
        self.lr_scheduler = LambdaLR(
            scheduler.optimizer,
            [
                lambda step, schedule=schedule: schedule(step) * (factor if step < warmup_steps else 1.0)
                for schedule in scheduler.lr_lambdas
            ],
        )
        return self.lr_scheduler

    def _start_generation_batch(self) -> None:
        """Decide the phase of the coming generation batch, which owns every optimizer step until the next one."""
        if self._warmup_steps is None:
            self._warmup_steps = self._count_warmup_steps(self.state.max_steps)
            if self._discriminator_only_steps < self.args.discriminator_only_steps and self._warmup_steps > 0:
                logger.warning(
                    f"discriminator_only_steps={self.args.discriminator_only_steps} is more than half of the "
                    f"{self._warmup_steps} warm-up steps: the discriminator learns alone for "
                    f"{self._discriminator_only_steps}, so that the student is warmed up too."
                )
        self._in_warmup = self.state.global_step < self._warmup_steps
        self.beta = 0.0 if self._in_warmup else self.args.beta
        if not self._in_warmup and not self._reference_is_set:
            self._set_reference()

    @property
    def _discriminator_only_steps(self) -> int:
        return min(self.args.discriminator_only_steps, self._warmup_steps // 2)

    def _add_reference_adapter(self) -> None:
        # TRL computes reference log-probs with an adapter of this name when there is one
        if "ref" not in self.model.peft_config:
            self.model.add_adapter("ref", self.model.peft_config["default"])
            self.model.set_adapter("default")
        self._copy_adapter_to_reference()

    def _copy_adapter_to_reference(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        for name, parameter in model.named_parameters():
            if ".default." in name:
                reference = model.get_parameter(name.replace(".default.", ".ref."))
                reference.data.copy_(parameter.data)
                reference.requires_grad_(False)

    def _set_reference(self) -> None:
        """Make the student, as it is now, the KL reference, and keep it on disk for a resumed run."""
        if self._warmup_steps > 0:
            self._save(os.path.join(self.args.output_dir, WARMED_UP_STUDENT_FOLDER))
        model = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(model.state_dict())
        elif self.args.beta != 0 and "ref" in model.peft_config:
            self._copy_adapter_to_reference()
        self._reference_is_set = True

    # Generation and rewards

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in ("completion", "teacher_ids"):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def _generate(self, prompts):
        output = super()._generate(prompts)
        self._prompt_ids = output[0]
        return output

    def _generate_and_score_completions(self, inputs):
        if self.model.training:
            self._start_generation_batch()
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self._in_warmup:
            output.update(self._teacher_tensors(inputs))
        return output

    def _prompt_numbers(self, num_rows: int) -> list[int]:
        """Number of each local row's prompt in the global batch, in which a prompt's samples are neighbours."""
        num_generations = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * num_rows
        return [row // num_generations for row in range(first, first + num_rows)]

    def _collect_pairs(self, inputs: list[dict], completion_ids: list[list[int]]) -> PairBatch:
        eos, eos_ids = self._tokenizer.eos_token_id, self.eos_token_ids
        # A model may end its answer with any of several ids. Which one is no sign of quality: show the discriminator one
        student_ids = [ids[:-1] + [eos] if ids and ids[-1] in eos_ids else list(ids) for ids in completion_ids]
        numbers = self._prompt_numbers(len(inputs))
        first_rows = [row for row, number in enumerate(numbers) if row == 0 or number != numbers[row - 1]]
        return PairBatch(
            prompt_ids=[list(self._prompt_ids[row]) for row in first_rows],
            teacher_ids=[list(inputs[row]["teacher_ids"]) for row in first_rows],
            student_ids=student_ids,
            prompt_index=[number - numbers[0] for number in numbers],
        )

    def discriminator_score(self, prompts, completions, completion_ids, log_extra, teacher_completion, **kwargs):
        """Reward function: the discriminator's score of each sample, as it was before this batch's update."""
        log_extra("teacher_completion", teacher_completion)
        return self._student_scores.tolist()

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        pairs = self._collect_pairs(inputs, completion_ids_list)
        teacher_scores, self._student_scores = self.discriminator_trainer.score(pairs)
        # TRL drops a column named `completion`: pass the teacher's answer under another name
        inputs = [{**row, "teacher_completion": row["completion"]} for row in inputs]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

        metrics = self.discriminator_trainer.measure(pairs, teacher_scores, self._student_scores)
        metrics["completions/length_ratio"] = self._length_ratio(pairs)
        if self.model.training:
            metrics |= self.discriminator_trainer.update(pairs, teacher_scores, self._student_scores, self._in_warmup)
            metrics["adversarial_phase"] = float(not self._in_warmup)
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        return rewards

    def _length_ratio(self, pairs: PairBatch) -> float:
        student = sum(map(len, pairs.student_ids))
        teacher = sum(len(pairs.teacher_ids[index]) for index in pairs.prompt_index)
        totals = torch.tensor([[student, teacher]], dtype=torch.float32, device=self.accelerator.device)
        student, teacher = self.accelerator.gather(totals).sum(dim=0).tolist()
        return student / teacher

    # The student's loss

    def _teacher_tensors(self, inputs: list[dict]) -> dict[str, torch.Tensor]:
        """
        The teacher's answers beside the samples: `teacher_ids` and `teacher_mask` of shape `(B, T)`. Of the rows that
        repeat one prompt, only the first (over all processes) has a mask: the answer counts once.
        """
        device = self.accelerator.device
        num_generations = self.num_generations
        first = self.accelerator.process_index * len(inputs)
        rows = [torch.tensor(row["teacher_ids"]) for row in inputs]
        masks = [torch.full_like(ids, (first + row) % num_generations == 0) for row, ids in enumerate(rows)]
        teacher_ids = pad(rows, padding_value=self._tokenizer.pad_token_id, padding_side="right").to(device)
        teacher_mask = pad(masks, padding_value=0, padding_side="right").to(device)
        return {
            "teacher_ids": teacher_ids,
            "teacher_mask": teacher_mask,
            "num_teacher_tokens": self.accelerator.gather(teacher_mask.sum()).sum(),
        }

    def _compute_loss(self, model, inputs):
        if "teacher_ids" not in inputs:
            return super()._compute_loss(model, inputs)
        if self.state.global_step < self._discriminator_only_steps:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        return self._sft_loss(model, inputs)

    def _sft_loss(self, model, inputs):
        """Cross-entropy on the teacher's answers (section 2.2): the token mean over one accumulation window."""
        rows = inputs["teacher_mask"].any(dim=1)
        # Every process must run the model, or the others would wait for its gradients
        rows[0] |= ~rows.any()
        teacher_ids, teacher_mask = inputs["teacher_ids"][rows], inputs["teacher_mask"][rows]
        input_ids = torch.cat([inputs["prompt_ids"][rows], teacher_ids], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"][rows], teacher_mask], dim=1)
        with self._sft_temperature():
            log_probs, _, _ = self._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep=teacher_ids.size(1)
            )
        tokens_per_window = (
            inputs["num_teacher_tokens"]
            / self.accelerator.num_processes
            * self.current_gradient_accumulation_steps
            / self.args.steps_per_generation
        )
        loss = -(log_probs * teacher_mask).sum() / tokens_per_window
        nll = self.accelerator.reduce(torch.stack([loss.detach() * tokens_per_window, teacher_mask.sum()]))
        if nll[1] > 0:
            self._metrics["train"]["teacher_nll"].append((nll[0] / nll[1]).item())
        return loss

    @contextlib.contextmanager
    def _sft_temperature(self):
        policy = self._unwrapped_policy()
        installed = policy.forward
        policy.forward = self._sft_forward
        try:
            yield
        finally:
            policy.forward = installed

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.discriminator_trainer.save(Path(output_dir) / DISCRIMINATOR_FOLDER)
            state = {"phase": "warmup" if self._in_warmup else "adversarial", "warmup_steps": self._warmup_steps}
            (Path(output_dir) / STATE_NAME).write_text(json.dumps(state) + "\n")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state_path = Path(checkpoint) / STATE_NAME
        if not state_path.is_file():
            raise FileNotFoundError(
                f"{checkpoint} holds no discriminator ({STATE_NAME} is missing): it was not written by GADTrainer, or "
                "with save_only_model=True. It can be a new run's model, but not be resumed."
            )
        self.discriminator_trainer.load(Path(checkpoint) / DISCRIMINATOR_FOLDER)
        state = json.loads(state_path.read_text())
        self._warmup_steps = state["warmup_steps"]
        if state["phase"] == "adversarial":
            self._restore_reference(Path(checkpoint).parent / WARMED_UP_STUDENT_FOLDER)

    def _restore_reference(self, folder: Path) -> None:
        if self.ref_model is not None and self._warmup_steps > 0:
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"The KL reference of this run, {folder}, is missing. Put the folder back beside the checkpoints, "
                    "or start again from a checkpoint of the warm-up."
                )
            reference = self.accelerator.unwrap_model(self.ref_model)
            warmed_up = type(self._unwrapped_policy()).from_pretrained(folder, dtype=reference.dtype)
            reference.load_state_dict(warmed_up.state_dict())
        self._reference_is_set = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        output_dir = output_dir or self.args.output_dir
        if not _internal_call and self.args.should_save:
            self.discriminator.save_pretrained(Path(output_dir) / DISCRIMINATOR_FOLDER)
        super().save_model(output_dir, _internal_call)


def _refuse_sharding(args: GADConfig) -> None:
    # `accelerate launch` announces its configuration through these variables
    launched_with = {
        name: os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true" for name in ("DeepSpeed", "FSDP")
    }
    for name, configured in {"DeepSpeed": args.deepspeed, "FSDP": args.fsdp}.items():
        if configured or launched_with[name]:
            raise ValueError(
                f"GADTrainer does not support {name} yet: the discriminator, a second trained model, would not be "
                "synchronised. Launch with plain data parallelism (recipes/accelerate_configs/ddp.yaml), and train "
                "adapters (`use_peft`, `discriminator_lora_kwargs`) if memory is short."
            )
