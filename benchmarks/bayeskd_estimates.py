"""
How near the estimates of `bayeskd_tinyworld.py` come to the teacher's distributions, which tinyworld knows.

KL(teacher ‖ estimate) in nats per answer token. An estimate without mass on a possible token is infinitely far away, so
each is mixed with a share of a uniform distribution: one share for all (`FLOOR`), and for each the best one of `SHARES`,
which favours none. `on average` is the KL to what the estimate is in expectation over the token that the teacher writes
at this position, counts and proxy being what they are.
"""

import copy
from itertools import product
from statistics import fmean as mean

import numpy as np
import torch
from common.bayeskd import PAPER
from common.tables import markdown
from common.tinyworld import world
from datasets import Dataset

from trl_bbkd.bayeskd.estimators import beta_posterior, observed_token_prior
from trl_bbkd.bayeskd.ngram import answer_contexts
from trl_bbkd.bayeskd.targets import ProxyDistributions, TargetEstimator
from trl_bbkd.soft_targets.rows import soft_target_rows


FLOOR = 1e-3
SHARES = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
DRAWS = (0, 1, 5, 10, 20, 50)
CONCENTRATIONS = (1.0, 3.0, 10.0, 30.0)
GAMMAS = (1.0, 3.0)
COUNTS = ((1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (4, 5), (6, 1), (6, 2), (6, 5))  # n and min_count
# The share of rows that each warms up on, and whether it knows anything before
PROXIES = {
    "warmed up": (1.0, True),
    "a tenth of the rows": (0.1, True),
    "as it came": (0.0, True),
    "from nothing": (1.0, False),
    "from nothing, a tenth": (0.1, False),
}

N, K, KAPPA = (PAPER[name] for name in ("ngram_context_length", "posterior_draws", "posterior_concentration"))


def exact_distributions(data: Dataset, tokenizer) -> list[list[dict[int, float]]]:
    """Of each answer token of each row: the teacher's probabilities of the tokens that are possible."""
    found = []
    for prompt, answer in zip(data["prompt"][:], data["teacher_ids"][:], strict=True):
        words = tokenizer.convert_ids_to_tokens(answer)
        here = [world.next_token_distribution(prompt, words[:t]) for t in range(len(words))]
        found.append([dict(zip(tokenizer.convert_tokens_to_ids(list(d)), d.values(), strict=True)) for d in here])
        assert all(token in table for token, table in zip(answer, found[-1], strict=True)), (prompt, words)
    return found


class Truth:
    """The teacher's exact distributions at the answer tokens of some rows, as (position, token, probability)."""

    def __init__(self, data: Dataset, distributions: list[list[dict[int, float]]], tokenizer):
        self.rows = soft_target_rows(data, tokenizer).to_list()
        answers = data["teacher_ids"][:]
        self.tokens = np.concatenate([np.asarray(answer, dtype=np.int64) for answer in answers])
        self.lengths = np.array([len(answer) for answer in answers])
        tables = [table for row in distributions for table in row]
        self.positions = torch.tensor([position for position, table in enumerate(tables) for _ in table])
        self.ids = torch.tensor([token for table in tables for token in table])
        self.probs = torch.tensor([prob for table in tables for prob in table.values()], dtype=torch.float64)
        self.is_observed = self.ids == torch.from_numpy(self.tokens)[self.positions]
        self.entropy = float(-(self.probs * self.probs.log()).sum() / len(self.tokens))
        self.nll = float(-self.probs[self.is_observed].log().mean())

    def __str__(self) -> str:
        return (
            f"{len(self.rows):,} rows, {len(self.tokens):,} tokens, {len(self.ids) / len(self.tokens):.2f} possible ones at each; "
            f"the teacher's entropy {self.entropy:.4f}, NLL of its answers {self.nll:.4f}, KL to itself {self.kl(self.probs):.0e}"
        )

    def at(self, dense: torch.Tensor) -> torch.Tensor:
        """What `(N, V)` says of the possible tokens."""
        return dense[self.positions, self.ids]

    def kl(self, probs: torch.Tensor) -> float:
        """KL(teacher ‖ estimate) per token, from the estimates of the possible tokens."""
        return float(-(self.probs * probs.log()).sum() / len(self.tokens)) - self.entropy

    def scores(self, probs: torch.Tensor, vocab_size: int, on_average: torch.Tensor | None = None) -> dict:
        """At the fixed share, at the best one, and at the best one of what the estimate is on average: by default itself."""

        def mixed(values: torch.Tensor, share: float) -> float:
            return self.kl((1 - share) * values + share / vocab_size)

        best = min(SHARES, key=lambda share: mixed(probs, share))
        average = min(mixed(probs if on_average is None else on_average, share) for share in SHARES)
        return {"fixed": mixed(probs, FLOOR), "best": mixed(probs, best), "share": best, "on_average": average}


class Evidence:
    """What counts and proxies say of the possible tokens, by the package's own functions."""

    def __init__(self, truth: Truth, models: dict, proxies: dict, args, vocab_size: int, pad_id: int):
        self.truth, self.vocab_size = truth, vocab_size
        self.ngram, self.proxy, self.drawn = {}, {}, {}
        for (n, min_count), model in models.items():
            contexts = answer_contexts(truth.tokens, truth.lengths, n, vocab_size)
            ids, probs, _ = model.top(contexts, vocab_size, min_count)
            dense = torch.zeros(len(ids), vocab_size, dtype=torch.float64)
            dense.scatter_add_(1, torch.from_numpy(ids), torch.from_numpy(probs))
            self.ngram[n, min_count] = truth.at(dense)
            assert torch.allclose(dense.sum(1), torch.ones(len(dense), dtype=torch.float64))
        for name, proxy in proxies.items():
            distributions = ProxyDistributions(proxy, args, vocab_size, pad_id)
            dense, counts = [], {draws: [] for draws in DRAWS}
            with torch.no_grad():
                for start in range(0, len(truth.rows), 250):
                    rows = truth.rows[start : start + 250]
                    none = torch.zeros(sum(truth.lengths[start : start + 250]), 0, dtype=torch.int64)
                    ids, probs, _ = distributions.probabilities(rows, none, vocab_size)
                    dense.append(torch.zeros(len(ids), vocab_size, dtype=torch.float64).scatter_(1, ids, probs))
                    for draws, parts in counts.items():
                        drawn = distributions.draws(rows, draws)
                        ones = torch.ones(drawn.shape, dtype=torch.float64)
                        parts.append(torch.zeros_like(dense[-1]).scatter_add_(1, drawn, ones))
            self.proxy[name] = truth.at(torch.cat(dense))
            self.drawn[name] = {draws: truth.at(torch.cat(parts)) for draws, parts in counts.items()}

    def prior(self, gamma: float, n: int, min_count: int, on_average: bool = False) -> torch.Tensor:
        """On average the teacher's token is distributed as the teacher says."""
        observed = torch.zeros_like(self.truth.is_observed) if on_average else self.truth.is_observed
        prior = observed_token_prior(self.ngram[n, min_count], observed, gamma)
        return prior + (1 - 1 / gamma) * self.truth.probs if on_average else prior

    def posterior(self, proxy: str, draws=K, kappa=KAPPA, gamma=3.0, n=N, min_count=1, drawn=True) -> dict:
        """Scores of a posterior; on average means over draws as well."""
        expected = draws * self.proxy[proxy]
        counts = self.drawn[proxy][draws] if drawn else expected
        estimate = beta_posterior(self.prior(gamma, n, min_count), counts, draws, kappa)
        average = beta_posterior(self.prior(gamma, n, min_count, on_average=True), expected, draws, kappa)
        return self.truth.scores(estimate, self.vocab_size, average)

    def target(self, settings: dict) -> float:
        """KL of what an arm learns from, on average: of the observed token, prior and posterior as its loss weighs them."""
        draws, kappa = settings["posterior_draws"], settings["posterior_concentration"]
        counts = settings["ngram_context_length"], settings["ngram_min_count"]
        prior = self.prior(settings["prior_gamma"], *counts, on_average=True)
        posterior = beta_posterior(prior, draws * self.proxy[settings.get("proxy", "warmed up")], draws, kappa)
        if settings.get("known"):
            posterior = self.truth.probs
        parts = {"hard_weight": self.truth.probs, "prior_weight": prior, "posterior_weight": posterior}
        total = sum(settings[name] for name in parts)
        return self.truth.kl(sum(settings[name] / total * part for name, part in parts.items()).clamp(min=1e-12))

    def headlines(self, gamma: float) -> dict[str, dict]:
        """Rows of the table of estimates."""
        truth, size, rows = self.truth, self.vocab_size, {}
        if gamma > 1:
            rows["observed token"] = truth.scores(truth.is_observed.double(), size, truth.probs)
        for value in dict.fromkeys((1.0, gamma)):
            for n, min_count in self.ngram:
                name = "n-gram ratio" if value == 1 else f"prior, γ={value:g}"
                about = f", n={n}" + (f", min_count={min_count}" if min_count > 1 else "")
                estimate, average = (self.prior(value, n, min_count, on_average) for on_average in (False, True))
                rows[name + about] = truth.scores(estimate, size, average)
        rows |= {f"proxy {name}": truth.scores(probs, size) for name, probs in self.proxy.items()}
        rows[f"posterior, K={K}, κ={KAPPA:g}, γ={gamma:g}, n={N}"] = self.posterior("warmed up", gamma=gamma)
        changes = {
            "expected": {"drawn": False},
            "κ=1": {"kappa": 1.0},
            "K=50": {"draws": 50},
            "K=50, κ=1": {"draws": 50, "kappa": 1.0},
            "γ=1": {"gamma": 1.0},
            "γ=30": {"gamma": 30.0},
            **{f"proxy {name}": {"proxy": name} for name in list(PROXIES)[1:]},
        }
        for name, change in changes.items():
            if gamma > 1 or "gamma" not in change:
                rows[f"... {name}"] = self.posterior(**{"proxy": "warmed up", "gamma": gamma, **change})
        return rows

    def sweep(self, gammas: tuple[float, ...]) -> list[dict]:
        """Every posterior beside its prior and its proxy."""
        found = []
        for proxy, (n, min_count), gamma in product(self.proxy, self.ngram, gammas):
            alone = self.truth.scores(self.proxy[proxy], self.vocab_size)["best"]
            prior = self.truth.scores(self.prior(gamma, n, min_count), self.vocab_size)["best"]
            for draws, kappa, drawn in product(DRAWS, CONCENTRATIONS, (True, False)):
                setting = {"proxy": proxy, "n": n, "min_count": min_count, "gamma": gamma}
                setting |= {"draws": draws, "kappa": kappa, "drawn": drawn}
                found.append({**setting, **self.posterior(**setting), "of_prior": prior, "of_proxy": alone})
        return found


def check_against_estimator(evidence: Evidence, model, proxy, args, rows: int = 50) -> None:
    """The table's estimates are those that `TargetEstimator` stores, which keeps all tokens here."""
    truth, vocab_size = evidence.truth, evidence.vocab_size
    here = truth.positions < sum(truth.lengths[:rows])
    for sampling in ("drawn", "expected"):
        settings = copy.copy(args)
        settings.target_top_k, settings.posterior_sampling = vocab_size, sampling
        estimator = TargetEstimator(model, ProxyDistributions(proxy, settings, vocab_size, 0), settings)
        prior = evidence.prior(PAPER["prior_gamma"], N, 1)
        counts = evidence.drawn["warmed up"][K] if sampling == "drawn" else K * evidence.proxy["warmed up"]
        wanted = prior, beta_posterior(prior, counts, K, KAPPA)
        for targets, ours in zip(estimator(truth.rows[:rows]), wanted, strict=True):
            ids = torch.from_numpy(np.concatenate([target.ids for target in targets]))
            probs = torch.from_numpy(np.concatenate([target.log_probs for target in targets])).double().exp()
            dense = torch.zeros(len(ids), vocab_size, dtype=torch.float64).scatter_add_(1, ids, probs)
            difference = (dense[truth.positions[here], truth.ids[here]] - ours[here]).abs().max()
            assert difference < 1e-5 and (dense.sum(1) - 1).abs().max() < 1e-5, (sampling, difference)


def estimates_table(results: list[dict], split: str) -> str:
    runs = [result["estimates"][split]["rows"] for result in results]
    rows = []
    for name in runs[0]:
        found = [run[name] for run in runs]
        fixed, best, average = (mean(entry[key] for entry in found) for key in ("fixed", "best", "on_average"))
        shares = ", ".join(dict.fromkeys(f"{entry['share']:g}" for entry in found))
        seeds = ", ".join(f"{entry['best']:.4f}" for entry in found)
        rows.append([name, f"{fixed:.4f}", f"{best:.4f}", shares, f"{abs(average):.4f}", seeds])
    header = ["estimate", f"KL, {FLOOR:g} uniform", "KL, best share", "best share", "on average", "of each seed"]
    return markdown(header, rows)


def averaged_sweep(results: list[dict], split: str) -> list[dict]:
    runs = zip(*(result["estimates"][split]["sweep"] for result in results), strict=True)
    averaged = ("fixed", "best", "on_average", "of_prior", "of_proxy")
    return [cells[0] | {key: mean(cell[key] for cell in cells) for key in averaged} for cells in runs]


def sweep_table(results: list[dict], split: str) -> str:
    """Of each proxy, counts and γ: the best posterior, and how many beat both what they are made from."""
    names, groups = ("proxy", "n", "min_count", "gamma"), {}
    for cell in averaged_sweep(results, split):
        if cell["draws"]:
            groups.setdefault(tuple(cell[name] for name in names), []).append(cell)
    rows = []
    for key, group in groups.items():
        best = min(group, key=lambda cell: cell["best"])
        papers = next(cell for cell in group if (cell["draws"], cell["kappa"], cell["drawn"]) == (K, KAPPA, True))
        better = sum(cell["best"] < min(cell["of_prior"], cell["of_proxy"]) for cell in group)
        numbers = [f"{value:.4f}" for value in (best["of_prior"], best["of_proxy"], papers["best"], best["best"])]
        at = f"{best['draws']}, {best['kappa']:g}, {'drawn' if best['drawn'] else 'expected'}"
        rows.append([*key, *numbers, at, f"{better} of {len(group)}"])
    header = ["proxy", "n", "min_count", "γ", "prior", "proxy", f"posterior, K={K}, κ={KAPPA:g}", "best posterior"]
    return markdown([*header, "at K, κ", "settings that beat both"], rows)


def grid_table(results: list[dict], split: str, proxy: str, gamma: float) -> str:
    """KL at the best share by K and κ, with the paper's counts."""
    cells = {
        tuple(cell[name] for name in ("draws", "kappa", "drawn")): cell["best"]
        for cell in averaged_sweep(results, split)
        if [cell[name] for name in ("proxy", "gamma", "n", "min_count")] == [proxy, gamma, N, 1]
    }
    text = {key[:2]: f"{cells[*key[:2], True]:.4f} ({cells[*key[:2], False]:.4f})" for key in cells}
    rows = [[draws, *(text[draws, kappa] for kappa in CONCENTRATIONS)] for draws in DRAWS]
    table = markdown(["K", *(f"κ={kappa:g}" for kappa in CONCENTRATIONS)], rows)
    return f"Proxy {proxy}, γ={gamma:g}, n={N}, {split} rows: drawn (expected)\n\n{table}"
