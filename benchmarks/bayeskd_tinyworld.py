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

import json
import shutil
import time
from itertools import product
from pathlib import Path
from statistics import fmean as mean

import numpy as np
import torch
from bayeskd_estimates import (
    COUNTS,
    GAMMAS,
    PROXIES,
    Evidence,
    N,
    Truth,
    check_against_estimator,
    estimates_table,
    exact_distributions,
    grid_table,
    sweep_table,
)
from common.arguments import evidence_parser
from common.bayeskd import PAPER
from common.seeds import run_seeds
from common.tables import each_of, markdown, mean_of
from common.tinyworld import RECIPES, STUDENT_COLUMNS, WORLD, measured, teacher_rows, tokenized
from datasets import Dataset, disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_bbkd.bayeskd.ngram import build_ngram_model
from trl_bbkd.bayeskd.top_logprobs import TOP_LOGPROBS
from trl_bbkd.bayeskd.trainer import BayesKDTrainer
from trl_bbkd.evaluation.student import pad_rows
from trl_bbkd.runs.recipe import load_recipe


RECIPE = RECIPES / "bayeskd.yaml"
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
COLUMNS = STUDENT_COLUMNS | {"KL(teacher ‖ student)": ("teacher_kl", "{:.4f}")}
PER_SEED = (("valid@t1.0", "{:.3f}"), ("teacher_kl", "{:.4f}"))


def parse_args(argv=None):
    parser = evidence_parser(__doc__, "output/bayeskd_tinyworld", ARMS)
    parser.add_argument("--rows", type=int, default=1000, help="training rows at which estimates are compared")
    parser.add_argument("--train_rows", type=int, help="of the teacher's 4,000 answers; by default all")
    return parser.parse_args(argv)


@torch.no_grad()
def student_kl(model, truth: Truth, pad_id: int) -> float:
    """KL(teacher ‖ student) per token."""
    ids, mask = pad_rows([row["input_ids"] for row in truth.rows], pad_id, model.device, side="right")
    labels, _ = pad_rows([row["labels"] for row in truth.rows], -100, model.device, side="right")
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits[:, :-1][labels[:, 1:] != -100]
    return truth.kl(truth.at(logits.double().softmax(1)))


class Seed:
    """One seed's runs, below one folder."""

    def __init__(self, arguments, seed: int, data: dict, truths: dict, known: list, tokenizer):
        self.arguments, self.seed, self.data, self.truths, self.known = arguments, seed, data, truths, known
        self.tokenizer = tokenizer
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
            metrics = measured(model, self.tokenizer, self.data["test"].to_list())
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


def students_table(results: list[dict]) -> str:
    rows = []
    for arm in results[0]["students"]:
        runs = [result["students"][arm] for result in results]
        targets = [result["estimates"]["arms"][arm] for result in results] if arm in ARMS else []
        cells = [mean_of(runs, *column) for column in COLUMNS.values()]
        seeds = [each_of(runs, *column) for column in PER_SEED]
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
    parts += ["Students", students_table(results)]
    return "\n\n".join(parts) + "\n"


def main(argv=None):
    arguments = parse_args(argv)
    disable_progress_bars()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "student", padding_side="left")
    data, known, truths = {}, {}, {}
    for split, most, rows in (("train", arguments.train_rows, arguments.rows), ("test", None, None)):
        data[split] = tokenized(Dataset.from_dict(teacher_rows(split)[:most]), tokenizer)
        known[split] = exact_distributions(data[split], tokenizer)
        truth = truths[split] = Truth(Dataset.from_dict(data[split][:rows]), known[split][:rows], tokenizer)
        print(f"{split}: {truth}", flush=True)

    def run(seed: int) -> dict:
        runs = Seed(arguments, seed, data, truths, known["train"], tokenizer)
        return {"estimates": runs.estimates(), "students": runs.students()}

    run_seeds(arguments, run, tables)


if __name__ == "__main__":
    main()
