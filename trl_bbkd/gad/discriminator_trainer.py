import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from .discriminator import Discriminator, collate_responses
from .gad_config import GADConfig
from .objectives import bradley_terry_loss, cross_entropy_loss, group_std, loss_and_score_gradients, pair_accuracy


OPTIMIZER_NAME = "optimizer.safetensors"
LOSSES = {"bradley_terry": bradley_terry_loss, "cross_entropy": cross_entropy_loss}


@dataclass
class PairBatch:
    """
    The teacher's answers and the student's samples of one generation batch, as token ids.

    Parameters:
        prompt_ids (`list[list[int]]`):
            The `P` distinct prompts on this process.
        teacher_ids (`list[list[int]]`):
            The teacher's answer to each of them. Ends in EOS if and only if it was not truncated.
        student_ids (`list[list[int]]`):
            `B` samples of the student, under the same rule.
        prompt_index (`list[int]`):
            For each sample, the index of its prompt.
    """

    prompt_ids: list[list[int]]
    teacher_ids: list[list[int]]
    student_ids: list[list[int]]
    prompt_index: list[int]

    @property
    def prompts(self) -> list[list[int]]:
        return self.prompt_ids + [self.prompt_ids[i] for i in self.prompt_index]

    @property
    def responses(self) -> list[list[int]]:
        return self.teacher_ids + self.student_ids


