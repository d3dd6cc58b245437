"""The loss of [`loss`] over all tokens of a batch, chunk by chunk: no `(B, T, V)` tensor, and one projection."""

import importlib.util
from dataclasses import replace
from typing import NamedTuple

import torch

from .loss import ChunkLosses, DenseTarget, LMHead, SparseTarget, chunk_losses_, project, top_log_probs


HAS_TRITON = importlib.util.find_spec("triton") is not None
# Elements of one chunk of logits: about 200 tokens of a vocabulary of 150,000 on a CPU. A GPU wants larger products
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**27}


class TokenLosses(NamedTuple):
    """
    The loss of a batch, and what it consists of. A tuple: what wraps a model looks for tensors in tuples, lists and
    dictionaries alone.

    Args:
        loss (`torch.Tensor`):
            Scalar, `Σ_n hard_n · nll_n + Σ_jn soft_jn · kl_jn`. The only one with a gradient.
        nll (`torch.Tensor`):
            `(N,)`, in nats.
        kl (`torch.Tensor`):
            `(J, N)`, in nats.
        entropy (`torch.Tensor`):
            `(N,)`, the student's, in nats.
        is_top1 (`torch.Tensor`):
            `(N,)`, whether the label is the student's most likely token.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


def soft_target_loss(
    hidden: torch.Tensor,
    head: LMHead,
    labels: torch.Tensor,
    targets: list[SparseTarget | DenseTarget],
    hard: torch.Tensor,
    soft: torch.Tensor,
    temperature: float = 1.0,
    chunk_elements: int | None = None,
    reverse: bool = False,
) -> TokenLosses:
    """
    `hard · NLL + Σ_j soft_j · KL(target_j ‖ student)`, summed over tokens.

    Forward and gradient are one pass: each chunk of logits is projected once, turned into its own gradient and used up
    before the next one. Sums are in float32 (float64 for float64 input).

    Args:
        hidden (`torch.Tensor`):
            `(N, H)`, the student's last hidden states.
        head ([`~loss.LMHead`]):
            Its output layer, whose weight and bias get gradients where they require them.
        labels (`torch.Tensor`):
            `(N,)`, the tokens that come next.
        targets (`list[SparseTarget | DenseTarget]`):
            J targets.
        hard (`torch.Tensor`):
            `(N,)`, factors of the NLL, with whatever normalises the sum.
        soft (`torch.Tensor`):
            `(J, N)`, factors of the KL.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both sides of the KL.
        chunk_elements (`int`, *optional*):
            Elements of a chunk of logits. Changes memory and speed, not results.
        reverse (`bool`, *optional*, defaults to `False`):
            Whether the KL to dense targets is KL(student ‖ target).

    Returns:
        [`TokenLosses`]
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    chunk_rows = max(1, (chunk_elements or CHUNK_ELEMENTS.get(device, 2**26)) // head.weight.size(0))
    return TokenLosses(
        *_SoftTargetLoss.apply(
            hidden, head.weight, head.bias, head, labels, targets, hard, soft, temperature, dtype, chunk_rows, reverse
        )
    )


class _SoftTargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, labels, targets, hard, soft, temperature, dtype, chunk_rows, reverse):
        accumulate = torch.promote_types(dtype, torch.float32)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gradient = wants_hidden or wants_weight or wants_bias
        grad_hidden = torch.zeros_like(hidden, dtype=accumulate) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if wants_bias else None
        hard, soft = hard.to(accumulate), soft.to(accumulate)
        with torch.autocast(hidden.device.type, enabled=False):
            head = replace(head, weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))
            targets = [_in_dtype(target, dtype, len(weight)) for target in targets]

            # A function, so that a chunk's logits are gone before the next one's are made
            def one_chunk(rows: slice) -> ChunkLosses:
                hidden_chunk = hidden[rows].to(dtype)
                logits = project(hidden_chunk, head)
                # The slope of the softcap, at the logits as they were
                slope = None if head.softcap is None or not gradient else 1.0 - (logits / head.softcap).square_()
                in_float32 = slope is not None or head.logit_scale != 1.0 or wants_bias
                losses, grad = _chunk_losses_(
                    logits,
                    labels[rows],
                    [_target_chunk(target, rows) for target in targets],
                    hard[rows],
                    soft[:, rows],
                    temperature,
                    gradient,
                    accumulate if in_float32 else dtype,
                    reverse,
                )
                del logits
                if not gradient:
                    return losses
                if slope is not None:
                    grad.mul_(slope)
                if head.logit_scale != 1.0:
                    grad.mul_(head.logit_scale)
                if wants_bias:
                    grad_bias.add_(grad.sum(dim=0))
                grad = grad.to(dtype)
                if wants_hidden:
                    grad_hidden[rows] = torch.mm(grad, head.weight)
                if wants_weight:
                    _accumulate_product(grad_weight, grad.t(), hidden_chunk)
                return losses

            starts = range(0, len(hidden), chunk_rows)
            chunks = [one_chunk(slice(start, start + chunk_rows)) for start in starts]
        if chunks:
            nll, kl, entropy, is_top1 = (torch.cat(parts, dim=-1) for parts in zip(*chunks, strict=True))
        else:
            nll = entropy = hard.new_zeros(0)
            kl, is_top1 = hard.new_zeros(len(targets), 0), hard.new_zeros(0, dtype=torch.bool)
        ctx.grads = [
            None if grad is None else grad.to(value.dtype)
            for grad, value in ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
        ]
        ctx.mark_non_differentiable(nll, kl, entropy, is_top1)
        loss = (hard * nll).sum() + (soft * kl).sum()
        return loss, nll, kl, entropy, is_top1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("soft_target_loss keeps its gradient for one backward pass; compute the loss again.")
        # In place, because the gradient of the weight is as large as the weight
        grads = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.grads]
        ctx.grads = None
        return (*grads, *[None] * 9)


