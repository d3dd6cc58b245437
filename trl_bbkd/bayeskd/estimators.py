"""
The teacher's token distribution, estimated: equations (2') to (5') of our reading of Bayes-KD (arXiv 2401.07013v1).

A position's candidates are the C tokens that anything is known of; all others have probability 0. Nothing here knows
ids but `merge_candidates` and `draw_counts`: the rest works on values beside one another, in any leading shape.
Probabilities are in the dtype of the input, float64 for float64.
"""

import math
from collections.abc import Callable

import torch


LogDensity = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def observed_token_prior(ngram_probs: torch.Tensor, is_observed: torch.Tensor, gamma: float) -> torch.Tensor:
    """
    Equation (2'): the n-gram estimate, pulled toward the token y that the teacher wrote.

        π_w = (γ-1)/γ · 1[w = y] + p̂_w/γ

    Args:
        ngram_probs (`torch.Tensor`):
            `(..., C)`, p̂ of the candidates.
        is_observed (`torch.Tensor`):
            `(..., C)`, whether the candidate is y; numbers count as true where they are not 0.
        gamma (`float`):
            γ, at least 1. With 1 the prior is the n-gram estimate; the larger, the nearer to one-hot.

    Returns:
        `torch.Tensor`: π, `(..., C)`. It sums to 1 where p̂ does and y is a candidate.
    """
    if not gamma >= 1:
        raise ValueError(f"gamma must be at least 1, got {gamma}.")
    return ngram_probs / gamma + (1.0 - 1.0 / gamma) * is_observed.bool().to(ngram_probs.dtype)


def beta_posterior(prior: torch.Tensor, counts: torch.Tensor, draws: float, concentration: float) -> torch.Tensor:
    """
    Equation (5'): posterior mean under a Beta prior with mean π_w, worth κ draws, after s_w of K draws were w.

        p_w = (κ·π_w + s_w) / (κ + K)

    With the expected counts K·M_w for s_w this is the expectation of p_w over draws from M.

    Args:
        prior (`torch.Tensor`):
            `(...)`, π.
        counts (`torch.Tensor`):
            `(...)`, s, whole or fractional numbers.
        draws (`float`):
            K, at least 0. With 0 the posterior is the prior.
        concentration (`float`):
            κ, at least 0. With 0 the posterior is s/K.

    Returns:
        `torch.Tensor`: `(...)`. It sums to 1 where π does and s sums to K.
    """
    total = _total_draws(draws, concentration)
    # In this order K = 0 is exact. Whole counts divided first would come out in float32
    return prior * (concentration / total) + counts.to(prior.dtype) / total


def beta_log_density(grid: torch.Tensor, prior: torch.Tensor, concentration: float) -> torch.Tensor:
    """
    Logarithm of the Beta(κ·π_w, κ·(1-π_w)) density, up to a constant of each w.

    At π_w = 0 or 1 this is `1/p` or `1/(1-p)` times a power: no density on [0, 1] (the literal Beta is a point mass,
    which no draw could move), but finite on a grid that leaves 0 and 1 out. A draw that speaks against the point mass
    makes it a proper Beta, with the mean s_w/(κ+K) of the closed form's limit for π_w = 0.

    Args:
        grid (`torch.Tensor`):
            `(m,)`, points p between 0 and 1, both excluded.
        prior (`torch.Tensor`):
            `(..., C)`, π.
        concentration (`float`):
            κ.

    Returns:
        `torch.Tensor`: `(..., C, m)`.
    """
    density = (concentration * prior - 1.0)[..., None] * grid.log()
    return density.addcmul_((concentration * (1.0 - prior) - 1.0)[..., None], torch.log1p(-grid))


