"""
Bayes-KD in tinyworld, where the teacher's distributions are known: is the estimate good, and what is it worth?

    python benchmarks/bayeskd_tinyworld.py --seeds 0 1 2 --output_dir output/bayeskd_tinyworld

Settings are those of recipes/bayeskd.yaml.

**Estimates.** Over all answer tokens of some training rows, and of the held-out rows: KL(teacher ‖ estimate) in nats per
token. An estimate without mass on a possible token is infinitely far away, so each is mixed with a share of a uniform
distribution: one share for all (`FLOOR`), and for each the best one of `SHARES`, which favours none. `on average` is the
KL to what the estimate is in expectation over the token that the teacher writes at this position, counts and proxy
being what they are: what a student with enough rows learns. The observed token is noisy, but right on average.

**Students**, at equal optimizer steps, measured at the last one: the judge's verdict on samples, the NLL of the
teacher's held-out answers, and KL(teacher ‖ student) at their tokens. Arms of a seed share the warmed-up proxy.
"""

import argparse
import copy
import json
import shutil
import sys
import time
from itertools import product
from pathlib import Path
from statistics import fmean as mean

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_bbkd.bayeskd.estimators import beta_posterior, observed_token_prior
from trl_bbkd.bayeskd.ngram import answer_contexts, build_ngram_model
from trl_bbkd.bayeskd.targets import ProxyDistributions, TargetEstimator
from trl_bbkd.bayeskd.top_logprobs import TOP_LOGPROBS
from trl_bbkd.bayeskd.trainer import BayesKDTrainer
from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.evaluation.student import evaluate_student, pad_rows
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.soft_targets.rows import soft_target_rows


RECIPE = Path(__file__).parents[1] / "recipes" / "bayeskd.yaml"
WORLD = RECIPE.parent / "tinyworld"
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

# The setting that arms change, stated here so that it stays when the recipe's does
PAPER = {
    "hard_weight": 1.0,
    "prior_weight": 1.0,
    "posterior_weight": 1.0,
    "prior_gamma": 3.0,
    "ngram_context_length": 3,
    "ngram_min_count": 1,
    "posterior_draws": 10,
    "posterior_concentration": 10.0,
    "posterior_sampling": "drawn",
    "target_tail": "renormalize",
}
N, K, KAPPA = (PAPER[name] for name in ("ngram_context_length", "posterior_draws", "posterior_concentration"))
POSTERIOR = {"prior_weight": 0.0}
PROXY_ALONE = {"posterior_concentration": 0.0, **POSTERIOR}
EXPECTED = {"posterior_sampling": "expected"}
TRUSTING = {"posterior_concentration": 1.0, "posterior_draws": 50}
# What an arm changes; `proxy` is one of PROXIES
ARMS = {
    "hard (SFT)": {"prior_weight": 0.0, "posterior_weight": 0.0},
    "hard + prior": {"posterior_weight": 0.0},
    "hard + posterior": POSTERIOR,
    "hard + prior + posterior": {},
    "h+post, expected": {**EXPECTED, **POSTERIOR},
    "h+post, κ=1": {"posterior_concentration": 1.0, **POSTERIOR},
    "h+post, κ=1, K=50": {**TRUSTING, **POSTERIOR},
    "h+post, κ=1, K=50, expected": {**TRUSTING, **EXPECTED, **POSTERIOR},
    "h+prior+post, γ=30, κ=1, K=50, expected": {"prior_gamma": 30.0, **TRUSTING, **EXPECTED},
    "h+post, K=50": {"posterior_draws": 50, **POSTERIOR},
    "h+post, κ=0 (proxy's draws)": PROXY_ALONE,
    "h+post, κ=0, expected (proxy)": {**EXPECTED, **PROXY_ALONE},
    "h+post, γ=1": {"prior_gamma": 1.0, **POSTERIOR},
    "h+post, γ=30": {"prior_gamma": 30.0, **POSTERIOR},
    "h+prior, γ=30": {"prior_gamma": 30.0, "posterior_weight": 0.0},
    "h+post, β=3": {"posterior_weight": 3.0, **POSTERIOR},
    "posterior alone": {"hard_weight": 0.0, **POSTERIOR},
    "h+post, n=6": {"ngram_context_length": 6, **POSTERIOR},
    "h+post, n=6, min_count=2": {"ngram_context_length": 6, "ngram_min_count": 2, **POSTERIOR},
    "h+post, a tenth warms up": {"proxy": "a tenth of the rows", **POSTERIOR},
    "h+post, no warm-up": {"proxy": "as it came", **POSTERIOR},
    "h+proxy, a tenth warms up": {"proxy": "a tenth of the rows", **EXPECTED, **PROXY_ALONE},
    "h+post, proxy from nothing, a tenth": {"proxy": "from nothing, a tenth", **POSTERIOR},
    "h+proxy, from nothing, a tenth": {"proxy": "from nothing, a tenth", **EXPECTED, **PROXY_ALONE},
    "h+post, teacher's own": {"posterior_draws": 0, "known": True, **POSTERIOR},
}
COLUMNS = {
    "valid, T=1.0": ("valid@t1.0", "{:.3f}"),
    "T=0.7": ("valid@t0.7", "{:.3f}"),
    "greedy": ("valid@greedy", "{:.3f}"),
    "distinct valid": ("distinct_valid@t1.0", "{:,.0f}"),
    "teacher NLL": ("teacher_nll", "{:.4f}"),
    "KL(teacher ‖ student)": ("teacher_kl", "{:.4f}"),
}
PER_SEED = (("valid@t1.0", "{:.3f}"), ("teacher_kl", "{:.4f}"))