def _chunk_losses_(logits, labels, targets, hard, soft, temperature, gradient, dtype, reverse):
    """[`~loss.chunk_losses_`], on a GPU by Triton kernels, which may give the gradient in `dtype`. They know no reverse KL."""
    num_dense = sum(not isinstance(target, SparseTarget) for target in targets)
    is_known = num_dense == 0 or (num_dense == 1 and not reverse)
    if HAS_TRITON and logits.device.type == "cuda" and logits.dtype == torch.float32 and is_known:
        from .fused import fused_chunk_losses_

        return fused_chunk_losses_(logits, labels, targets, hard, soft, temperature, gradient, dtype)
    return chunk_losses_(logits, labels, targets, hard, soft, temperature, gradient, reverse)


def _in_dtype(target: SparseTarget | DenseTarget, dtype: torch.dtype, vocab_size: int) -> SparseTarget | DenseTarget:
    """A dense target's head in the dtype of the computation, without the ids that the student does not have."""
    if isinstance(target, SparseTarget):
        return target
    head = target.head
    bias = None if head.bias is None else head.bias[:vocab_size].to(dtype)
    return replace(target, head=replace(head, weight=head.weight[:vocab_size].to(dtype), bias=bias))


def _target_chunk(target: SparseTarget | DenseTarget, rows: slice) -> SparseTarget | torch.Tensor:
    if isinstance(target, SparseTarget):
        return target.chunk(rows)
    chunk = target.chunk(rows)
    return project(chunk.hidden.to(chunk.head.weight.dtype), chunk.head)


def _accumulate_product(total: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    if first.dtype == total.dtype:
        total.addmm_(first, second)
    elif total.device.type == "cuda":
        torch.addmm(total, first, second, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(first, second)


@torch.no_grad()
def chunked_top_log_probs(
    hidden: torch.Tensor, head: LMHead, labels: torch.Tensor, k: int, chunk_elements: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    [`~loss.top_log_probs`] from hidden states, chunk by chunk.

    Args:
        hidden (`torch.Tensor`):
            `(N, H)`.
        head ([`~loss.LMHead`]):
            Output layer.
        labels (`torch.Tensor`):
            `(N,)`.
        k (`int`):
            Tokens per position.
        chunk_elements (`int`, *optional*):
            Elements of a chunk of logits.

    Returns:
        `tuple`: ids `(N, k)`, log-probabilities `(N, k)`, and the labels' log-probabilities `(N,)`.
    """
    rows = max(1, (chunk_elements or CHUNK_ELEMENTS.get(hidden.device.type, 2**26)) // head.weight.size(0))
    dtype = head.weight.dtype
    chunks = [
        top_log_probs(project(part.to(dtype), head), part_labels, k)
        for part, part_labels in zip(hidden.split(rows), labels.split(rows), strict=True)
    ]
    ids, log_probs, label_log_probs = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return ids, log_probs, label_log_probs
