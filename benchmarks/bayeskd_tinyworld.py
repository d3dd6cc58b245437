"""
Bayes-KD in tinyworld, where the teacher's distributions are known: is the estimate good, and what is it worth?

    python benchmarks/bayeskd_tinyworld.py --seeds 0 1 2 --output_dir output/bayeskd_tinyworld

Settings are those of recipes/bayeskd.yaml.

**Estimates.** Over all answer tokens of some training rows, and of the held-out rows: KL(teacher ‖ estimate) in nats per
token, of the observed token, the n-gram ratio, the prior, the proxy and the posterior, by K, κ, γ, n and how well the
proxy knows the teacher. An estimate without mass on a possible token is infinitely far away, so each is mixed with a
share of a uniform distribution: one share for all (`FLOOR`), and for each estimate the best one of `SHARES`, which
favours none. `on average` is the KL to what the estimate is in expectation over the token that the teacher writes at
this position: what a student with enough rows learns from it. (Counts and proxy are what they are.) The observed token
is 0 there: it is noisy, but not wrong.

**Students**, at equal optimizer steps, measured at the last one: the judge's verdict on samples, the NLL of the
teacher's held-out answers, and KL(teacher ‖ student) at their tokens. Arms of a seed share the warmed-up proxy and,
where n is the same, the counts; an arm changes what its name says.
"""

import argparse
import copy
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_bbkd.bayeskd.bayeskd_trainer import BayesKDTrainer
from trl_bbkd.bayeskd.estimators import beta_posterior, observed_token_prior
from trl_bbkd.bayeskd.ngram import answer_contexts, build_ngram_model
from trl_bbkd.bayeskd.targets import ProxyDistributions, TargetEstimator
from trl_bbkd.bayeskd.top_logprobs import TOP_LOGPROBS
from trl_bbkd.evaluation import evaluate_student, pad_rows
from trl_bbkd.recipe import load_recipe
from trl_bbkd.soft_targets.rows import soft_target_rows
from trl_bbkd.teacher_data import tokenize_teacher_data


RECIPE = Path(__file__).parents[1] / "recipes" / "bayeskd.yaml"
WORLD = RECIPE.parent / "tinyworld"
SAMPLES = 8
FLOOR = 1e-3
SHARES = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
DRAWS = (0, 1, 5, 10, 20, 50)
CONCENTRATIONS = (1.0, 3.0, 10.0, 30.0)
GAMMAS = (1.0, 3.0)
CONTEXTS = (1, 2, 3, 4, 6)
# The share of rows that each proxy is warmed up on, and whether it knows anything before
PROXIES = {
    "warmed up": (1.0, True),
    "a tenth of the rows": (0.1, True),
    "as it came": (0.0, True),
    "from nothing": (1.0, False),
    "from nothing, a tenth": (0.1, False),
    "from nothing, a fiftieth": (0.02, False),
}

