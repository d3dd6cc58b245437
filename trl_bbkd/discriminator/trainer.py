from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from accelerate import Accelerator

from ..host.engines import gathered, make_engine, whole
from .model import Discriminator, collate_responses
from .objectives import (
    AnswerShares,
    bradley_terry_loss,
    cross_entropy_loss,
    group_std,
    loss_and_score_gradients,
    pair_accuracy,
    scaled_log_likelihoods,
)
from .stabilizers import ReplayBuffer


LOSSES = {"bradley_terry": bradley_terry_loss, "cross_entropy": cross_entropy_loss}


@dataclass
class PairBatch:
    """
    The teacher's answers and the student's samples of one generation batch, as token ids.

    Parameters:
        prompt_ids (`list[list[int]]`):
            The `P` prompts on this process.
        teacher_ids (`list[list[int]]`):
            The teacher's `A` answers to them. Each ends in EOS if and only if it was not truncated.
        student_ids (`list[list[int]]`):
            `B` samples of the student, under the same rule.
        prompt_index (`list[int]`):
            For each sample, the index of its prompt.
        answer_index (`list[int]`, *optional*):
            For each of the teacher's answers, the index of its prompt. By default, every prompt has one.
        answer_share (`list[float]`, *optional*):
            How much each of them counts among the answers to its prompt.
    """

    prompt_ids: list[list[int]]
    teacher_ids: list[list[int]]
    student_ids: list[list[int]]
    prompt_index: list[int]
    answer_index: list[int] = field(default_factory=list)
    answer_share: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.answer_index = self.answer_index or list(range(len(self.teacher_ids)))
        self.answer_share = self.answer_share or [1.0] * len(self.teacher_ids)

    @classmethod
    def with_all_answers(
        cls,
        prompt_ids: list[list[int]],
        answers: list[list[list[int]]],
        student_ids: list[list[int]],
        prompt_index: list[int],
    ) -> "PairBatch":
        """Pair each sample with all answers to its prompt. Equal ones are scored once, and count as often as they are there."""
        counts = [Counter(map(tuple, of_prompt)) for of_prompt in answers]
        return cls(
            prompt_ids=prompt_ids,
            teacher_ids=[list(answer) for of_prompt in counts for answer in of_prompt],
            student_ids=student_ids,
            prompt_index=prompt_index,
            answer_index=[number for number, of_prompt in enumerate(counts) for _ in of_prompt],
            answer_share=[count / of_prompt.total() for of_prompt in counts for count in of_prompt.values()],
        )

    @classmethod
    def from_triples(cls, triples: list[tuple[list[int], list[int], list[int]]]) -> "PairBatch":
        """Pair up `(prompt_ids, teacher_ids, student_ids)`, each different teacher's answer once."""
        numbers: dict[tuple, int] = {}
        prompt_index = [
            numbers.setdefault((tuple(prompt), tuple(teacher)), len(numbers)) for prompt, teacher, _ in triples
        ]
        return cls(
            prompt_ids=[list(prompt) for prompt, _ in numbers],
            teacher_ids=[list(teacher) for _, teacher in numbers],
            student_ids=[student for _, _, student in triples],
            prompt_index=prompt_index,
        )

    def triples(self) -> list[tuple[list[int], list[int], list[int]]]:
        """`(prompt_ids, teacher_ids, student_ids)` of each sample, with the first of the answers to its prompt."""
        first = {prompt: answer for answer, prompt in reversed(list(enumerate(self.answer_index)))}
        return [
            (self.prompt_ids[index], self.teacher_ids[first[index]], student)
            for index, student in zip(self.prompt_index, self.student_ids, strict=True)
        ]

    def joined(self, other: "PairBatch") -> "PairBatch":
        """Both batches as one, this one's prompts and samples first."""
        offset = len(self.prompt_ids)
        return PairBatch(
            prompt_ids=self.prompt_ids + other.prompt_ids,
            teacher_ids=self.teacher_ids + other.teacher_ids,
            student_ids=self.student_ids + other.student_ids,
            prompt_index=self.prompt_index + [offset + index for index in other.prompt_index],
            answer_index=self.answer_index + [offset + index for index in other.answer_index],
            answer_share=self.answer_share + other.answer_share,
        )

    def shares(self, device: torch.device) -> AnswerShares:
        return AnswerShares(
            torch.tensor(self.answer_index, device=device), torch.tensor(self.answer_share, device=device)
        )

    def by_prompt(self, of_answers: torch.Tensor) -> torch.Tensor:
        """Of what `(A,)` values are of the teacher's answers, each prompt's mean, `(P,)`."""
        shares = self.shares(of_answers.device)
        means = torch.zeros(len(self.prompt_ids), dtype=of_answers.dtype, device=of_answers.device)
        return means.index_add(0, shares.prompt_index, shares.share.to(of_answers.dtype) * of_answers)

    @property
    def prompts(self) -> list[list[int]]:
        return [self.prompt_ids[i] for i in (*self.answer_index, *self.prompt_index)]

    @property
    def responses(self) -> list[list[int]]:
        return self.teacher_ids + self.student_ids


