"""[`~loss.chunk_losses_`] on a GPU: two Triton kernels read each chunk of logits twice and write its gradient once."""

import torch
import triton
import triton.language as tl

from .loss import ChunkLosses, SparseTarget, sparse_terms


STATISTICS_BLOCK, GRADIENT_BLOCK = 4096, 2048


@triton.jit
def _row_statistics(
    logits,
    target,
    statistics,
    top1,
    num_rows,
    vocab,
    target_vocab,
    logits_stride,
    target_stride,
    inverse,
    HAS_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row, t_row = logits + row * logits_stride, target + row * target_stride
    # Everything is relative to the highest logit so far, and is rescaled when a higher one is met
    highest, best = tl.load(z_row), 0
    mass, dot, tempered_mass = 0.0, 0.0, 0.0
    t_highest = tl.load(t_row) if HAS_TARGET else 0.0
    t_mass, t_dot, cross = 0.0, 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < vocab
        z = tl.load(z_row + columns, mask=mask, other=-float("inf"))
        block_highest = tl.max(z, axis=0)
        best = tl.where(block_highest > highest, start + tl.argmax(z, axis=0), best)
        raised = tl.maximum(highest, block_highest)
        shift = highest - raised
        delta = tl.where(mask, z - raised, 0.0)
        probs = tl.where(mask, tl.exp(delta), 0.0)
        dot = tl.exp(shift) * (dot + shift * mass) + tl.sum(probs * delta, axis=0)
        mass = tl.exp(shift) * mass + tl.sum(probs, axis=0)
        tempered = tl.where(mask, tl.exp(delta * inverse), 0.0)
        tempered_mass = tl.exp(shift * inverse) * tempered_mass + tl.sum(tempered, axis=0)
        if HAS_TARGET:
            t_mask = columns < target_vocab
            t = tl.load(t_row + columns, mask=t_mask, other=-float("inf"))
            t_raised = tl.maximum(t_highest, tl.max(t, axis=0))
            t_shift = (t_highest - t_raised) * inverse
            t_delta = tl.where(t_mask, (t - t_raised) * inverse, 0.0)
            t_probs = tl.where(t_mask, tl.exp(t_delta), 0.0)
            t_dot = tl.exp(t_shift) * (t_dot + t_shift * t_mass) + tl.sum(t_probs * t_delta, axis=0)
            cross = tl.exp(t_shift) * (cross + shift * inverse * t_mass) + tl.sum(t_probs * delta * inverse, axis=0)
            t_mass = tl.exp(t_shift) * t_mass + tl.sum(t_probs, axis=0)
            t_highest = t_raised
        highest = raised
    tl.store(top1 + row, best)
    tl.store(statistics + row, highest)
    tl.store(statistics + num_rows + row, mass)
    tl.store(statistics + 2 * num_rows + row, dot)
    tl.store(statistics + 3 * num_rows + row, tempered_mass)
    if HAS_TARGET:
        tl.store(statistics + 4 * num_rows + row, t_highest)
        tl.store(statistics + 5 * num_rows + row, t_mass)
        tl.store(statistics + 6 * num_rows + row, t_dot)
        tl.store(statistics + 7 * num_rows + row, cross)


@triton.jit
def _row_gradient(
    logits,
    target,
    gradient,
    factors,
    num_rows,
    vocab,
    target_vocab,
    logits_stride,
    target_stride,
    gradient_stride,
    inverse,
    TEMPERED: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocab
    z = tl.load(logits + row * logits_stride + columns, mask=mask, other=0.0)
    delta = z - tl.load(factors + row)
    value = tl.load(factors + num_rows + row) * tl.exp(delta)
    if TEMPERED:
        value += tl.load(factors + 2 * num_rows + row) * tl.exp(delta * inverse)
    if HAS_TARGET:
        t_mask = columns < target_vocab
        t = tl.load(target + row * target_stride + columns, mask=t_mask, other=-float("inf"))
        t_delta = (t - tl.load(factors + 3 * num_rows + row)) * inverse
        value -= tl.load(factors + 4 * num_rows + row) * tl.exp(t_delta)
    tl.store(gradient + row * gradient_stride + columns, value.to(gradient.dtype.element_ty), mask=mask)


def fused_chunk_losses_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    targets: list[SparseTarget | torch.Tensor],
    hard: torch.Tensor,
    soft: torch.Tensor,
    temperature: float,
    gradient: bool,
    dtype: torch.dtype,
) -> tuple[ChunkLosses, torch.Tensor | None]:
    """
    [`~loss.chunk_losses_`], whose arguments these are, for float32 logits and at most one dense target.

    Args:
        dtype (`torch.dtype`):
            Of the gradient, `(n, V)`. It is rounded once, after everything was added up in float32.
    """
    num_rows, vocab = logits.shape
    inverse = 1.0 / temperature
    number, dense = next(((i, t) for i, t in enumerate(targets) if not isinstance(t, SparseTarget)), (None, None))
    has_target = dense is not None
    target = dense if has_target else logits
    statistics = logits.new_empty(8, num_rows)
    top1 = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    _row_statistics[(num_rows,)](
        logits,
        target,
        statistics,
        top1,
        num_rows,
        vocab,
        target.size(1),
        logits.stride(0),
        target.stride(0),
        inverse,
        HAS_TARGET=has_target,
        BLOCK=STATISTICS_BLOCK,
        num_warps=8,
    )
    highest, mass, dot, tempered_mass, target_highest, target_mass, target_dot, cross = statistics
    log_mass, tempered_log_mass = mass.log(), tempered_mass.log()
    nll = highest + log_mass - logits.gather(1, labels[:, None]).squeeze(1)
    entropy = log_mass - dot / mass
    kl = logits.new_zeros(len(targets), num_rows)
    spread = torch.zeros_like(hard)
    corrections = [(labels[:, None], -hard[:, None])]
    for index, each in enumerate(targets):
        if not isinstance(each, SparseTarget):
            # Σ t (log t - log s)
            kl[index] = (target_dot - cross) / target_mass - target_mass.log() + tempered_log_mass
            spread += soft[index]
            continue
        log_probs = (logits.gather(1, each.ids) - highest[:, None]) * inverse - tempered_log_mass[:, None]
        kl[index], share, correction = sparse_terms(log_probs, each)
        spread += soft[index] * share
        corrections.append((each.ids, soft[index, :, None] * correction * inverse))
    losses = ChunkLosses(nll, kl, entropy, top1 == labels)
    if not gradient:
        return losses, None

    tempered = temperature != 1.0
    factors = torch.stack(
        [
            highest,
            (hard if tempered else hard + spread) / mass,
            spread * inverse / tempered_mass,
            *((target_highest, soft[number] * inverse / target_mass) if has_target else ()),
        ]
    )
    ids = torch.cat([tokens for tokens, _ in corrections], dim=1)
    listed = logits.gather(1, ids) - highest[:, None]
    grad = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    _row_gradient[(num_rows, triton.cdiv(vocab, GRADIENT_BLOCK))](
        logits,
        target,
        grad,
        factors,
        num_rows,
        vocab,
        target.size(1),
        logits.stride(0),
        target.stride(0),
        grad.stride(0),
        inverse,
        TEMPERED=tempered,
        HAS_TARGET=has_target,
        BLOCK=GRADIENT_BLOCK,
        num_warps=4,
    )
    if grad is logits:
        return losses, _add(grad, corrections)
    # The gradient at the listed tokens is a small difference of large numbers: added up in float32, where the logits were
    exact = factors[1][:, None] * listed.exp()
    if tempered:
        exact += factors[2][:, None] * (listed * inverse).exp()
    if has_target:
        known = ids < dense.size(1)
        target_delta = (dense.gather(1, ids.clamp(max=dense.size(1) - 1)) - target_highest[:, None]) * inverse
        exact -= torch.where(known, factors[4][:, None] * target_delta.exp(), 0.0)
    _add(logits.scatter_(1, ids, exact), corrections)
    return losses, grad.scatter_(1, ids, logits.gather(1, ids).to(dtype))


def _add(total: torch.Tensor, corrections: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    # One after the other, because a GPU adds what one call has twice for a token in any order
    for ids, values in corrections:
        total.scatter_add_(1, ids, values)
    return total
