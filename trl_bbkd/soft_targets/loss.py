"""
What a student is compared with, and the loss of one chunk of its logits.

    loss_n = hard_n · NLL(y_n) + Σ_j soft_nj · KL(target_nj ‖ student_n)

The KL is forward (target first), between distributions at a temperature τ: `softmax(z / τ)` on both sides, without the
factor τ² by which some implementations make up for the smaller gradient. Proxy-KD's equations 7, 8, 10 and 11 are this
loss with one target; Bayes-KD's has two. To a dense target, the KL may be reverse (student first).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


# Columns of a block of `_dot`: on a CPU a block of a chunk stays in its cache, on a GPU launches count
DOT_COLUMNS = {"cpu": 2**13}


@dataclass
class LMHead:
    """
    How hidden states become logits: `z = softcap · tanh(y / softcap)` with `y = logit_scale · (h · weightᵀ + bias)`.

    Args:
        weight (`torch.Tensor`):
            `(V, H)`.
        bias (`torch.Tensor`, *optional*):
            `(V,)`.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor of the projection.
        softcap (`float`, *optional*):
            Bound of the logits; `None` does not bound them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass
class SparseTarget:
    """
    A distribution known on a few tokens.

    Args:
        ids (`torch.Tensor`):
            `(N, K)`, token ids, different within a row where their probability is not 0.
        probs (`torch.Tensor`):
            `(N, K)`, their probabilities; an entry of probability 0 is none.
        tail (`torch.Tensor`, *optional*):
            `(N,)`, the probability of all other tokens together: the student's probability of them is lumped as well.
            `None` if `probs` sum to 1.
    """

    ids: torch.Tensor
    probs: torch.Tensor
    tail: torch.Tensor | None = None

    def chunk(self, rows: slice) -> "SparseTarget":
        return SparseTarget(self.ids[rows], self.probs[rows], _rows(self.tail, rows))


@dataclass
class DenseTarget:
    """
    The distribution of another model, computed from its hidden states. Of its vocabulary only the ids that the student
    has as well count; the student's further ids, if any, have probability 0.

    Args:
        hidden (`torch.Tensor`):
            `(N, H')`, that model's last hidden states.
        head ([`LMHead`]):
            Its output layer.
    """

    hidden: torch.Tensor
    head: LMHead

    def chunk(self, rows: slice) -> "DenseTarget":
        return DenseTarget(self.hidden[rows], self.head)


class ChunkLosses(NamedTuple):
    """Per token, each of shape `(n,)` but `kl`, `(J, n)`; in nats."""

    nll: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


def sparse_target(
    ids: torch.Tensor, log_probs: torch.Tensor, tail: str = "renormalize", temperature: float = 1.0
) -> SparseTarget:
    """
    Make a target of the most likely tokens of a distribution.

    Args:
        ids (`torch.Tensor`):
            `(N, K)`, token ids.
        log_probs (`torch.Tensor`):
            `(N, K)`, their log-probabilities under the whole distribution at temperature 1.
        tail (`str`, *optional*, defaults to `"renormalize"`):
            What becomes of the probability of all other tokens. `"renormalize"`: it is shared out, so that the target
            sums to 1 over the K tokens. `"bucket"`: it is kept as one bucket of all other tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the target. Only 1 is possible with `"bucket"`: the tail at another temperature is unknown.

    Returns:
        [`SparseTarget`]
    """
    if tail == "renormalize":
        return SparseTarget(ids, torch.softmax(log_probs / temperature, dim=-1))
    probs = log_probs.exp()
    # Quantised probabilities may sum to a little more than 1
    probs = probs / probs.sum(dim=-1, keepdim=True).clamp(min=1.0)
    return SparseTarget(ids, probs, (1.0 - probs.sum(dim=-1)).clamp(min=0.0))