def grid_posterior(
    prior: torch.Tensor,
    counts: torch.Tensor,
    draws: float,
    concentration: float,
    points: int,
    log_density: LogDensity = beta_log_density,
) -> torch.Tensor:
    """
    Equations (3') and (4'): the posterior mean of a density on the m midpoints `p_i = (i - 1/2)/m`, normalised over
    the support `S = {w: π_w > 0 or s_w > 0}`; 0 outside of it.

    The order of draws does not matter in (3'), so that all of them are one update:
    `f_K(p) ∝ p^s_w · (1-p)^(K-s_w) · f_0(p)`.

    A Beta density agrees with [`beta_posterior`] where both its posterior parameters are at least 1, to 1e-3 with 100
    points. Where one is below 1/2, with π_w small and s_w = 0, much of its mass is within a cell of 0 or 1, and the
    grid is off by up to 0.04.

    Args:
        prior (`torch.Tensor`):
            `(..., C)`, π.
        counts (`torch.Tensor`):
            `(..., C)`, s, at most K each.
        draws (`float`):
            K, at least 0.
        concentration (`float`):
            κ, at least 0, handed on to `log_density`.
        points (`int`):
            m, at least 1. One tensor of `(..., C, m)` is worked in.
        log_density (`Callable`, *optional*, defaults to `beta_log_density`):
            Of `grid` `(m,)`, `prior` and `concentration`: log f_0, up to a constant of each w, as a new tensor
            `(..., C, m)`, which is overwritten. -∞ is allowed, but not at all points.

    Returns:
        `torch.Tensor`: `(..., C)`. A row without a support is 0.
    """
    _total_draws(draws, concentration)
    if points < 1:
        raise ValueError(f"points must be at least 1, got {points}.")
    counts = counts.to(prior.dtype)
    in_support = (prior > 0) | (counts > 0)
    grid = (torch.arange(points, dtype=prior.dtype, device=prior.device) + 0.5) / points

    density = log_density(grid, prior, concentration)
    density.addcmul_(counts[..., None], grid.log()).addcmul_((draws - counts)[..., None], torch.log1p(-grid))
    highest = density.amax(dim=-1, keepdim=True)
    if bool((in_support & highest.squeeze(-1).isneginf()).any()):
        raise ValueError(f"The prior density is 0 at all {points} points of the grid. Use more points or a wider one.")
    density.sub_(highest).exp_()
    means = torch.where(in_support, (density @ grid) / density.sum(dim=-1), 0.0)
    # A mean on the grid is at least 1/(2m): only a row without a support sums to 0
    return means / means.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(means.dtype).tiny)


