"""Prior and posterior of every answer token of some rows, ready to be stored."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ..soft_targets.caching import answer_hidden_states, row_targets, shared_head
from ..soft_targets.head import lm_head
from ..soft_targets.kernel import CHUNK_ELEMENTS
from ..soft_targets.loss import LMHead, project
from ..soft_targets.store import RowTargets
from .config import BayesKDConfig
from .estimators import (
    beta_posterior,
    draw_counts,
    grid_posterior,
    merge_candidates,
    observed_token_prior,
    sampling_distribution,
    with_known_probs,
)
from .ngram import NGramModel, answer_contexts
from .top_logprobs import TOP_LOGPROBS, KnownProbs, known_probs


# The likeliest tokens of an estimate are looked for among so many times as many of its sources
CANDIDATES = 4
# Of a posterior on a grid: positions, candidates and points that are in memory at once
GRID_ELEMENTS = 2**23


class ProxyDistributions:
    """
    The proxy's distributions over the answers of some rows.

    Args:
        proxy ([`~transformers.PreTrainedModel`]):
            The proxy, in evaluation mode.
        args ([`~config.BayesKDConfig`]):
            Temperature, top-k and seed.
        vocab_size (`int`):
            The student's.
        pad_id (`int`):
            Padding token.
    """

    def __init__(self, proxy: PreTrainedModel, args: BayesKDConfig, vocab_size: int, pad_id: int):
        self.proxy, self.args, self.pad_id = proxy, args, pad_id
        self.head: LMHead = shared_head(lm_head(proxy), vocab_size)

    def draws(self, rows: list[dict], count: int) -> torch.Tensor:
        """
        Tokens drawn at every position, `(N, count)`. Each row has random numbers of its own, from the seed and its
        key: which batch or process it is in does not matter.
        """
        return torch.cat([part for part, _ in self.draws_and_probs(rows, count)])

    def draws_and_probs(self, rows: list[dict], count: int):
        """As [`draws`], piece by piece, with the probability of the teacher's own token, `(n,)`."""
        hidden, tokens, lengths = answer_hidden_states(self.proxy, rows, self.pad_id)
        for row, row_hidden, row_tokens in zip(rows, hidden.split(lengths), tokens.split(lengths), strict=True):
            generator = torch.Generator(hidden.device).manual_seed(_row_seed(self.args.seed, row["row_key"]))
            for probs, part in self._pieces(row_hidden, row_tokens):
                of_labels = probs.gather(1, part[:, None]).squeeze(1)
                yield draw_counts(probs, count, generator).cpu(), of_labels.double().cpu()

    def probabilities(self, rows: list[dict], ids: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
        """
        The proxy's k likeliest tokens at every position, `(N, k)`, their probabilities, `(N, k)`, and those of `ids`,
        `(N, A)`.
        """
        hidden, _, _ = answer_hidden_states(self.proxy, rows, self.pad_id)
        parts = []
        for probs, part_ids in self._pieces(hidden, ids.to(hidden.device)):
            values, top_ids = probs.topk(min(k, probs.size(1)), dim=1)
            parts.append((top_ids.cpu(), values.double().cpu(), probs.gather(1, part_ids).double().cpu()))
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))

    def _pieces(self, hidden: torch.Tensor, companion: torch.Tensor):
        """Distributions of a chunk of positions, `(n, V)`, and the same positions of `companion`."""
        size = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 2**26) // self.head.weight.size(0))
        for part, other in zip(hidden.split(size), companion.split(size), strict=True):
            logits = project(part.to(self.head.weight.dtype), self.head)
            yield sampling_distribution(logits, self.args.proxy_temperature, self.args.proxy_top_k), other


