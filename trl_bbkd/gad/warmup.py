"""The two stages of a run of GAD: warm-up on the teacher's text, then the adversarial stage."""

import contextlib
import itertools
import logging
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..discriminator.trainer import PairBatch
from ..host._compat import pad, without_backward_of_leaves, without_step
from ..host.typed import MixinBase
from .monitor import TrainingMonitor
from .samplers import StageSampler, stage_rows


logger = logging.getLogger(__name__)


class TwoStageGAD(MixinBase):
    """
    The part of [`GADTrainer`] that decides which stage a generation batch belongs to, and the student's likelihoods: its loss
    in the first stage (section 2.2 of arXiv 2511.10643), which may stay in the second.
    """

    # The trainer's of TRL, set again
    eos_token_ids: list[int]
    train_dataset: Any
    eval_dataset: Any

    def _begin(self) -> None:
        """Begin at the warm-up, whatever a run of the same trainer has left; weights and optimizers stay."""
        self._warmup_steps: int | None = None
        self._warmup_share = self.args.warmup_epochs / self.args.num_train_epochs
        self._in_warmup = False
        self._policy_is_held = False
        self._reference_is_set = False
        self.beta = self.args.beta
        self._step, self._buffered_inputs = 0, None
        self.monitor = TrainingMonitor(self._tokenizer)

    def _count_warmup_steps(self, max_steps: int) -> int:
        share = self.args.warmup_epochs / self.args.num_train_epochs
        steps_per_batch = max(
            1, self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps
        )
        # Round away what floating point adds, then up to a step at which a generation batch starts
        return int(-(-round(max_steps * share, 6) // steps_per_batch)) * steps_per_batch

    def _get_train_sampler(self, dataset=None):
        if self.args.discriminator_rows == "all":
            return super()._get_train_sampler(dataset)
        batch_size = self.args.generation_batch_size // self.num_generations
        return StageSampler(
            self._stages,
            batches_per_epoch=len(self.train_dataset) // batch_size,
            batch_size=batch_size,
            num_generations=self.num_generations,
            repeats=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _stages(self) -> tuple[list[int], list[int], int]:
        """The rows of the two stages, and how many generation batches the first has."""
        warmup_steps = self._warmup_steps
        if warmup_steps is None:
            warmup_steps = self._count_warmup_steps(self.state.max_steps)
        batch_size = self.args.generation_batch_size // self.num_generations
        micro_batches = self.num_iterations * self.args.steps_per_generation
        accumulation = self.args.gradient_accumulation_steps
        per_epoch = len(self.train_dataset) // batch_size
        steps_per_epoch = -(-per_epoch * micro_batches // accumulation)

        def first_step(batch: int) -> int:
            epoch, number = divmod(batch, per_epoch)
            return epoch * steps_per_epoch + number * micro_batches // accumulation

        warmup_batches = next(batch for batch in itertools.count() if first_step(batch) >= warmup_steps)
        return *stage_rows(self.train_dataset, self._warmup_share, self.args.seed), warmup_batches

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.warmup_learning_rate is None:
            return scheduler
        factor = self.args.warmup_learning_rate / self.args.learning_rate

        def in_warmup(step: int) -> bool:
            # A resumed run keeps its warm-up, even when it is made longer
            counted = self._count_warmup_steps(num_training_steps)
            return step < (counted if self._warmup_steps is None else self._warmup_steps)

        self.lr_scheduler = LambdaLR(
            scheduler.optimizer,
            [
                lambda step, schedule=schedule: schedule(step) * (factor if in_warmup(step) else 1.0)  # type: ignore[misc]
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
            if self.args.discriminator_rows == "unseen" and self.discriminator_trainer.replay is not None:
                self.discriminator_trainer.replay.pairs.clear()  # of rows that are not to be seen again

    @property
    def _discriminator_only_steps(self) -> int:
        return min(self.args.discriminator_only_steps, self._warmup_steps // 2)

    def _teacher_tensors(self, inputs: list[dict]) -> dict[str, torch.Tensor]:
        """
        The teacher's answers beside the samples: `teacher_ids` and `teacher_mask` of shape `(B, T)`. Of the rows that
        repeat one prompt, only the first (over all processes) has a mask: the answer counts once.
        """
        device = self.accelerator.device
        first = self.accelerator.process_index * len(inputs)
        rows = [torch.tensor(row["teacher_ids"]) for row in inputs]
        masks = [torch.full_like(ids, (first + row) % self._samples_per_prompt == 0) for row, ids in enumerate(rows)]
        teacher_ids = pad(rows, padding_value=self._tokenizer.pad_token_id, padding_side="right").to(device)
        teacher_mask = pad(masks, padding_value=0, padding_side="right").to(device)
        return {
            "teacher_ids": teacher_ids,
            "teacher_mask": teacher_mask,
            "num_teacher_tokens": self.accelerator.gather(teacher_mask.sum()).sum(),
        }

    def _tokens_per_window(self, tokens_per_generation_batch: torch.Tensor) -> torch.Tensor:
        windows = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        return tokens_per_generation_batch / self.accelerator.num_processes / windows

    def _teacher_log_probs(
        self, model, inputs: dict[str, torch.Tensor], with_aux_loss: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Log-probabilities of the teacher's answers that count, and their mask, of shape `(B', T)`; the load-balancing loss
        of a mixture of experts, if it is asked for.
        """
        rows = inputs["teacher_mask"].any(dim=1)
        # Every process must run the model, or the others would wait for its gradients
        rows[0] |= ~rows.any()
        teacher_ids, teacher_mask = inputs["teacher_ids"][rows], inputs["teacher_mask"][rows]
        input_ids = torch.cat([inputs["prompt_ids"][rows], teacher_ids], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"][rows], teacher_mask], dim=1)
        with self._sft_temperature():
            log_probs, _, aux_loss = self._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep=teacher_ids.size(1),
                compute_aux_loss=with_aux_loss,
            )
        return log_probs, teacher_mask, aux_loss

    def _sft_loss(self, model, inputs):
        """
        Cross-entropy on the teacher's answers (section 2.2): the token mean over one accumulation window. A mixture of
        experts adds its load-balancing loss, as GRPO does.
        """
        log_probs, mask, aux_loss = self._teacher_log_probs(model, inputs, with_aux_loss=self.aux_loss_enabled)
        total = -(log_probs * mask).sum()
        nll = self.accelerator.reduce(torch.stack([total.detach(), mask.sum()]))
        if nll[1] > 0:
            self._log_metrics("train", {"teacher_nll": (nll[0] / nll[1]).item()})
        loss = total / self._tokens_per_window(inputs["num_teacher_tokens"])
        if aux_loss is None:
            return loss
        self._log_metrics("train", {"aux_loss": self.accelerator.gather(aux_loss.detach()).mean().item()})
        return loss + self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps

    def _anchor(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Add the gradient of `sft_weight` times the cross-entropy on the teacher's answers to what the adversarial loss is
        about to bring: one after the other, so that the activations of only one are there at a time.

        Returns:
            `torch.Tensor`: The weighted cross-entropy, without gradient.
        """
        with without_step(self.accelerator, model):
            loss = self.args.sft_weight * self._sft_loss(model, inputs)
            # As transformers does of a trainer's own loss
            is_zero = self.accelerator.distributed_type == DistributedType.DEEPSPEED
            self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_zero else {}))
        return loss.detach()

    @torch.no_grad()
    def _own_log_probs(self, pairs: PairBatch) -> torch.Tensor:
        """The student's log-probabilities of its samples' tokens at temperature 1, `(B, T)`, right-padded with zeros."""
        device = self.accelerator.device
        prompts = [torch.tensor(pairs.prompt_ids[index], device=device) for index in pairs.prompt_index]
        answers = [torch.tensor(ids, device=device) for ids in pairs.student_ids]
        pad_id = self._tokenizer.pad_token_id
        ids = [pad(prompts, pad_id, padding_side="left"), pad(answers, pad_id, padding_side="right")]
        masks = [
            pad([torch.ones_like(each) for each in side], 0, padding_side=padding_side)
            for side, padding_side in ((prompts, "left"), (answers, "right"))
        ]
        with self._sft_temperature():
            log_probs, *_ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat(ids, dim=1),
                torch.cat(masks, dim=1),
                logits_to_keep=ids[1].size(1),
                batch_size=self.args.per_device_train_batch_size,
            )
        return log_probs * masks[1]

    def training_step(self, *args, **kwargs):
        with without_backward_of_leaves(self.accelerator):
            return super().training_step(*args, **kwargs)

    def _no_loss(self) -> torch.Tensor:
        # No parameter gets a gradient, not even of 0, so that neither momentum nor weight decay moves the student
        return torch.zeros((), device=self.accelerator.device, requires_grad=True)

    @contextlib.contextmanager
    def _sft_temperature(self):
        policy = self._unwrapped_policy()
        installed = policy.forward
        policy.forward = self._sft_forward
        try:
            # The installed forward brings its own mixed precision; this one was built before that was added
            with self.accelerator.autocast():
                yield
        finally:
            policy.forward = installed