POSTERIOR = {"prior_weight": 0.0}
PROXY_ALONE = {"posterior_concentration": 0.0, **POSTERIOR}
# What an arm changes; `proxy` is one of PROXIES
ARMS = {
    "hard (SFT)": {"prior_weight": 0.0, "posterior_weight": 0.0},
    "hard + prior": {"posterior_weight": 0.0},
    "hard + posterior": POSTERIOR,
    "hard + prior + posterior": {},
    "h+post, expected": {"posterior_sampling": "expected", **POSTERIOR},
    "h+post, κ=1": {"posterior_concentration": 1.0, **POSTERIOR},
    "h+post, κ=1, K=50": {"posterior_concentration": 1.0, "posterior_draws": 50, **POSTERIOR},
    "h+post, K=50": {"posterior_draws": 50, **POSTERIOR},
    "h+post, κ=0 (proxy's draws)": PROXY_ALONE,
    "h+post, κ=0, K=1": {"posterior_draws": 1, **PROXY_ALONE},
    "h+post, κ=0, expected (proxy)": {"posterior_sampling": "expected", **PROXY_ALONE},
    "h+post, γ=1": {"prior_gamma": 1.0, **POSTERIOR},
    "h+post, γ=1, κ=1, expected": {
        "prior_gamma": 1.0,
        "posterior_concentration": 1.0,
        "posterior_sampling": "expected",
        **POSTERIOR,
    },
    "h+post, β=3": {"posterior_weight": 3.0, **POSTERIOR},
    "h+post, β=10": {"posterior_weight": 10.0, **POSTERIOR},
    "h+post, κ=1, β=3": {"posterior_concentration": 1.0, "posterior_weight": 3.0, **POSTERIOR},
    "h+post, κ=1, β=10": {"posterior_concentration": 1.0, "posterior_weight": 10.0, **POSTERIOR},
    "posterior alone": {"hard_weight": 0.0, **POSTERIOR},
    "prior alone": {"hard_weight": 0.0, "posterior_weight": 0.0},
    "h+prior, γ=1": {"prior_gamma": 1.0, "posterior_weight": 0.0},
    "h+prior, n=6": {"ngram_context_length": 6, "posterior_weight": 0.0},
    "h+post, n=1": {"ngram_context_length": 1, **POSTERIOR},
    "h+post, n=2": {"ngram_context_length": 2, **POSTERIOR},
    "h+post, n=4": {"ngram_context_length": 4, **POSTERIOR},
    "h+post, n=6": {"ngram_context_length": 6, **POSTERIOR},
    "h+post, n=6, min_count=2": {"ngram_context_length": 6, "ngram_min_count": 2, **POSTERIOR},
    "h+post, a tenth warms up": {"proxy": "a tenth of the rows", **POSTERIOR},
    "h+post, no warm-up": {"proxy": "as it came", **POSTERIOR},
    "both, a tenth warms up": {"proxy": "a tenth of the rows"},
    "both, no warm-up": {"proxy": "as it came"},
    "h+proxy, a tenth warms up": {"proxy": "a tenth of the rows", "posterior_sampling": "expected", **PROXY_ALONE},
    "h+post, proxy from nothing, a tenth": {"proxy": "from nothing, a tenth", **POSTERIOR},
    "h+proxy, from nothing, a tenth": {
        "proxy": "from nothing, a tenth",
        "posterior_sampling": "expected",
        **PROXY_ALONE,
    },
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

    def at(self, dense: torch.Tensor) -> torch.Tensor:
        """What `(N, V)` says of the possible tokens."""
        return dense[self.positions, self.ids]

    def kl(self, probs: torch.Tensor) -> float:
        """KL(teacher ‖ estimate) per token, from the estimates of the possible tokens."""
        return float(-(self.probs * probs.log()).sum() / len(self.tokens)) - self.entropy

    def scores(self, probs: torch.Tensor, vocab_size: int, on_average: torch.Tensor | None = None) -> dict:
        def mixed(values: torch.Tensor, share: float) -> float:
            return self.kl((1 - share) * values + share / vocab_size)

        best = min(SHARES, key=lambda share: mixed(probs, share))
        found = {"fixed": mixed(probs, FLOOR), "best": mixed(probs, best), "share": best}
        return found if on_average is None else found | {"on_average": min(mixed(on_average, s) for s in SHARES)}


def recipe_settings(args) -> tuple[int, int, float]:
    """n, K, κ."""
    return args.ngram_context_length, args.posterior_draws, args.posterior_concentration


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
                    size = sum(truth.lengths[start : start + 250])
                    ids, probs, _ = distributions.probabilities(
                        rows, torch.zeros(size, 1, dtype=torch.int64), vocab_size
                    )
                    dense.append(torch.zeros(size, vocab_size, dtype=torch.float64).scatter_(1, ids, probs))
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

    def posterior(self, proxy: str, draws: int, kappa: float, gamma: float, n: int, min_count: int = 1, drawn=True):
        """Scores of a posterior. On average over draws as well, where there are any."""
        expected = draws * self.proxy[proxy]
        counts = self.drawn[proxy][draws] if drawn else expected
        estimate = beta_posterior(self.prior(gamma, n, min_count), counts, draws, kappa)
        average = beta_posterior(self.prior(gamma, n, min_count, on_average=True), expected, draws, kappa)
        return self.truth.scores(estimate, self.vocab_size, average)

    def headlines(self, gamma: float, args) -> dict[str, dict]:
        """Rows of the table of estimates: the recipe's settings but for what is named."""
        n, draws, kappa = recipe_settings(args)
        truth, proxy = self.truth, next(iter(self.proxy))
        rows = {}
        if gamma > 1:
            rows["observed token"] = truth.scores(truth.is_observed.double(), self.vocab_size, truth.probs)
        for length, count in self.ngram:
            about = f"n={length}" + (f", min_count={count}" if count > 1 else "")
            ngram = self.ngram[length, count]
            rows[f"n-gram ratio, {about}"] = truth.scores(ngram, self.vocab_size, ngram)
        if gamma > 1:
            for length, count in self.ngram:
                about = f"n={length}" + (f", min_count={count}" if count > 1 else "")
                pair = [self.prior(gamma, length, count, on_average) for on_average in (False, True)]
                rows[f"prior, γ={gamma:g}, {about}"] = truth.scores(pair[0], self.vocab_size, pair[1])
        for name, probs in self.proxy.items():
            rows[f"proxy, {name}"] = truth.scores(probs, self.vocab_size, probs)
        about = f"K={draws}, κ={kappa:g}, γ={gamma:g}, n={n}"
        rows[f"posterior, {about}"] = self.posterior(proxy, draws, kappa, gamma, n)
        rows["... expected"] = self.posterior(proxy, draws, kappa, gamma, n, drawn=False)
        rows["... κ=1"] = self.posterior(proxy, draws, 1.0, gamma, n)
        rows["... K=50"] = self.posterior(proxy, 50, kappa, gamma, n)
        rows["... K=50, κ=1"] = self.posterior(proxy, 50, 1.0, gamma, n)
        if gamma > 1:
            rows["... γ=1"] = self.posterior(proxy, draws, kappa, 1.0, n)
            rows["... γ=1, κ=1, expected"] = self.posterior(proxy, draws, 1.0, 1.0, n, drawn=False)
        for name in list(self.proxy)[1:]:
            rows[f"... proxy {name}"] = self.posterior(name, draws, kappa, gamma, n)
        return rows

    def sweep(self, gammas=GAMMAS) -> list[dict]:
        """Every posterior beside its prior and its proxy."""
        found = []
        for proxy in self.proxy:
            alone = self.truth.scores(self.proxy[proxy], self.vocab_size)
            for n, min_count in self.ngram:
                for gamma in gammas:
                    prior = self.truth.scores(self.prior(gamma, n, min_count), self.vocab_size)
                    for draws in DRAWS:
                        for kappa in CONCENTRATIONS:
                            for drawn in (True, False):
                                scores = self.posterior(proxy, draws, kappa, gamma, n, min_count, drawn)
                                found.append(
                                    {
                                        **{"proxy": proxy, "n": n, "min_count": min_count, "gamma": gamma},
                                        **{"draws": draws, "kappa": kappa, "drawn": drawn, **scores},
                                        **{"of_prior": prior["best"], "of_proxy": alone["best"]},
                                    }
                                )
        return found


def check_against_estimator(evidence: Evidence, model, proxy, args, pad_id: int, rows: int = 50) -> None:
    """The table's estimates are those that `TargetEstimator` stores, which keeps all tokens here."""
    truth, vocab_size = evidence.truth, evidence.vocab_size
    here = truth.positions < sum(truth.lengths[:rows])
    name, (n, draws, kappa) = next(iter(evidence.proxy)), recipe_settings(args)
    for sampling in ("drawn", "expected"):
        settings = copy.copy(args)
        settings.target_top_k, settings.posterior_sampling = vocab_size, sampling
        estimator = TargetEstimator(model, ProxyDistributions(proxy, settings, vocab_size, pad_id), settings)
        prior = evidence.prior(args.prior_gamma, n, 1)
        counts = evidence.drawn[name][draws] if sampling == "drawn" else draws * evidence.proxy[name]
        wanted = prior, beta_posterior(prior, counts, draws, kappa)
        for targets, ours in zip(estimator(truth.rows[:rows]), wanted, strict=True):
            ids = torch.from_numpy(np.concatenate([target.ids for target in targets]))
            probs = torch.from_numpy(np.concatenate([target.log_probs for target in targets])).double().exp()
            dense = torch.zeros(len(ids), vocab_size, dtype=torch.float64).scatter_add_(1, ids, probs)
            difference = (dense[truth.positions[here], truth.ids[here]] - ours[here]).abs().max()
            assert difference < 1e-5 and (dense.sum(1) - 1).abs().max() < 1e-5, (sampling, difference)


@torch.no_grad()
def student_kl(model, truth: Truth, pad_id: int) -> float:
    """KL(teacher ‖ student) per token."""
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(truth.rows), 128):
        batch = truth.rows[start : start + 128]
        ids, mask = pad_rows([row["input_ids"] for row in batch], pad_id, model.device, side="right")
        labels, _ = pad_rows([row["labels"] for row in batch], -100, model.device, side="right")
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1][labels[:, 1:] != -100]
        found.append(logits.double().softmax(1))
    model.train(was_training)
    return truth.kl(truth.at(torch.cat(found)))


