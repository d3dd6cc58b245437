"""
Bayes-KD against SFT on real text: the rows, the proxy and the student of benchmarks/proxykd_real_text.py.

All training rows warm the proxy up, are counted, and teach every student. For each seed the student is pretrained once,
the proxy is warmed up once, and a target that several arms learn from is estimated once; every arm then trains from this
student for the same number of steps and rows a step, and is measured at its last step on held-out questions.

    python benchmarks/bayeskd_real_text.py --proxy stories15M --data gsm8k_gpt3_solutions.jsonl \\
        --pretraining_data stories15M_generations.jsonl

Options beside `--arms` and `--output_dir` are those of proxykd_real_text.py; those that are about Proxy-KD's alignment
and its KL do nothing here.
"""

import statistics
import time
from pathlib import Path

from common.bayeskd import PAPER
from common.seeds import run_seeds
from common.tables import markdown
from common.word_problems import (
    WordProblemRuns,
    best_on_validation,
    load,
    means,
    measure,
    student_arguments,
    word_problems_parser,
)
from transformers import AutoModelForCausalLM

from trl_bbkd.bayeskd.config import BayesKDConfig
from trl_bbkd.bayeskd.trainer import BayesKDTrainer
from trl_bbkd.seqkd.trainer import curve


# What is estimated, where it differs
ESTIMATES = {
    "paper": {},
    "expected": {"posterior_sampling": "expected"},
    "trusting": {"posterior_concentration": 1.0, "posterior_draws": 50},
    "trusting_expected": {"posterior_concentration": 1.0, "posterior_draws": 50, "posterior_sampling": "expected"},
    "proxy": {"posterior_concentration": 0.0, "posterior_sampling": "expected"},
    "draws": {"posterior_concentration": 0.0},
    "proxy_wide": {"posterior_concentration": 0.0, "posterior_sampling": "expected", "target_top_k": 128},
    "gamma30": {"prior_gamma": 30.0},
    "n1": {"ngram_context_length": 1},
    "min_count": {"ngram_min_count": 5},
    "gamma1": {"prior_gamma": 1.0},
}
# The estimate an arm learns from (`None`: none), and the weights of its loss
ARMS = {
    "hard": (None, {"prior_weight": 0.0, "posterior_weight": 0.0}),
    "hard + prior": ("paper", {"posterior_weight": 0.0}),
    "hard + posterior": ("paper", {"prior_weight": 0.0}),
    "hard + prior + posterior": ("paper", {}),
    "h+post, expected": ("expected", {"prior_weight": 0.0}),
    "h+post, κ=1, K=50": ("trusting", {"prior_weight": 0.0}),
    "h+post, κ=1, K=50, expected": ("trusting_expected", {"prior_weight": 0.0}),
    "h+prior+post, κ=1, K=50, expected": ("trusting_expected", {}),
    "h+post, κ=0, expected (proxy)": ("proxy", {"prior_weight": 0.0}),
    "h+post, κ=0 (proxy's draws)": ("draws", {"prior_weight": 0.0}),
    "h+post, κ=0, expected, 128 tokens": ("proxy_wide", {"prior_weight": 0.0, "target_top_k": 128}),
    "h+post, γ=30": ("gamma30", {"prior_weight": 0.0}),
    "h+post, κ=0, expected, bucket": ("proxy", {"prior_weight": 0.0, "target_tail": "bucket"}),
    "h+post, β=3": ("paper", {"prior_weight": 0.0, "posterior_weight": 3.0}),
    "h+prior+post, n=1": ("n1", {}),
    "h+prior+post, min_count=5": ("min_count", {}),
    "h+post, min_count=5": ("min_count", {"prior_weight": 0.0}),
    "h+post, γ=1": ("gamma1", {"prior_weight": 0.0}),
}
CALIBRATED = ("paper", "n1", "min_count")  # of different counts
NLLS = ("prior", "proxy", "posterior", "posterior_drawn")


def parse_args(argv=None):
    return word_problems_parser(__doc__, "output/bayeskd_real_text", ARMS).parse_args(argv)