def project(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
    """
    Logits of `hidden`, `(n, V)`, in float32 (float64 for float64 input).

    Args:
        hidden (`torch.Tensor`):
            `(n, H)`, in the dtype of `head.weight`.
        head ([`LMHead`]):
            Output layer.
    """
    weight = head.weight.t()
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden, weight)
    elif hidden.device.type == "cuda":
        logits = torch.mm(hidden, weight, out_dtype=torch.float32)
    else:
        logits = torch.mm(hidden, weight).float()
    if head.bias is not None:
        logits.add_(head.bias)
    if head.logit_scale != 1.0:
        logits.mul_(head.logit_scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def chunk_losses_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    targets: list[SparseTarget | torch.Tensor],
    hard: torch.Tensor,
    soft: torch.Tensor,
    temperature: float = 1.0,
    gradient: bool = True,
    reverse: bool = False,
) -> tuple[ChunkLosses, torch.Tensor | None]:
    """
    Losses of a chunk of tokens and, by formula, the gradient of their weighted sum. The arguments are overwritten.

    With s the student's and t a target's distribution, at temperature τ, the gradient with respect to the logits is

        hard · (softmax(z) - 1[y]) + Σ_j soft_j / τ · (s - t_j)

    where a target with a tail of mass m has `t_v = m · s_v / s_tail` outside its K tokens: that part of the gradient
    is a multiple of s, so that no target is ever spread over the vocabulary.

    Args:
        logits (`torch.Tensor`):
            `(n, V)`, the student's.
        labels (`torch.Tensor`):
            `(n,)`, the next tokens y.
        targets (`list[SparseTarget | torch.Tensor]`):
            J targets; a dense one as its own logits, `(n, V')`.
        hard (`torch.Tensor`):
            `(n,)`, factors of the NLL.
        soft (`torch.Tensor`):
            `(J, n)`, factors of the KL.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the KL.
        gradient (`bool`, *optional*, defaults to `True`):
            Whether the gradient is wanted.
        reverse (`bool`, *optional*, defaults to `False`):
            Whether the KL to dense targets is reverse; see [`reverse_terms`].

    Returns:
        `tuple[ChunkLosses, torch.Tensor | None]`: losses, and the gradient, `(n, V)`.
    """
    inverse = 1.0 / temperature
    label_logits = logits.gather(1, labels[:, None]).squeeze(1)
    highest, top1 = logits.max(dim=1)
    is_top1 = top1 == labels
    logits.sub_(highest[:, None])
    label_logits = label_logits - highest

    # Dense targets first: their logits' memory then serves the student's probabilities
    kl = logits.new_zeros(len(targets), len(labels))
    spare = None
    dense_probs, reverse_grads = [], []
    for index, target in enumerate(targets):
        if isinstance(target, SparseTarget):
            continue
        shared = logits[:, : target.size(1)]
        if reverse:
            kl[index], reverse_grad = reverse_terms(shared * inverse, target.mul_(inverse))
            reverse_grads.append((index, reverse_grad))
            continue
        target.sub_(target.amax(dim=1, keepdim=True))
        if temperature != 1.0:
            target.mul_(inverse)
        probs = target.exp()
        mass = probs.sum(dim=1)
        probs.div_(mass[:, None])
        # KL = Σ t (log t - log s); the student's normaliser is added below
        kl[index] = _dot(probs, target) - mass.log() - inverse * _dot(probs, shared)
        dense_probs.append((index, probs))
        spare = target if spare is None and target.size(1) == logits.size(1) else spare

    probs = torch.exp(logits, out=spare) if spare is not None else logits.exp()
    mass = probs.sum(dim=1)
    log_mass = mass.log()
    probs.div_(mass[:, None])
    nll = log_mass - label_logits
    entropy = log_mass - _dot(probs, logits)

    if temperature == 1.0 or not targets:
        tempered, tempered_log_mass = probs, log_mass
    else:
        tempered = logits.mul(inverse).exp_()
        tempered_mass = tempered.sum(dim=1)
        tempered_log_mass = tempered_mass.log()
        tempered.div_(tempered_mass[:, None])

    # The factor of s in the gradient, and what is added to it at single tokens
    spread = torch.zeros_like(hard)
    corrections = []
    for index, target in enumerate(targets):
        if not isinstance(target, SparseTarget):
            if not reverse:
                kl[index] += tempered_log_mass
                spread += soft[index]
            continue
        log_probs = logits.gather(1, target.ids) * inverse - tempered_log_mass[:, None]
        kl[index], share, correction = sparse_terms(log_probs, target)
        spread += soft[index] * share
        corrections.append((target.ids, soft[index, :, None] * correction * inverse))
    losses = ChunkLosses(nll, kl, entropy, is_top1)
    if not gradient:
        return losses, None

    if tempered is probs:
        grad = probs.mul_((hard + spread)[:, None])
    else:
        grad = probs.mul_(hard[:, None]).addcmul_(tempered, (spread * inverse)[:, None])
    for index, target_probs in dense_probs:
        grad[:, : target_probs.size(1)].sub_(target_probs.mul_((soft[index] * inverse)[:, None]))
    for index, reverse_grad in reverse_grads:
        grad[:, : reverse_grad.size(1)].add_(reverse_grad.mul_((soft[index] * inverse)[:, None]))
    # By linearity the NLL and all sparse targets are one soft cross-entropy. One after the other, because a GPU adds what
    # one call has twice for a token in any order
    for ids, values in ((labels[:, None], -hard[:, None]), *corrections):
        grad.scatter_add_(1, ids, values)
    return losses, grad