class Seed:
    """One seed's runs, below one folder."""

    def __init__(self, arguments, seed: int, data: dict, truths: dict, known: list, tokenizer, judge):
        self.arguments, self.seed, self.data, self.truths, self.known = arguments, seed, data, truths, known
        self.tokenizer, self.judge = tokenizer, judge
        self.root = Path(arguments.output_dir) / f"seed{seed}"

    def trainer(self, folder: Path, changes: dict, train: Dataset) -> BayesKDTrainer:
        overrides = [f"--{name}={value}" for name, value in changes.items() if name != "stages"]
        overrides += [
            "--output_dir",
            str(folder),
            "--seed",
            str(self.seed),
            "--disable_tqdm",
            "true",
            "--logging_strategy",
            "no",
        ]
        overrides += ["--stages", *changes["stages"]] if "stages" in changes else []
        return BayesKDTrainer(
            str(WORLD / "student"),
            args=load_recipe(self.arguments.recipe, overrides).training_args,
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
            if not changes["proxy_model"].is_dir():
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
        answers = [list(ids) for ids in self.data["train"]["teacher_ids"]]
        corpus = np.concatenate([np.asarray(ids) for ids in answers]), np.array([len(ids) for ids in answers])
        vocab_size, pad_id = len(self.tokenizer), self.tokenizer.pad_token_id
        models = {}
        for n in CONTEXTS:
            model = build_ngram_model(
                self.root / f"ngrams-{n}",
                lambda: [corpus],
                num_tokens=len(corpus[0]),
                vocab_size=vocab_size,
                context_length=n,
            )
            models[n, 1] = model
            if n > 3:
                models[n, 2], models[n, 5] = model, model
        found = {"seen_once": {n: model.singleton_share for (n, _), model in models.items()}}
        for split, truth in self.truths.items():
            evidence = Evidence(truth, models, proxies, args, vocab_size, pad_id)
            if split == "train":
                model = models[args.ngram_context_length, 1]
                check_against_estimator(evidence, model, next(iter(proxies.values())), args, pad_id)
            # Of a held-out token the estimate must not know that it was written
            gammas = GAMMAS if split == "train" else (1.0,)
            found[split] = {"rows": evidence.headlines(gammas[-1], args), "sweep": evidence.sweep(gammas)}
        return found

    def students(self) -> dict:
        results = {}
        for arm in ["undistilled", *self.arguments.arms]:
            started = time.perf_counter()
            found = {}
            if arm == "undistilled":
                model = AutoModelForCausalLM.from_pretrained(WORLD / "student")
            else:
                trainer = self.arm(arm, dict(ARMS[arm]))
                model = trainer.model
                calibration = trainer.calibration or {}
                found = {name: calibration[name] for name in ("prior", "proxy", "posterior") if calibration}
            seconds = time.perf_counter() - started
            metrics = evaluate_student(
                model,
                self.tokenizer,
                self.data["test"].to_list(),
                self.judge,
                max_new_tokens=32,
                num_samples=SAMPLES,
                batch_size=512,
            )
            metrics["teacher_kl"] = student_kl(model, self.truths["test"], self.tokenizer.pad_token_id)
            results[arm] = metrics | {"seconds": seconds, "calibration": found}
            print(f"seed {self.seed}, {arm}:", json.dumps(results[arm]), flush=True)
        return results

    def arm(self, arm: str, changes: dict) -> BayesKDTrainer:
        folder = self.root / "arms" / arm.replace(" ", "-").replace("/", "-")
        shutil.rmtree(folder, ignore_errors=True)
        train = self.data["train"]
        if changes.pop("known", False):
            train = train.add_column(
                TOP_LOGPROBS,
                [
                    {"ids": [list(d) for d in row], "logprobs": [[math.log(p) for p in d.values()] for d in row]}
                    for row in self.known
                ],
            )
        proxy = changes.pop("proxy", "warmed up")
        if proxy != "warmed up":
            changes |= {"stages": ["estimate", "distil"], "proxy_model": self.warmed_up(proxy)}
        elif changes.get("posterior_weight") != 0 and changes.get("posterior_draws") != 0:
            # The first stage of every arm with a proxy, and the same one: it is copied, and found to be finished
            shutil.copytree(self.warmed_up(proxy), folder / "proxy" / "warmup")
        trainer = self.trainer(folder, changes, train)
        trainer.train()
        return trainer


def mean(values) -> float:
    return statistics.mean(values)


def estimates_table(results: list[dict], split: str) -> str:
    """Means over the seeds, and each seed's value."""
    lines = [
        f"| estimate | KL, {FLOOR:g} uniform | KL, best share | best share | on average | KL, best share, of each seed |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    runs = [result["estimates"][split]["rows"] for result in results]
    for name in runs[0]:
        rows = [run[name] for run in runs]
        cells = [f"{mean(row[key] for row in rows):.4f}" for key in ("fixed", "best")]
        shares = ", ".join(dict.fromkeys(f"{row['share']:g}" for row in rows))
        seeds = ", ".join(f"{row['best']:.4f}" for row in rows)
        average = f"{max(0.0, mean(row['on_average'] for row in rows)):.4f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {shares} | {average} | {seeds} |")
    return "\n".join(lines)


def averaged_sweep(results: list[dict], split: str) -> list[dict]:
    runs = [result["estimates"][split]["sweep"] for result in results]
    averaged = ("fixed", "best", "on_average", "of_prior", "of_proxy")
    return [
        cells[0] | {key: mean(cell[key] for cell in cells) for key in averaged} for cells in zip(*runs, strict=True)
    ]


def sweep_table(results: list[dict], split: str) -> str:
    """Of each proxy, n and γ: the best posterior, and how many beat both what they are made from."""
    cells = averaged_sweep(results, split)
    lines = [
        "| proxy | n | min_count | γ | prior | proxy | best posterior | at K, κ | recipe's K, κ | settings that beat both |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    names = ("proxy", "n", "min_count", "gamma")
    for key in dict.fromkeys(tuple(cell[name] for name in names) for cell in cells):
        group = [cell for cell in cells if tuple(cell[name] for name in names) == key and cell["draws"]]
        best = min(group, key=lambda cell: cell["best"])
        of_recipe = next(cell for cell in group if (cell["draws"], cell["kappa"], cell["drawn"]) == (10, 10.0, True))
        counted = [cell["best"] < min(cell["of_prior"], cell["of_proxy"]) for cell in group]
        at = f"{best['draws']}, {best['kappa']:g}, {'drawn' if best['drawn'] else 'expected'}"
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {key[3]:g} | {best['of_prior']:.4f} | {best['of_proxy']:.4f} | "
            f"{best['best']:.4f} | {at} | {of_recipe['best']:.4f} | {sum(counted)} of {len(counted)} |"
        )
    return "\n".join(lines)


def grid_tables(results: list[dict], split: str, n: int) -> str:
    """KL at the best share by K and κ, drawn (expected)."""
    cells = {
        tuple(cell[name] for name in ("proxy", "gamma", "draws", "kappa", "drawn")): cell["best"]
        for cell in averaged_sweep(results, split)
        if (cell["n"], cell["min_count"]) == (n, 1)
    }
    parts = []
    for proxy, gamma in dict.fromkeys(key[:2] for key in cells):
        lines = [
            f"Proxy {proxy}, γ={gamma:g}, n={n}: drawn (expected)\n",
            f"| K | {' | '.join(f'κ={kappa:g}' for kappa in CONCENTRATIONS)} |",
            "| ---: |" + " ---: |" * len(CONCENTRATIONS),
        ]
        for draws in DRAWS:
            row = [[cells[proxy, gamma, draws, kappa, drawn] for drawn in (True, False)] for kappa in CONCENTRATIONS]
            lines.append(f"| {draws} | {' | '.join(f'{drawn:.4f} ({exp:.4f})' for drawn, exp in row)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def students_table(results: list[dict]) -> str:
    lines = [
        f"| arm | {' | '.join(COLUMNS)} | valid, T=1.0, of each seed | KL of each seed |",
        "| --- |" + " ---: |" * len(COLUMNS) + " --- | --- |",
    ]
    for arm in results[0]["students"]:
        runs = [result["students"][arm] for result in results]
        cells = [form.format(mean(run[name] for run in runs)) for name, form in COLUMNS.values()]
        seeds = ", ".join(f"{run['valid@t1.0']:.3f}" for run in runs)
        kls = ", ".join(f"{run['teacher_kl']:.4f}" for run in runs)
        lines.append(f"| {arm} | {' | '.join(cells)} | {seeds} | {kls} |")
    return "\n".join(lines)


def tables(results: list[dict], n: int) -> str:
    seen_once = ", ".join(f"n={n}: {mean(r['estimates']['seen_once'][n] for r in results):.4f}" for n in CONTEXTS)
    parts = [f"Answer tokens whose context is there once: {seen_once}"]
    for split in ("train", "test"):
        parts += [f"Estimates on {split} rows", estimates_table(results, split), sweep_table(results, split)]
    parts += [grid_tables(results, "train", n)]
    if "students" in results[0]:
        parts += ["Students", students_table(results)]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--rows", type=int, default=1000, help="training rows at which estimates are compared")
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--output_dir", default="output/bayeskd_tinyworld")
    arguments = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    sys.path.insert(0, str(WORLD))
    import world

    tokenizer = AutoTokenizer.from_pretrained(WORLD / "student", padding_side="left")
    data, known, truths = {}, {}, {}
    for split, rows in (("train", arguments.rows), ("test", None)):
        teacher_data = Dataset.from_json(str(WORLD / f"teacher_{split}.jsonl"))
        data[split] = tokenize_teacher_data(teacher_data, tokenizer, max_completion_length=32)[0]
        known[split] = exact_distributions(data[split], tokenizer, world)
        compared = data[split] if rows is None else data[split].select(range(rows))
        truth = truths[split] = Truth(compared, known[split][:rows], tokenizer)
        print(
            f"{split}: {len(truth.rows):,} rows, {len(truth.tokens):,} tokens; of the teacher's exact distributions the entropy is "
            f"{truth.entropy:.4f}, the NLL of its answers {truth.nll:.4f}, and {len(truth.ids) / len(truth.tokens):.2f} "
            f"tokens are possible; KL(teacher ‖ teacher) is {truth.kl(truth.probs):.1e}",
            flush=True,
        )
    results, output = [], Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        runs = Seed(arguments, seed, data, truths, known["train"], tokenizer, world.judge)
        started = time.perf_counter()
        results.append({"estimates": runs.estimates()})
        print(f"seed {seed}, estimates, {time.perf_counter() - started:.0f} s")
        print(tables(results[-1:], 3), flush=True)
        results[-1]["students"] = runs.students()
        text = tables(results, 3)
        (output / "tables.md").write_text(text)
        (output / "results.json").write_text(json.dumps(results, indent=1))
    print(text)


if __name__ == "__main__":
    main()
