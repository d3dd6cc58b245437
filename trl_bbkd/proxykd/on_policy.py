"""Distillation on the student's own samples: drawn for every optimizer step, scored per token by the proxy in memory."""

import numpy as np
import torch

from ..evaluation.student import end_token_ids, generate_completion_ids
from ..host._compat import without_step
from ..host.typed import MixinBase
from ..soft_targets.head import scored_positions
from .config import ProxyKDConfig


OWN_SAMPLES = "own_samples"  # in a batch of teacher rows: samples of the same prompts
IS_SAMPLED = "is_sampled"  # in a batch of samples
SAMPLED_TOKENS = "sampled_tokens"  # in such a batch: tokens of all samples of the optimizer step


class OnPolicyMixin(MixinBase):
    """
    Makes a [`~soft_targets.trainer.SoftTargetTrainer`] with a live proxy, where `args.is_on_policy`, minimise

        hard_weight · NLL(teacher's answers) + kl_weight · w · KL(proxy, student | the student's own samples)

    each as a mean over its tokens of the whole optimizer step. It stands before that trainer among the bases of a class.

    Samples are drawn with the weights and the seed of their step, all of a process at once: how they are divided into
    micro-batches changes none.
    """

    args: ProxyKDConfig

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.args.is_on_policy or not batches:
            return batches, num_items
        sampled = self._sampled(batches)
        tokens = self._get_num_items_in_batch(sampled, device)
        for batch, samples in zip(batches, sampled, strict=True):
            batch[OWN_SAMPLES] = samples | {IS_SAMPLED: True, SAMPLED_TOKENS: tokens}
        return batches, num_items

    def _sampled(self, batches: list[dict]) -> list[dict]:
        """For each batch of teacher rows one of the student's answers to the same prompts."""
        prompts = [prompt for batch in batches for prompt in prompts_of(batch)]
        student = self.accelerator.unwrap_model(self.model)
        # Of its text nothing counts but how an answer ends: all prompts are standard, or all conversational
        text = self.proxy_stages.rows.distil[0]["prompt"]
        groups = generate_completion_ids(
            student,
            self._tokenizer,
            [text] * len(prompts),
            max_new_tokens=self.args.max_completion_length,
            temperature=self.args.on_policy_temperature,
            top_p=self.args.on_policy_top_p,
            batch_size=len(prompts),
            seed=sampling_seed(self.args.seed, self.state.global_step, self.accelerator.process_index),
            prompt_ids=prompts,
        )
        answers = [group[0] for group in groups]
        self._log_samples(answers, end_token_ids(student, self._tokenizer, text))
        rows = iter(
            {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
            for prompt, answer in zip(prompts, answers, strict=True)
        )
        found = []
        for batch in batches:
            made = self.data_collator([next(rows) for _ in batch["input_ids"]])
            made = {name: value.to(batch["input_ids"].device) for name, value in made.items()}
            found.append(made | {name: batch[name] for name in ("sample_weight",) if name in batch})
        return found

    def _log_samples(self, answers: list[list[int]], end_ids: list[int]) -> None:
        cut = sum(answer[-1] not in end_ids for answer in answers)
        counts = torch.tensor([sum(map(len, answers)), cut, len(answers)], device=self.accelerator.device)
        tokens, cut, rows = self.accelerator.reduce(counts).tolist()
        self._metrics["train"]["completions/mean_length"].append(tokens / rows)
        self._metrics["train"]["completions/clipped_ratio"].append(cut / rows)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The teacher's rows, then the samples: each with a backward pass of its own, so that memory is one batch's."""
        samples = inputs.pop(OWN_SAMPLES, None)
        if samples is None:
            return super().training_step(model, inputs, num_items_in_batch)
        tokens = samples.pop(SAMPLED_TOKENS)
        if self.args.hard_weight == 0:
            return super().training_step(model, samples, tokens)
        with without_step(self.accelerator, model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        return loss + super().training_step(model, samples, tokens)

    # What the loss of a batch is

    def _loss_weights(self, inputs: dict) -> tuple[float, list[float]]:
        if not self.args.is_on_policy:
            return super()._loss_weights(inputs)
        return (0.0, self.target_weights) if IS_SAMPLED in inputs else (self.args.hard_weight, [])

    def _targets(self, inputs: dict, scored: torch.Tensor) -> list:
        if self.args.is_on_policy and IS_SAMPLED not in inputs:
            return []
        return super()._targets(inputs, scored)

    def _of_interest(self, metrics: dict[str, float]) -> dict[str, float]:
        metrics = super()._of_interest(metrics)
        if not self.args.is_on_policy or "kl" not in metrics:
            return metrics
        # Its own answers tell no likelihood of the teacher's
        kept = {name: metrics[name] for name in ("kl", "sample_weight")}
        return kept | {"completions/entropy": metrics["entropy"]}


def prompts_of(batch: dict) -> list[list[int]]:
    """The token ids of each row's prompt: what stands before its first label."""
    lengths = 1 + scored_positions(batch["labels"]).int().argmax(dim=1)
    return [ids[:length].tolist() for ids, length in zip(batch["input_ids"], lengths, strict=True)]


def sampling_seed(seed: int, step: int, process: int) -> int:
    """The same in a run and its resumption, and apart for all steps, processes and seeds of runs."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])