def sparse_terms(log_probs: torch.Tensor, target: SparseTarget) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    KL of a sparse target, and its gradient with respect to the logits over the temperature,
    `share · s` plus a correction at the listed tokens.

    Args:
        log_probs (`torch.Tensor`):
            `(n, K)`, the student's log-probabilities of the listed tokens, at the target's temperature.
        target ([`SparseTarget`]):
            The target.

    Returns:
        `tuple`: KL `(n,)` in nats, share `(n,)`, correction `(n, K)`.
    """
    target_probs = target.probs.to(log_probs.dtype)
    kl = (torch.xlogy(target_probs, target_probs) - target_probs * log_probs).sum(dim=1)
    if target.tail is None:
        return kl, torch.ones_like(kl), -target_probs
    tail = target.tail.to(log_probs.dtype)
    listed = log_probs.exp().masked_fill(target_probs == 0, 0.0)
    student_tail = (1.0 - listed.sum(dim=1)).clamp(min=torch.finfo(log_probs.dtype).eps)
    ratio = tail / student_tail
    kl += torch.xlogy(tail, tail) - tail * student_tail.log()
    return kl, 1.0 - ratio, ratio[:, None] * listed - target_probs


def reverse_terms(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `KL(s ‖ t) = Σ_v s_v · (log s_v - log t_v)`, and its gradient with respect to the logits of s,
    `s_v · (log s_v - log t_v - KL)`.

    Args:
        logits, target (`torch.Tensor`):
            `(n, V')`, logits of s and t over the ids that both models have. What the student gives to others does not count:
            of those t is 0, and the KL would be infinite.

    Returns:
        `tuple`: KL `(n,)` in nats, gradient `(n, V')`.
    """
    log_ratio = torch.log_softmax(logits, dim=1)
    probs = log_ratio.exp()
    log_ratio.sub_(torch.log_softmax(target, dim=1))
    kl = _dot(probs, log_ratio)
    return kl, probs.mul_(log_ratio.sub_(kl[:, None]))


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    Dot products of rows, without an `(n, V)` product. Not a matrix product: a CPU's adds up 150,000 terms one by one,
    which costs three digits, and a GPU's may be in TF32.
    """
    columns = DOT_COLUMNS.get(first.device.type, 2**15)
    parts = zip(first.split(columns, dim=1), second.split(columns, dim=1), strict=True)
    return torch.stack([(one * other).sum(dim=1) for one, other in parts]).sum(dim=0)


def _rows(value: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if value is None else value[rows]


def top_log_probs(
    logits: torch.Tensor, labels: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The most likely tokens of each row of logits.

    Args:
        logits (`torch.Tensor`):
            `(n, V)`.
        labels (`torch.Tensor`):
            `(n,)`.
        k (`int`):
            How many; at most V are given.

    Returns:
        `tuple`: ids `(n, k)` and log-probabilities `(n, k)`, the highest first, and the log-probability of the label,
        `(n,)`.
    """
    values, ids = logits.topk(min(k, logits.size(1)), dim=1)
    log_mass = torch.logsumexp(logits, dim=1)
    label_logits = logits.gather(1, labels[:, None]).squeeze(1)
    return ids, values - log_mass[:, None], label_logits - log_mass
