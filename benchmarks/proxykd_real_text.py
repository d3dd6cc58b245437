"""
Proxy-KD against SFT on real text: a story model as proxy, GPT-3's answers to word problems as the teacher's text
(`common/word_problems.py` says why these).

For each seed the student is made and pretrained once, and the proxy's stages run once: every arm then trains from this
student for the same number of steps and rows a step, and is measured at its last step on held-out questions.

    undistilled     pretrained only
    seqkd           SFT on all rows: those of the proxy's warm-up and alignment too
    no_proxy        SFT on the student's own rows (kl_weight 0)
    proxykd         Proxy-KD: the student's own rows, and the aligned proxy's distributions over them
    no_alignment    the same with the proxy as it came
    no_dpo          the same with a proxy aligned by NLL alone (preference_weight 0)
    no_weights      the same as proxykd, all rows weighing alike (sample_weighting "none")
    proxykd_all     the aligned proxy's distributions over all rows, its own training rows too
    kl_1, kl_100    proxykd with another kl_weight
    bucket          proxykd with what the likeliest tokens leave over kept as one bucket (target_tail "bucket")
    kl_1_bucket_all both, over all rows

    python benchmarks/proxykd_real_text.py --proxy stories15M --data gsm8k_gpt3_solutions.jsonl \\
        --pretraining_data stories15M_generations.jsonl
"""

import time
from pathlib import Path

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

from trl_bbkd.proxykd.config import ProxyKDConfig
from trl_bbkd.proxykd.trainer import ProxyKDTrainer
from trl_bbkd.seqkd.trainer import curve


# The proxy whose targets an arm learns from (`None`: no proxy), and what the arm changes
ARMS = {
    "seqkd": (None, {"kl_weight": 0.0, "distil_on_all_rows": True}),
    "no_proxy": (None, {"kl_weight": 0.0}),
    "proxykd": ("aligned", {}),
    "no_alignment": ("raw", {}),
    "no_dpo": ("no_dpo", {}),
    "no_weights": ("aligned", {"sample_weighting": "none"}),
    "proxykd_all": ("aligned_all", {"distil_on_all_rows": True}),
    "kl_1": ("aligned", {"kl_weight": 1.0}),
    "kl_100": ("aligned", {"kl_weight": 100.0}),
    "bucket": ("aligned", {"target_tail": "bucket"}),
    "kl_1_bucket_all": ("aligned_all", {"distil_on_all_rows": True, "kl_weight": 1.0, "target_tail": "bucket"}),
}
LOGGED = ("step", "round", "loss", "rewards/margins", "rewards/accuracies")


def parse_args(argv=None):
    return word_problems_parser(__doc__, "output/proxykd_real_text", ARMS).parse_args(argv)


class Runs(WordProblemRuns):
    """
    The proxy's stages and distillation are separate runs, so that arms share a proxy: `ProxyKDTrainer.train` gives the
    student the same run whichever stages went before it.
    """

    def run(self) -> dict:
        for arm in ["undistilled", *self.args.arms]:
            if arm in self.results["arms"]:
                continue
            start = time.perf_counter()
            points, rows = ([], 0) if arm == "undistilled" else self.trained(arm)
            folder = self.student() if arm == "undistilled" else self.root / arm
            student = AutoModelForCausalLM.from_pretrained(folder)
            metrics = measure(student, self.data.scored[self.args.report_on])
            about = {"rows": rows, "parameters": student.num_parameters(), "seconds": time.perf_counter() - start}
            self.keep("arms", arm, {**metrics, **about, "curve": points})
        return self.results

    def trained(self, arm: str) -> tuple[list[dict], int]:
        proxy, settings = ARMS[arm]
        if proxy is None:
            settings = {**settings, "learning_rate": self.args.learning_rate}
        else:
            settings = {**settings, "target_store": str(self.targets(proxy))}
        trainer = self.trainer(self.root / arm, ["distil"], None, settings, callbacks=[self.callback()])
        trainer.train()
        trainer.save_model(str(self.root / arm))
        return curve(trainer.state.log_history), len(trainer.train_dataset)

    def targets(self, name: str) -> Path:
        """The soft targets of a proxy, which is trained first."""
        if name == "raw":
            self.stages(name, ["cache"], self.args.proxy)
        elif name == "aligned_all":
            self.targets("aligned")
            self.stages(name, ["cache"], str(self.root / "aligned/proxy/align"), {"distil_on_all_rows": True})
        else:
            self.stages("warmed", ["warmup"], self.args.proxy)
            settings = {"preference_weight": 0.0} if name == "no_dpo" else {}
            self.stages(name, ["align", "cache"], str(self.root / "warmed/proxy/warmup"), settings)
        return self.root / name / "proxy/targets"

    def stages(self, name: str, stages: list[str], proxy: str, settings: dict | None = None) -> None:
        if name in self.results["proxies"]:
            return
        start = time.perf_counter()
        trainer = self.trainer(self.root / name, stages, proxy, settings or {})
        trainer.train()
        seconds = time.perf_counter() - start
        rounds = [
            {"stage": report["stage"], **entry}
            for report in trainer.proxy_stages.reports
            for entry in report["metrics"]
            if "nll" in entry
        ]
        lines = [line for line in trainer.proxy_stages.log_history if "loss" in line]
        log = [{key: line[key] for key in LOGGED if key in line} for line in lines]
        self.keep("proxies", name, {"rounds": rounds, "seconds": seconds, "log": log})

    def trainer(self, folder: Path, stages, proxy, settings: dict, callbacks=None) -> ProxyKDTrainer:
        return ProxyKDTrainer(
            model=str(self.student()),
            proxy_model=proxy,
            args=config(self.args, self.seed, folder, stages, **settings),
            train_dataset=self.data.train,
            eval_dataset=self.data.held_out[self.args.report_on],
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )


def config(args, seed: int, folder: Path, stages: list[str], **settings) -> ProxyKDConfig:
    shared = ("warmup_share", "alignment_share", "kl_weight", "target_tail", "alignment_learning_rate")
    return ProxyKDConfig(
        **{
            "stages": stages,
            "alignment_rounds": args.alignment_rounds,
            **{name: getattr(args, name) for name in shared},
            **student_arguments(args, seed, folder, learning_rate=args.kd_learning_rate),
            **settings,
        }
    )


def tables(args, results: list[dict]) -> str:
    """Mean over seeds, with each seed's value."""
    rows = []
    for arm in ["undistilled", *args.arms]:
        runs = [result["arms"][arm] for result in results]
        learned = f"{runs[0]['rows']:,}" if runs[0]["rows"] else "–"
        rows.append([arm, learned, *means(runs, "nll", "top1_agreement"), best_on_validation(runs)])
    students = markdown(["arm", "rows", "teacher NLL", "token accuracy", "best NLL on validation, at step"], rows)
    rows = []
    for name in ("warmed", "aligned", "no_dpo"):
        proxies = [result["proxies"][name]["rounds"] for result in results if name in result["proxies"]]
        for entries in zip(*proxies, strict=True):
            about = f"{name}, {entries[0]['stage']}, {entries[0]['at']}"
            rows.append([about, *means(entries, "top1_agreement", "nll")])
    return students + "\n\n" + markdown(["proxy", "top-1 agreement", "teacher NLL"], rows) + "\n"


def main(argv=None):
    args = parse_args(argv)
    data, tokenizer = load(args)
    run_seeds(
        args,
        lambda seed: Runs(args, seed, data, tokenizer, "proxies", "arms").run(),
        lambda results: tables(args, results),
    )


if __name__ == "__main__":
    main()