class PairScores(NamedTuple):
    """
    Scores of a [`PairBatch`].

    Parameters:
        teacher (`torch.Tensor` of shape `(A,)`), student (`torch.Tensor` of shape `(B,)`):
            Raw scores.
        student_tokens (`torch.Tensor` of shape `(B, T)`, *optional*):
            What each token of the samples, right-padded with zeros, adds to its score; only for
            `discriminator_credit="token"`.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    student_tokens: torch.Tensor | None = None


class DiscriminatorSettings(Protocol):
    """What a method's configuration says of its discriminator: see [`~gad.config.GADConfig`]."""

    seed: int
    gradient_checkpointing: bool
    per_device_train_batch_size: int
    discriminator_loss: str
    discriminator_learning_rate: float
    discriminator_warmup_learning_rate: float | None
    discriminator_weight_decay: float
    discriminator_max_grad_norm: float
    discriminator_updates_per_batch: int
    discriminator_batch_size: int | None
    discriminator_sft_weight: float
    discriminator_credit: str
    discriminator_replay_size: int
    discriminator_replay_ratio: float


class DiscriminatorTrainer:
    """
    Scores pairs with the discriminator and takes its optimizer's steps.

    Args:
        discriminator ([`Discriminator`]):
            The model to train. Wrapped for the current device and processes.
        args ([`DiscriminatorSettings`]):
            Its `discriminator_*` fields, `gradient_checkpointing` and `per_device_train_batch_size` are used.
        accelerator ([`~accelerate.Accelerator`]):
            The student trainer's accelerator.
        pad_token_id (`int`):
            Padding id of the tokenizer.
    """

    def __init__(
        self, discriminator: Discriminator, args: DiscriminatorSettings, accelerator: Accelerator, pad_token_id: int
    ):
        if args.gradient_checkpointing:
            discriminator.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.args = args
        self.accelerator = accelerator
        self.pad_token_id = pad_token_id
        self.loss_fn = LOSSES[args.discriminator_loss]
        self.batch_size = args.discriminator_batch_size or args.per_device_train_batch_size
        self.engine = make_engine(
            discriminator,
            accelerator,
            learning_rate=args.discriminator_learning_rate,
            weight_decay=args.discriminator_weight_decay,
            max_grad_norm=args.discriminator_max_grad_norm,
        )
        self.discriminator = self.engine.module
        # Each process replays pairs of its own
        self.replay = (
            ReplayBuffer(args.discriminator_replay_size, args.seed + accelerator.process_index)
            if args.discriminator_replay_size > 0
            else None
        )

    def _chunks(self, pairs: PairBatch) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """
        Yield row numbers of `pairs.responses` with their batch, longest first so that chunks pad little; then, where
        another process has more chunks, the shortest row alone, without its number.
        """
        prompts, responses = pairs.prompts, pairs.responses
        order = sorted(range(len(responses)), key=lambda row: -len(prompts[row]) - len(responses[row]))
        chunks = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        fillers = self.engine.count_chunks(len(chunks)) - len(chunks)
        for number, rows in enumerate([*chunks, *[order[-1:]] * fillers]):
            batch = collate_responses(
                [prompts[row] for row in rows],
                [responses[row] for row in rows],
                self.pad_token_id,
                self.accelerator.device,
            )
            yield rows if number < len(chunks) else [], batch

    @torch.no_grad()
    def score(self, pairs: PairBatch) -> PairScores:
        """Score both sides with the discriminator as it stands."""
        self.discriminator.eval()
        num_teacher, device = len(pairs.teacher_ids), self.accelerator.device
        scores = torch.empty(len(pairs.responses), device=device)
        tokens = None
        if self.args.discriminator_credit == "token":
            tokens = torch.zeros(len(pairs.student_ids), max(map(len, pairs.student_ids)), device=device)
        prompts, responses = pairs.prompts, pairs.responses
        for rows, batch in self._chunks(pairs):
            output = self.discriminator(**batch)
            if rows:
                scores[rows] = output.scores
            for row, token_scores in zip(rows, output.token_scores if tokens is not None else (), strict=False):
                if row >= num_teacher:
                    start, length = len(prompts[row]), len(responses[row])
                    tokens[row - num_teacher, :length] = token_scores[start : start + length]
        teacher, student = scores.split([num_teacher, len(pairs.student_ids)])
        return PairScores(teacher, student, tokens)

    def less_student_likelihood(
        self, scores: PairScores, pairs: PairBatch, student_log_probs: torch.Tensor, share: float
    ) -> PairScores:
        """
        Scores as a reward that has a share of the student's own log-likelihood taken off.

        Args:
            scores ([`PairScores`]):
                Of a likelihood head.
            pairs ([`PairBatch`]):
                What was scored.
            student_log_probs (`torch.Tensor` of shape `(B, T)`):
                The student's log-probabilities of its samples' tokens, right-padded with zeros.
            share (`float`):
                How much of it.
        """
        lengths = torch.tensor([len(ids) for ids in pairs.student_ids], device=student_log_probs.device)
        own = share * scaled_log_likelihoods(
            student_log_probs, lengths, self._likelihood_scale(), self.discriminator.likelihood_reduction
        )
        tokens = None if scores.student_tokens is None else scores.student_tokens - own
        return scores._replace(student=scores.student - own.sum(dim=1), student_tokens=tokens)

    def _likelihood_scale(self) -> float:
        scale = self.discriminator.likelihood_scale.detach()
        with gathered([scale], is_written=False):
            return whole(scale).item()

    def measure(self, pairs: PairBatch, scores: PairScores) -> dict[str, float]:
        """Metrics of already scored pairs, averaged over processes."""
        prompt_index = torch.tensor(pairs.prompt_index, device=scores.student.device)
        sides = (scores.teacher, scores.student, prompt_index, pairs.shares(scores.student.device))
        teacher = pairs.by_prompt(scores.teacher)[prompt_index]
        metrics = {
            "discriminator/loss": self.loss_fn(*sides),
            "discriminator/accuracy": pair_accuracy(*sides),
            "discriminator/margin": (teacher - scores.student).mean(),
            "discriminator/teacher_score": teacher.mean(),
            "discriminator/student_score": scores.student.mean(),
            "discriminator/group_std": group_std(scores.student, prompt_index, len(pairs.prompt_ids)),
        }
        values = self.accelerator.gather(torch.stack(list(metrics.values()))[None]).mean(dim=0)
        return dict(zip(metrics, values.tolist(), strict=True))

    def update(self, pairs: PairBatch, scores: PairScores, in_warmup: bool = False) -> dict[str, float]:
        """
        Take `discriminator_updates_per_batch` optimizer steps on one generation batch and, with replay, on past pairs.

        Args:
            pairs ([`PairBatch`]):
                The sequences.
            scores ([`PairScores`]):
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
        self.engine.set_learning_rate(learning_rate)
        num_fresh_teacher, device = len(pairs.teacher_ids), scores.student.device
        # The mean over processes, by which DDP's averaged gradient is that of the token mean over all of them
        fresh_share = torch.tensor(pairs.answer_share, device=device)
        fresh_lengths = torch.tensor([len(ids) for ids in pairs.teacher_ids], device=device)
        teacher_tokens = (fresh_share * fresh_lengths).sum()
        teacher_tokens = self.accelerator.reduce(teacher_tokens, reduction="mean").item()
        if self.replay is not None:
            pairs, scores = self._with_past_pairs(pairs, scores)
        prompt_index, answers = torch.tensor(pairs.prompt_index, device=device), pairs.shares(device)
        metrics = {}
        for update in range(self.args.discriminator_updates_per_batch):
            if update > 0:
                scores = self.score(pairs)
            _, *gradients = loss_and_score_gradients(
                self.loss_fn, scores.teacher, scores.student, prompt_index, answers
            )
            score_gradient = torch.cat(gradients)
            likelihood_gradient = torch.zeros_like(score_gradient)
            likelihood_gradient[:num_fresh_teacher] = -sft_weight / teacher_tokens * fresh_share
            teacher_log_likelihood = 0.0

            self.discriminator.train()
            chunks = list(self._chunks(pairs))
            for number, (rows, batch) in enumerate(chunks):
                with self.engine.chunk(is_last=number == len(chunks) - 1):
                    output = self.engine.model(**batch)
                    if not rows:
                        # Another process has a chunk more, for which it needs this one
                        self.engine.backward(0.0 * output.scores.sum())
                        continue
                    objective = (output.scores * score_gradient[rows]).sum()
                    if sft_weight > 0:
                        objective = objective + (output.log_likelihoods * likelihood_gradient[rows]).sum()
                        numbers = torch.tensor(rows, device=device)
                        is_fresh = numbers < num_fresh_teacher
                        fresh = output.log_likelihoods.detach()[is_fresh] * fresh_share[numbers[is_fresh]]
                        teacher_log_likelihood += fresh.sum().item()
                    self.engine.backward(objective)
            metrics = {"discriminator/grad_norm": self.engine.step()}
            if sft_weight > 0:
                metrics["discriminator/teacher_nll"] = -teacher_log_likelihood / teacher_tokens
        return metrics

    def _with_past_pairs(self, pairs: PairBatch, scores: PairScores) -> tuple[PairBatch, PairScores]:
        """The batch and, behind it, as many past pairs as `discriminator_replay_ratio` asks for."""
        ratio = self.args.discriminator_replay_ratio
        triples = self.replay.sample(round(len(pairs.student_ids) * ratio / (1 - ratio)))
        self.replay.add(pairs.triples())
        if not triples:
            return pairs, scores
        past = PairBatch.from_triples(triples)
        past_scores = self.score(past)
        teacher = torch.cat([scores.teacher, past_scores.teacher])
        return pairs.joined(past), PairScores(teacher, torch.cat([scores.student, past_scores.student]))

    def save(self, directory: Path) -> None:
        """Write the discriminator and its optimizer's state to `directory`. Every process takes part."""
        self.engine.save(directory, save_weights=lambda: self.save_discriminator(directory))

    def save_discriminator(self, directory: Path) -> None:
        """Write the discriminator alone. Every process takes part."""
        weights = self.engine.state_dict()
        if self.accelerator.is_main_process:
            self.discriminator.save_pretrained(directory, weights)

    def load(self, directory: Path) -> None:
        """Restore what [`~DiscriminatorTrainer.save`] wrote."""
        self.engine.load(directory, load_weights=lambda: self.discriminator.load_weights(directory))