def merge_candidates(ids: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Name each id once per row, and add up what is said of it.

    Args:
        ids (`torch.Tensor`):
            `(N, A)`, token ids, int64, the same one any number of times.
        values (`torch.Tensor`):
            `(J, N, A)`, J numbers of each.

    Returns:
        `tuple`: ids `(N, C)`, ascending, and sums `(J, N, C)`, with C the largest number of different ids of a row.
        Behind a shorter row's own ids are entries with id 0 and sums 0. An id whose values are all 0 is kept.
    """
    # Stable: sums are in the order of the entries
    ordered, order = ids.sort(dim=1, stable=True)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    column = is_new.cumsum(dim=1) - 1
    width = int(column.max()) + 1 if column.numel() else 0
    merged_ids = ids.new_zeros(len(ids), width).scatter_(1, column, ordered)
    ordered_values = values.gather(2, order.expand(values.shape))
    merged = values.new_zeros(len(values), len(ids), width)
    return merged_ids, merged.scatter_add_(2, column.expand(values.shape), ordered_values)


def with_known_probs(estimate: torch.Tensor, known: torch.Tensor, is_known: torch.Tensor) -> torch.Tensor:
    """
    Put the teacher's own probabilities, where an API showed them, in place of their estimates: draws of infinite
    weight. What they leave of 1 is shared out over the other candidates in proportion to their estimates.

    Args:
        estimate (`torch.Tensor`):
            `(..., C)`, a distribution over candidates.
        known (`torch.Tensor`):
            `(..., C)`, known probabilities; read only where `is_known`.
        is_known (`torch.Tensor`):
            `(..., C)`, whether they are known; numbers count as true where they are not 0.

    Returns:
        `torch.Tensor`: `(..., C)`. Known probabilities are exact, but normalised where they sum to more than 1
        (rounding) or where no other candidate has an estimate above 0. A row is unchanged where nothing is known, or
        where what is known rules out all its candidates.
    """
    is_known = is_known.bool()
    known = torch.where(is_known, known, 0.0).to(estimate.dtype)
    others = estimate.masked_fill(is_known, 0.0)
    known_mass = known.sum(dim=-1, keepdim=True)
    other_mass = others.sum(dim=-1, keepdim=True)
    # Divisors are 1 where the quotient is not used
    normalised = known / torch.where(known_mass > 0, known_mass, 1.0)
    shared = others / torch.where(other_mass > 0, other_mass, 1.0) * (1.0 - known_mass)
    result = torch.where((known_mass > 1) | (other_mass <= 0), normalised, known + shared)
    is_changed = is_known.any(dim=-1, keepdim=True) & ((known_mass > 0) | (other_mass > 0))
    return torch.where(is_changed, result, estimate)


def sampling_distribution(logits: torch.Tensor, temperature: float, top_k: int | None) -> torch.Tensor:
    """
    What tokens are drawn from: the softmax of `logits / temperature`, over the likeliest tokens.

    Args:
        logits (`torch.Tensor`):
            `(N, V)`, of any floating dtype.
        temperature (`float`):
            Above 0.
        top_k (`int`, *optional*):
            How many tokens can be drawn, at least 1; all others have probability 0. `None` is all.

    Returns:
        `torch.Tensor`: `(N, V)`, float32, or float64 for float64 logits.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}. None is all tokens.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if top_k is None or top_k >= logits.size(1):
        return torch.softmax(logits / temperature, dim=1)
    values, ids = logits.topk(top_k, dim=1)
    return torch.zeros_like(logits).scatter_(1, ids, torch.softmax(values / temperature, dim=1))


def draw_counts(probs: torch.Tensor, draws: int, generator: torch.Generator) -> torch.Tensor:
    """
    Draw K tokens at each position, with replacement. [`merge_candidates`] makes counts of them.

    Args:
        probs (`torch.Tensor`):
            `(N, V)`, one distribution per position.
        draws (`int`):
            K, at least 0.
        generator (`torch.Generator`):
            Source of the random numbers, on the device of `probs`.

    Returns:
        `torch.Tensor`: ids, `(N, K)`, int64.
    """
    if draws < 0:
        raise ValueError(f"draws must be at least 0, got {draws}.")
    if draws == 0:  # of which `multinomial` makes an error
        return torch.empty(len(probs), 0, dtype=torch.int64, device=probs.device)
    return torch.multinomial(probs, draws, replacement=True, generator=generator)


def smoothed_nll(probs: torch.Tensor, floor: float, vocab_size: int) -> torch.Tensor:
    """
    How well an estimate predicts teacher text that it was not made from: the mean of `-log((1-ε)·q + ε/V)`. The share
    ε of a uniform distribution keeps a token that was never counted or drawn from making it infinite.

    Args:
        probs (`torch.Tensor`):
            `(N,)`, q, the estimates of the teacher's tokens; with γ = 1, so that none has seen the token it is
            judged on.
        floor (`float`):
            ε, between 0 and 1.
        vocab_size (`int`):
            V, at least 1.

    Returns:
        `torch.Tensor`: a scalar, in nats per token.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be between 0 and 1, got {floor}.")
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}.")
    return -((1.0 - floor) * probs + floor / vocab_size).log().mean()


def _total_draws(draws: float, concentration: float) -> float:
    """K + κ, checked."""
    for name, value in (("draws", draws), ("concentration", concentration)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")
    if draws + concentration == 0:
        raise ValueError("draws and concentration are both 0: nothing is left to estimate from. Raise one.")
    return draws + concentration