def exact_distributions(data: Dataset, tokenizer, world) -> list[list[dict[int, float]]]:
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


@torch.no_grad()
def student_kl(model, truth: Truth, pad_id: int) -> float:
    """KL(teacher ‖ student) per token."""
    ids, mask = pad_rows([row["input_ids"] for row in truth.rows], pad_id, model.device, side="right")
    labels, _ = pad_rows([row["labels"] for row in truth.rows], -100, model.device, side="right")
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits[:, :-1][labels[:, 1:] != -100]
    return truth.kl(truth.at(logits.double().softmax(1)))


class Seed:
    """One seed's runs, below one folder."""

    def __init__(self, arguments, seed: int, data: dict, truths: dict, known: list, tokenizer, judge):
        self.arguments, self.seed, self.data, self.truths, self.known = arguments, seed, data, truths, known
        self.tokenizer, self.judge = tokenizer, judge
        self.root = Path(arguments.output_dir) / f"seed{seed}"

    def trainer(self, folder: Path, changes: dict, train: Dataset) -> BayesKDTrainer:
        settings = {"output_dir": folder, "seed": self.seed, "disable_tqdm": "true", "logging_strategy": "no"}
        settings |= PAPER | changes
        stages = settings.pop("stages", ["warmup", "estimate", "distil"])
        overrides = [*(f"--{name}={value}" for name, value in settings.items()), "--stages", *stages]
        return BayesKDTrainer(
            str(WORLD / "student"),
            args=load_recipe(str(RECIPE), overrides).training_args,
            train_dataset=train,
            eval_dataset=self.data["test"],
            processing_class=self.tokenizer,
        )

    def warmed_up(self, name: str) -> Path:
        """The folder of a proxy, trained if it is not there."""
        folder = self.root / "proxies" / name.replace(" ", "-")
        share, knows = PROXIES[name]
        if share == 0:
            return WORLD / "proxy"
        changes = {"stages": ["warmup"]}
        if not knows:
            changes["proxy_model"] = self.root / "proxies" / "random"
            set_seed(self.seed)
            config = AutoConfig.from_pretrained(WORLD / "proxy")
            AutoModelForCausalLM.from_config(config).save_pretrained(changes["proxy_model"])
            self.tokenizer.save_pretrained(changes["proxy_model"])
        rows = self.data["train"].select(range(int(share * len(self.data["train"]))))
        self.trainer(folder, changes, rows).train()
        return folder / "proxy" / "warmup"

    def estimates(self) -> dict:
        proxies = {name: AutoModelForCausalLM.from_pretrained(self.warmed_up(name)).eval() for name in PROXIES}
        args = self.trainer(self.root / "none", {}, self.data["train"]).args
        answers = self.data["train"]["teacher_ids"][:]
        corpus = np.concatenate([np.asarray(ids) for ids in answers]), np.array([len(ids) for ids in answers])
        sizes = {"num_tokens": len(corpus[0]), "vocab_size": len(self.tokenizer)}
        models = {}
        for n, min_count in COUNTS:
            model = build_ngram_model(self.root / f"ngrams-{n}", lambda: [corpus], context_length=n, **sizes)
            models[n, min_count] = model
        found = {"seen_once": {n: model.singleton_share for (n, _), model in models.items()}}
        for split, truth in self.truths.items():
            evidence = Evidence(truth, models, proxies, args, len(self.tokenizer), self.tokenizer.pad_token_id)
            # Of a held-out token the estimate must not know that it was written
            gammas = GAMMAS if split == "train" else (1.0,)
            found[split] = {"rows": evidence.headlines(gammas[-1]), "sweep": evidence.sweep(gammas)}
            if split == "train":
                check_against_estimator(evidence, models[N, 1], proxies["warmed up"], args)
                found["arms"] = {arm: evidence.target(PAPER | ARMS[arm]) for arm in self.arguments.arms}
        return found

    def students(self) -> dict:
        results = {}
        for arm in ["undistilled", *self.arguments.arms]:
            started = time.perf_counter()
            model = self.arm(arm) if arm in ARMS else AutoModelForCausalLM.from_pretrained(WORLD / "student")
            seconds = time.perf_counter() - started
            settings = {"max_new_tokens": 32, "num_samples": 8, "batch_size": 512}
            metrics = evaluate_student(model, self.tokenizer, self.data["test"].to_list(), self.judge, **settings)
            metrics["teacher_kl"] = student_kl(model, self.truths["test"], self.tokenizer.pad_token_id)
            results[arm] = metrics | {"seconds": seconds}
            print(f"seed {self.seed}, {arm}:", json.dumps(results[arm]), flush=True)
        return results

    def arm(self, arm: str):
        """The arm's student, trained."""
        folder, changes = self.root / "arms" / arm.replace(" ", "-"), dict(ARMS[arm])
        shutil.rmtree(folder, ignore_errors=True)
        train = self.data["train"]
        if changes.pop("known", False):
            ids = [[list(table) for table in row] for row in self.known]
            log_probs = [[[np.log(prob).item() for prob in table.values()] for table in row] for row in self.known]
            column = [{"ids": row, "logprobs": values} for row, values in zip(ids, log_probs, strict=True)]
            train = train.add_column(TOP_LOGPROBS, column)
        proxy = changes.pop("proxy", "warmed up")
        if proxy != "warmed up":
            changes |= {"stages": ["estimate", "distil"], "proxy_model": self.warmed_up(proxy)}
        elif changes.get("posterior_weight") != 0 and changes.get("posterior_draws") != 0:
            # The same first stage for all of them: copied, it is found to be finished
            shutil.copytree(self.warmed_up(proxy), folder / "proxy" / "warmup")
        trainer = self.trainer(folder, changes, train)
        trainer.train()
        return trainer.model