@dataclass
class TargetEstimator:
    """
    Estimates the teacher's distribution at every answer token of a batch of rows.

    Args:
        ngrams ([`~ngram.NGramModel`]):
            Counts of the teacher's answers.
        proxy ([`ProxyDistributions`], *optional*):
            The proxy; `None` where nothing is drawn.
        args ([`~config.BayesKDConfig`]):
            Configuration.
    """

    ngrams: NGramModel
    proxy: ProxyDistributions | None
    args: BayesKDConfig

    @torch.no_grad()
    def __call__(self, rows: list[dict]) -> list[list[RowTargets]]:
        """Targets of each row for each of `args.target_weights`, prior first."""
        args = self.args
        answers = [[token for token in row["labels"][1:] if token != -100] for row in rows]
        lengths = [len(answer) for answer in answers]
        tokens = np.concatenate([np.asarray(answer, dtype=np.int64) for answer in answers])
        known = known_probs([row.get(TOP_LOGPROBS) for row in rows], lengths)
        contexts = answer_contexts(tokens, np.asarray(lengths), self.ngrams.context_length, self.ngrams.vocab_size)
        ids, values = self._candidates(rows, tokens, contexts, known)
        ngram_probs, is_observed, evidence, known_values, is_known = values

        prior = observed_token_prior(ngram_probs, is_observed, args.prior_gamma)
        estimates = {"prior": prior}
        if "posterior" in args.target_weights:
            draws = args.posterior_draws if self.proxy is not None else 0
            posterior = self._updated(prior, evidence, draws)
            estimates["posterior"] = with_known_probs(posterior, known_values, is_known)
        return [self._stored(ids, estimates[name], is_observed, lengths) for name in args.target_weights]

    def _updated(self, prior: torch.Tensor, evidence: torch.Tensor, draws: int) -> torch.Tensor:
        concentration, points = self.args.posterior_concentration, self.args.posterior_grid_points
        if points is None:
            return beta_posterior(prior, evidence, draws, concentration)
        size = max(1, GRID_ELEMENTS // (prior.size(1) * points))
        parts = zip(prior.split(size), evidence.split(size), strict=True)
        return torch.cat([grid_posterior(*part, draws, concentration, points) for part in parts])

    def _candidates(self, rows: list[dict], tokens: np.ndarray, contexts: np.ndarray, known: KnownProbs):
        """
        Tokens that may have probability, each once: the likeliest ones by count, the observed one, those that an API
        or the proxy names. Of each its n-gram ratio, whether it is the observed token, how often the proxy drew it,
        its known probability and whether it has one.
        """
        args = self.args
        ngram_ids, ratios, _ = self.ngrams.top(contexts, CANDIDATES * args.target_top_k, args.ngram_min_count)
        listed = ngram_ids.shape[1] + 1
        ids = torch.from_numpy(np.concatenate([ngram_ids, tokens[:, None], known.ids], axis=1))
        evidence, more_ids = self._evidence(rows, ids)
        ids = torch.cat([ids, more_ids], dim=1)
        width = ids.size(1)
        values = [
            _widened(torch.from_numpy(ratios), 0, width),
            _widened(torch.ones(len(tokens), 1, dtype=torch.float64), listed - 1, width),
            evidence,
            _widened(torch.from_numpy(known.probs), listed, width),
            _widened(torch.from_numpy(known.is_known).double(), listed, width),
            torch.ones_like(evidence),
        ]
        ids, merged = merge_candidates(ids, torch.stack(values))
        if args.posterior_sampling == "expected":
            # A draw is mentioned once; an expectation at each mention of its candidate
            merged[2] /= merged[-1].clamp(min=1.0)
        # More tokens were seen after a context than are likeliest: candidates named by others may be among them
        is_cut = torch.from_numpy(ratios.sum(axis=1) < 1.0 - 1e-9)
        position, column = ((merged[0] == 0) & (merged[-1] > 0) & is_cut[:, None]).nonzero(as_tuple=True)
        unlisted = self.ngrams.probability(
            contexts[position.numpy()], ids[position, column].numpy(), args.ngram_min_count
        )
        merged[0, position, column] = torch.from_numpy(unlisted)
        return ids, merged[:-1]

    def _evidence(self, rows: list[dict], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws of the proxy, or their expected number, for the candidates `ids` and more that the proxy names:
        `(N, A + B)` and the ids of those, `(N, B)`.
        """
        none = torch.zeros(ids.shape, dtype=torch.float64)
        if self.proxy is None:
            return none, ids[:, :0]
        draws = self.args.posterior_draws
        if self.args.posterior_sampling == "drawn":
            more_ids = self.proxy.draws(rows, draws)
            return torch.cat([none, torch.ones(more_ids.shape, dtype=torch.float64)], dim=1), more_ids
        more_ids, more_probs, probs = self.proxy.probabilities(rows, ids, CANDIDATES * self.args.target_top_k)
        return draws * torch.cat([probs, more_probs], dim=1), more_ids

    def _stored(
        self, ids: torch.Tensor, probs: torch.Tensor, is_observed: torch.Tensor, lengths: list[int]
    ) -> list[RowTargets]:
        k = self.args.target_top_k
        of_observed = (probs * is_observed).sum(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        # Stable: which of two equally likely tokens is kept must not depend on the batch
        values, order = (value[:, :k] for value in probs.sort(dim=1, descending=True, stable=True))
        top_ids = ids.gather(1, order).masked_fill(values == 0, 0)
        missing = k - values.size(1)
        values, top_ids = (torch.nn.functional.pad(value, (0, missing)) for value in (values, top_ids))
        parts = (top_ids.split(lengths), values.log().split(lengths), of_observed.log().split(lengths))
        return row_targets(*parts)


def _widened(values: torch.Tensor, before: int, width: int) -> torch.Tensor:
    """`values` among zeros, from column `before` on, in `width` columns."""
    return torch.nn.functional.pad(values, (before, width - before - values.size(1)))


def _row_seed(seed: int, row_key: int) -> int:
    digest = hashlib.blake2b(f"{seed} {row_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
