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

import argparse
import json
import logging
import statistics
import time
from pathlib import Path

import proxykd_real_text as shared
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bbkd.bayeskd.config import BayesKDConfig
from trl_bbkd.bayeskd.trainer import BayesKDTrainer
from trl_bbkd.seqkd.trainer import CurveCallback, curve


# Stated here so that it stays when BayesKDConfig's defaults do not
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
    "target_top_k": 16,
}
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="output/bayeskd_real_text")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    own, others = parser.parse_known_args(argv)
    args = shared.parse_args(others)
    args.output_dir, args.arms = own.output_dir, own.arms
    return args


class Seed:
    """One seed's runs, all below one folder; what is finished there is not run again."""

    def __init__(self, args, seed: int, data: shared.Data, tokenizer):
        self.args, self.seed, self.data, self.tokenizer = args, seed, data, tokenizer
        self.root = Path(args.output_dir) / f"seed_{seed}"
        self.path = self.root / "results.json"
        empty = {"proxy": {}, "estimates": {}, "arms": {}}
        self.results = json.loads(self.path.read_text()) if self.path.is_file() else empty

    def run(self) -> dict:
        for arm in ["undistilled", *self.args.arms]:
            if arm in self.results["arms"]:
                continue
            points = []
            start = time.perf_counter()
            folder = self.student()
            if arm != "undistilled":
                folder, points = self.trained(arm)
            metrics = shared.measure(
                AutoModelForCausalLM.from_pretrained(folder), self.data.scored[self.args.report_on]
            )
            self.results["arms"][arm] = {**metrics, "seconds": time.perf_counter() - start, "curve": points}
            self.save()
            print(f"seed {self.seed}, {arm}:", json.dumps(self.results["arms"][arm]), flush=True)
        return self.results

    def trained(self, arm: str) -> tuple[Path, list[dict]]:
        estimate, settings = ARMS[arm]
        folder = self.root / "arms" / arm.replace(" ", "-")
        if estimate is not None:
            settings = {**ESTIMATES[estimate], **settings, "target_store": str(self.targets(estimate))}
        validation = self.data.scored["validation"]
        callback = CurveCallback(lambda model: shared.measure(model, validation), points=self.args.curve_points)
        trainer = self.trainer(folder, ["distil"], None, settings, [callback])
        trainer.train()
        trainer.save_model(str(folder))
        return folder, curve(trainer.state.log_history)

    def student(self) -> Path:
        folder = self.root / "student"
        if not (folder / "model.safetensors").is_file():
            shared.pretrain_student(self.args, self.seed, self.data, self.tokenizer, folder)
        return folder

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
            self.results["estimates"][name] = found | {"seconds": time.perf_counter() - start}
            self.save()
            print(f"seed {self.seed}, estimate {name}:", json.dumps(self.results["estimates"][name]), flush=True)
        return folder / "proxy" / "targets"

    def warmed_up(self) -> str:
        folder = self.root / "warmed"
        if not self.results["proxy"]:
            start = time.perf_counter()
            trainer = self.trainer(folder, ["warmup"], self.args.proxy, {})
            trainer.train()
            (report,) = trainer.stage_reports
            self.results["proxy"] = {"metrics": report["metrics"], "seconds": time.perf_counter() - start}
            self.save()
            print(f"seed {self.seed}, proxy:", json.dumps(self.results["proxy"]), flush=True)
        return str(folder / "proxy" / "warmup")

    def trainer(self, folder: Path, stages: list[str], proxy, settings: dict, callbacks=None, held_out=True):
        args = self.args
        configuration = BayesKDConfig(
            **{
                "output_dir": str(folder),
                "stages": stages,
                "max_completion_length": args.max_completion_length,
                "max_steps": args.student_steps,
                "learning_rate": args.learning_rate,
                "lr_scheduler_type": "linear",
                "per_device_train_batch_size": args.student_batch_size,
                "per_device_eval_batch_size": 32,
                "proxy_per_device_train_batch_size": args.proxy_batch_size,
                "proxy_learning_rate": args.proxy_learning_rate,
                "proxy_warmup_epochs": args.proxy_warmup_epochs,
                **shared.common_arguments(self.seed),
                **PAPER,
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

    def save(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")


def tables(args, results: list[dict]) -> str:
    """Means over the seeds, with each seed's value."""
    lines = ["| arm | teacher NLL | token accuracy | best NLL on validation, at step |", "|---|---|---|---|"]
    for arm in ["undistilled", *args.arms]:
        runs = [result["arms"][arm] for result in results]
        best = [min(run["curve"], key=lambda point: point["nll"]) for run in runs if run["curve"]]
        cells = [shared.mean_and_seeds([run[name] for run in runs]) for name in ("nll", "top1_agreement")]
        cells.append(", ".join(f"{point['nll']:.3f} at {point['step']}" for point in best) or "–")
        lines.append(f"| {arm} | {' | '.join(cells)} |")

    lines += ["", "| proxy | top-1 agreement | teacher NLL |", "|---|---|---|"]
    for entries in zip(*(result["proxy"].get("metrics", []) for result in results), strict=True):
        cells = [shared.mean_and_seeds([entry[name] for entry in entries]) for name in ("top1_agreement", "nll")]
        lines.append(f"| {entries[0]['at']} warm-up | {' | '.join(cells)} |")

    names = [name for name in CALIBRATED if all(name in result["estimates"] for result in results)]
    lines += [
        "",
        "Held-out NLL of the estimates, with γ=1; contexts: share of answer tokens whose context is there once",
        "",
    ]
    lines += ["| estimate | prior | proxy | posterior | posterior, drawn | contexts |", "|---|---|---|---|---|---|"]
    for name in names:
        found = [result["estimates"][name] for result in results]
        cells = [shared.mean_and_seeds([entry["calibration"][key] for entry in found]) for key in NLLS]
        lines.append(f"| {name} | {' | '.join(cells)} | {found[0]['contexts_seen_once']:.3f} |")
    for name in names:
        grids = [result["estimates"][name]["calibration"]["table"] for result in results]
        cells = {
            (entries[0]["draws"], entries[0]["concentration"]): [
                statistics.mean(entry[key] for entry in entries) for key in ("drawn", "expected")
            ]
            for entries in zip(*grids, strict=True)
        }
        kappas, counts = (list(dict.fromkeys(key[i] for key in cells)) for i in (1, 0))
        lines += ["", f"Held-out NLL of the posterior, {name}: drawn (expected)", ""]
        lines += [f"| K | {' | '.join(f'κ={kappa:g}' for kappa in kappas)} |", "|---|" + "---|" * len(kappas)]
        for count in counts:
            row = [cells[count, kappa] for kappa in kappas]
            lines.append(f"| {count} | {' | '.join(f'{drawn:.3f} ({expected:.3f})' for drawn, expected in row)} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    tokenizer = AutoTokenizer.from_pretrained(args.proxy, padding_side="left")
    data = shared.Data(args, tokenizer)
    sizes = {"train": len(data.train), "pretraining": len(data.pretraining)}
    print(sizes | {name: len(rows) for name, rows in data.held_out.items()}, flush=True)
    results = []
    for seed in args.seeds:
        results.append(Seed(args, seed, data, tokenizer).run())
        text = tables(args, results)
        print(text, flush=True)
        (Path(args.output_dir) / "tables.md").write_text(text)
        (Path(args.output_dir) / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