class DiscriminatorTrainer:
    """
    Owns the discriminator's optimizer and takes its steps.

    The optimizer is deliberately not prepared by accelerate: a prepared one does nothing whenever the student's
    gradients are not being synchronised, which is when rewards are computed under gradient accumulation.

    Args:
        discriminator ([`Discriminator`]):
            The model to train. Wrapped for the current device and processes.
        args ([`GADConfig`]):
            Its `discriminator_*` fields, `gradient_checkpointing` and `per_device_train_batch_size` are used.
        accelerator ([`~accelerate.Accelerator`]):
            The student trainer's accelerator.
        pad_token_id (`int`):
            Padding id of the tokenizer.
    """

    def __init__(self, discriminator: Discriminator, args: GADConfig, accelerator: Accelerator, pad_token_id: int):
        if args.gradient_checkpointing:
            discriminator.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.args = args
        self.accelerator = accelerator
        self.pad_token_id = pad_token_id
        self.loss_fn = LOSSES[args.discriminator_loss]
        self.batch_size = args.discriminator_batch_size or args.per_device_train_batch_size
        self.model = accelerator.prepare_model(discriminator)
        self.discriminator = accelerator.unwrap_model(self.model)
        self.parameters = [p for p in self.discriminator.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=args.discriminator_learning_rate, weight_decay=args.discriminator_weight_decay
        )

    def _chunks(self, pairs: PairBatch) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Yield row numbers of `pairs.responses` with their batch, longest first so that chunks pad little."""
        prompts, responses = pairs.prompts, pairs.responses
        order = sorted(range(len(responses)), key=lambda row: -len(prompts[row]) - len(responses[row]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = collate_responses(
                [prompts[row] for row in rows],
                [responses[row] for row in rows],
                self.pad_token_id,
                self.accelerator.device,
            )
            yield rows, batch

    @torch.no_grad()
    def score(self, pairs: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Score both sides with the discriminator as it stands.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Teacher scores of shape `(P,)`, student scores of shape `(B,)`.
        """
        self.discriminator.eval()
        scores = torch.empty(len(pairs.responses), device=self.accelerator.device)
        for rows, batch in self._chunks(pairs):
            scores[rows] = self.discriminator(**batch)[0]
        return scores.split([len(pairs.teacher_ids), len(pairs.student_ids)])

    def measure(
        self, pairs: PairBatch, teacher_scores: torch.Tensor, student_scores: torch.Tensor
    ) -> dict[str, float]:
        """Metrics of already scored pairs, averaged over processes."""
        prompt_index = torch.tensor(pairs.prompt_index, device=student_scores.device)
        sides = (teacher_scores, student_scores, prompt_index)
        metrics = {
            "discriminator/loss": self.loss_fn(*sides),
            "discriminator/accuracy": pair_accuracy(*sides),
            "discriminator/margin": (teacher_scores[prompt_index] - student_scores).mean(),
            "discriminator/teacher_score": teacher_scores[prompt_index].mean(),
            "discriminator/student_score": student_scores.mean(),
            "discriminator/group_std": group_std(student_scores, prompt_index, len(pairs.prompt_ids)),
        }
        values = self.accelerator.gather(torch.stack(list(metrics.values()))[None]).mean(dim=0)
        return dict(zip(metrics, values.tolist(), strict=True))

    def update(
        self,
        pairs: PairBatch,
        teacher_scores: torch.Tensor,
        student_scores: torch.Tensor,
        in_warmup: bool = False,
    ) -> dict[str, float]:
        """
        Take `discriminator_updates_per_batch` optimizer steps on one generation batch.

        Args:
            pairs ([`PairBatch`]):
                The sequences.
            teacher_scores (`torch.Tensor` of shape `(P,)`), student_scores (`torch.Tensor` of shape `(B,)`):
                What [`~DiscriminatorTrainer.score`] just gave for them.
            in_warmup (`bool`, *optional*, defaults to `False`):
                Whether the run is in its warm-up, which has its own learning rate and may add the mean negative
                log-likelihood per token of the teacher's answers to the loss.

        Returns:
            `dict[str, float]`: Gradient norm before clipping, and the teacher's NLL when it was trained on.
        """
        learning_rate, sft_weight = self.args.discriminator_learning_rate, 0.0
        if in_warmup:
            sft_weight = self.args.discriminator_sft_weight
            if self.args.discriminator_warmup_learning_rate is not None:
                learning_rate = self.args.discriminator_warmup_learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        prompt_index = torch.tensor(pairs.prompt_index, device=student_scores.device)
        num_teacher = len(pairs.teacher_ids)
        # The mean over processes, by which DDP's averaged gradient is that of the token mean over all of them
        teacher_tokens = torch.tensor(float(sum(map(len, pairs.teacher_ids))), device=student_scores.device)
        teacher_tokens = self.accelerator.reduce(teacher_tokens, reduction="mean").item()
        metrics = {}
        for update in range(self.args.discriminator_updates_per_batch):
            if update > 0:
                teacher_scores, student_scores = self.score(pairs)
            _, *gradients = loss_and_score_gradients(self.loss_fn, teacher_scores, student_scores, prompt_index)
            score_gradient = torch.cat(gradients)
            likelihood_gradient = torch.zeros_like(score_gradient)
            likelihood_gradient[:num_teacher] = -sft_weight / teacher_tokens
            teacher_log_likelihood = 0.0

            self.discriminator.train()
            chunks = list(self._chunks(pairs))
            for number, (rows, batch) in enumerate(chunks):
                is_last = number == len(chunks) - 1
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                    scores, log_likelihood = self.model(**batch)
                    objective = (scores * score_gradient[rows]).sum()
                    if sft_weight > 0:
                        objective = objective + (log_likelihood * likelihood_gradient[rows]).sum()
                        from_teacher = torch.tensor(rows, device=scores.device) < num_teacher
                        teacher_log_likelihood += log_likelihood.detach()[from_teacher].sum().item()
                    objective.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.args.discriminator_max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            metrics = {"discriminator/grad_norm": norm.item()}
            if sft_weight > 0:
                metrics["discriminator/teacher_nll"] = -teacher_log_likelihood / teacher_tokens
        return metrics

    def save(self, directory: Path) -> None:
        """Write the discriminator and its optimizer's state to `directory`."""
        self.discriminator.save_pretrained(directory)
        tensors = {
            f"{index}.{name}": value
            for index, parameter in enumerate(self.parameters)
            for name, value in self.optimizer.state.get(parameter, {}).items()
        }
        save_file(tensors, directory / OPTIMIZER_NAME)

    def load(self, directory: Path) -> None:
        """Restore what [`~DiscriminatorTrainer.save`] wrote."""
        self.discriminator.load_weights(directory)
        for key, value in load_file(directory / OPTIMIZER_NAME).items():
            index, name = key.split(".", 1)
            parameter = self.parameters[int(index)]
            self.optimizer.state[parameter][name] = value.to(parameter.device if name != "step" else "cpu")
