"""How well the estimate predicts teacher text that it was not made from."""

from dataclasses import dataclass

import numpy as np
import torch

from .estimators import beta_posterior, smoothed_nll


DRAWS = (0, 1, 2, 5, 10, 20, 50)
CONCENTRATIONS = (1.0, 3.0, 10.0, 30.0)
FLOOR = 1e-3  # share of a uniform distribution in every estimate: a token never seen or drawn has no probability else


@dataclass
class HeldOutTokens:
    """
    What is known of each token of held-out teacher text, without having seen it.

    Args:
        ngram (`torch.Tensor`):
            `(N,)`, its n-gram count ratio, backed off where its context was never seen.
        proxy (`torch.Tensor`):
            `(N,)`, its probability under the proxy.
        times_drawn (`dict[int, torch.Tensor]`):
            By K: `(N,)`, how often K draws of the proxy hit it.
    """

    ngram: torch.Tensor
    proxy: torch.Tensor
    times_drawn: dict[int, torch.Tensor]


def calibration(tokens: HeldOutTokens, draws: int, concentration: float, vocab_size: int) -> dict:
    """
    NLL of held-out teacher tokens under prior, proxy and posterior, in nats per token.

    The prior here is the n-gram ratio alone (γ = 1): of a token that it is judged on, an estimate must not know that
    it was written. The posterior is equation (5') from draws, and in expectation over them. Every estimate is mixed
    with a thousandth of a uniform distribution.

    Args:
        tokens ([`HeldOutTokens`]):
            The tokens; `times_drawn` for all of `DRAWS` and for `draws`.
        draws (`int`):
            K of the run.
        concentration (`float`):
            κ of the run.
        vocab_size (`int`):
            Size of the vocabulary.

    Returns:
        `dict`: `tokens`, `draws`, `concentration`; `prior`, `proxy`, `posterior` (in expectation) and
        `posterior_drawn`, NLLs; `gain_se`, the standard error of `proxy` less `posterior`; and `table`, a list of `draws`, `concentration`, `expected`, `drawn`.
    """

    def expected(count: int, kappa: float) -> float:
        return nll(beta_posterior(tokens.ngram, count * tokens.proxy, count, kappa))

    def drawn(count: int, kappa: float) -> float:
        return nll(beta_posterior(tokens.ngram, tokens.times_drawn[count].double(), count, kappa))

    def nll(probs: torch.Tensor) -> float:
        return float(smoothed_nll(probs, FLOOR, vocab_size))

    def log_probs(probs: torch.Tensor) -> torch.Tensor:
        return ((1.0 - FLOOR) * probs + FLOOR / vocab_size).log()

    return {
        "tokens": len(tokens.ngram),
        "draws": draws,
        "concentration": concentration,
        "prior": nll(tokens.ngram),
        "proxy": nll(tokens.proxy),
        "posterior": expected(draws, concentration),
        "posterior_drawn": drawn(draws, concentration),
        "gain_se": mean_standard_error(
            log_probs(beta_posterior(tokens.ngram, draws * tokens.proxy, draws, concentration))
            - log_probs(tokens.proxy)
        ),
        "table": [
            {"draws": count, "concentration": kappa, "expected": expected(count, kappa), "drawn": drawn(count, kappa)}
            for kappa in sorted({*CONCENTRATIONS, concentration} - {0.0})
            for count in sorted({*DRAWS, draws})
        ],
    }


def mean_standard_error(values: torch.Tensor) -> float | None:
    """Standard error of the mean of values, `(N,)`; `None` of one alone."""
    return float(values.double().std()) / len(values) ** 0.5 if len(values) > 1 else None


def hits(draws: np.ndarray, tokens: np.ndarray, counts: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """
    How often the first K draws hit the token.

    Args:
        draws (`np.ndarray`):
            `(N, D)`, drawn tokens.
        tokens (`np.ndarray`):
            `(N,)`, the teacher's.
        counts (`tuple[int, ...]`):
            Values of K, at most D.

    Returns:
        `dict[int, torch.Tensor]`: `(N,)` by K.
    """
    cumulative = np.concatenate(
        [np.zeros((len(tokens), 1), dtype=np.int64), np.cumsum(draws == tokens[:, None], 1)], 1
    )
    return {count: torch.from_numpy(cumulative[:, count].copy()) for count in counts}