class Runs(WordProblemRuns):
    """The proxy is warmed up once, and a target that several arms learn from is estimated once."""

    def run(self) -> dict:
        for arm in ["undistilled", *self.args.arms]:
            if arm in self.results["arms"]:
                continue
            start = time.perf_counter()
            folder, points = (self.student(), []) if arm == "undistilled" else self.trained(arm)
            metrics = measure(AutoModelForCausalLM.from_pretrained(folder), self.data.scored[self.args.report_on])
            self.keep("arms", arm, {**metrics, "seconds": time.perf_counter() - start, "curve": points})
        return self.results

    def trained(self, arm: str) -> tuple[Path, list[dict]]:
        estimate, settings = ARMS[arm]
        folder = self.root / "arms" / arm.replace(" ", "-")
        if estimate is not None:
            settings = {**ESTIMATES[estimate], **settings, "target_store": str(self.targets(estimate))}
        trainer = self.trainer(folder, ["distil"], None, settings, [self.callback()])
        trainer.train()
        trainer.save_model(str(folder))
        return folder, curve(trainer.state.log_history)

    def targets(self, name: str) -> Path:
        """An estimate of the teacher's distributions, made if it is not there."""
        folder = self.root / "estimates" / name
        if name not in self.results["estimates"]:
            proxy = self.warmed_up()
            start = time.perf_counter()
            # Without held-out rows there is no calibration, which is the same for all that have the same counts
            trainer = self.trainer(folder, ["estimate"], proxy, ESTIMATES[name], held_out=name in CALIBRATED)
            trainer.train()
            (report,) = trainer.stage_reports
            found = {"calibration": trainer.calibration, **report["metrics"][0]}
            self.keep("estimates", name, found | {"seconds": time.perf_counter() - start})
        return folder / "proxy" / "targets"

    def warmed_up(self) -> str:
        folder = self.root / "warmed"
        if "warmed" not in self.results["proxies"]:
            start = time.perf_counter()
            trainer = self.trainer(folder, ["warmup"], self.args.proxy, {})
            trainer.train()
            (report,) = trainer.stage_reports
            seconds = time.perf_counter() - start
            self.keep("proxies", "warmed", {"metrics": report["metrics"], "seconds": seconds})
        return str(folder / "proxy" / "warmup")

    def trainer(self, folder: Path, stages: list[str], proxy, settings: dict, callbacks=None, held_out=True):
        args = self.args
        configuration = BayesKDConfig(
            **{
                "stages": stages,
                **student_arguments(args, self.seed, folder, learning_rate=args.learning_rate),
                **PAPER,
                "target_top_k": 16,
                **settings,
            }
        )
        return BayesKDTrainer(
            model=str(self.student()),
            proxy_model=proxy,
            args=configuration,
            train_dataset=self.data.train,
            eval_dataset=self.data.held_out[args.report_on] if held_out else None,
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )


def tables(args, results: list[dict]) -> str:
    """Means over the seeds, with each seed's value."""
    rows = []
    for arm in ["undistilled", *args.arms]:
        runs = [result["arms"][arm] for result in results]
        rows.append([arm, *means(runs, "nll", "top1_agreement"), best_on_validation(runs)])
    parts = [markdown(["arm", "teacher NLL", "token accuracy", "best NLL on validation, at step"], rows)]

    proxies = [result["proxies"]["warmed"]["metrics"] for result in results if "warmed" in result["proxies"]]
    rows = [
        [f"{entries[0]['at']} warm-up", *means(entries, "top1_agreement", "nll")]
        for entries in zip(*proxies, strict=True)
    ]
    parts.append(markdown(["proxy", "top-1 agreement", "teacher NLL"], rows))

    names = [name for name in CALIBRATED if all(name in result["estimates"] for result in results)]
    calibrations = {name: [result["estimates"][name]["calibration"] for result in results] for name in names}
    rows = [
        [name, *means(found, *NLLS), f"{results[0]['estimates'][name]['contexts_seen_once']:.3f}"]
        for name, found in calibrations.items()
    ]
    parts.append(
        "Held-out NLL of the estimates, with γ=1; contexts: share of answer tokens whose context is there once"
    )
    parts.append(markdown(["estimate", "prior", "proxy", "posterior", "posterior, drawn", "contexts"], rows))
    for name, found in calibrations.items():
        parts += [
            f"Held-out NLL of the posterior, {name}: drawn (expected)",
            grid([entry["table"] for entry in found]),
        ]
    return "\n\n".join(parts) + "\n"


def grid(tables: list[list[dict]]) -> str:
    """Means over the seeds by K and κ."""
    cells = {
        (entries[0]["draws"], entries[0]["concentration"]): [
            statistics.mean(entry[key] for entry in entries) for key in ("drawn", "expected")
        ]
        for entries in zip(*tables, strict=True)
    }
    counts, kappas = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    rows = [[count, *("{:.3f} ({:.3f})".format(*cells[count, kappa]) for kappa in kappas)] for count in counts]
    return markdown(["K", *(f"κ={kappa:g}" for kappa in kappas)], rows)


def main(argv=None):
    args = parse_args(argv)
    data, tokenizer = load(args)
    run_seeds(
        args,
        lambda seed: Runs(args, seed, data, tokenizer, "proxies", "estimates", "arms").run(),
        lambda results: tables(args, results),
    )


if __name__ == "__main__":
    main()