def markdown(header: list[str], rows: list[list]) -> str:
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    )


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


def students_table(results: list[dict]) -> str:
    rows = []
    for arm in results[0]["students"]:
        runs = [result["students"][arm] for result in results]
        targets = [result["estimates"]["arms"][arm] for result in results] if arm in ARMS else []
        cells = [form.format(mean(run[name] for run in runs)) for name, form in COLUMNS.values()]
        seeds = [", ".join(form.format(run[name]) for run in runs) for name, form in PER_SEED]
        rows.append([arm, f"{abs(mean(targets)):.4f}" if targets else "–", *cells, *seeds])
    header = ["arm", "KL of its target, on average", *COLUMNS, "valid, T=1.0, of each seed", "KL of each seed"]
    return markdown(header, rows)


def tables(results: list[dict]) -> str:
    seen_once = ", ".join(f"n={n}: {share:.4f}" for n, share in results[0]["estimates"]["seen_once"].items())
    parts = [f"Answer tokens whose context is there once: {seen_once}"]
    for split in ("train", "test"):
        parts += [f"Estimates on {split} rows", estimates_table(results, split), sweep_table(results, split)]
    shown = product(("warmed up", "from nothing, a tenth"), GAMMAS)
    parts += [grid_table(results, "train", proxy, gamma) for proxy, gamma in shown]
    if "students" in results[0]:
        parts += ["Students", students_table(results)]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rows", type=int, default=1000, help="training rows at which estimates are compared")
    parser.add_argument("--train_rows", type=int, help="of the teacher's 4,000 answers; by default all")
    parser.add_argument("--output_dir", default="output/bayeskd_tinyworld")
    arguments = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    sys.path.insert(0, str(WORLD))
    import world

    tokenizer = AutoTokenizer.from_pretrained(WORLD / "student", padding_side="left")
    data, known, truths = {}, {}, {}
    for split, most, rows in (("train", arguments.train_rows, arguments.rows), ("test", None, None)):
        teacher_data = Dataset.from_dict(Dataset.from_json(str(WORLD / f"teacher_{split}.jsonl"))[:most])
        data[split] = tokenize_teacher_data(teacher_data, tokenizer, max_completion_length=32)[0]
        known[split] = exact_distributions(data[split], tokenizer, world)
        truth = truths[split] = Truth(Dataset.from_dict(data[split][:rows]), known[split][:rows], tokenizer)
        print(f"{split}: {truth}", flush=True)
    results, output = [], Path(arguments.output_dir)
    for seed in arguments.seeds:
        runs = Seed(arguments, seed, data, truths, known["train"], tokenizer, world.judge)
        results.append({"estimates": runs.estimates()})
        results[-1]["students"] = runs.students()
        text = tables(results)
        (output / "tables.md").write_text(text)
        (output / "results.json").write_text(json.dumps(results, indent=1))
    print(text)


if __name__ == "__main__":
    main()
