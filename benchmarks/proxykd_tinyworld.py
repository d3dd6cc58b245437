"""
Proxy-KD in tinyworld against SFT at equal student steps: what each part is worth.

    python benchmarks/proxykd_tinyworld.py --seeds 0 1 2 --output_dir output/proxykd_tinyworld

Settings are those of recipes/proxykd.yaml; an arm changes what its name says. Arms of a seed share the proxy where its
stages are the same. Every student is measured at its last step, on the held-out prompts, by the world's exact judge.

    SeqKD           SFT on all rows, those of the proxy's stages too
    no proxy        SFT on the student's own rows
    Proxy-KD        the student's own rows, and the aligned proxy's distributions over them
    no alignment    the same, with the proxy as it came
    no DPO          the same, with a proxy aligned by NLL alone
    no weights      the same as Proxy-KD, all rows weighing alike

and Proxy-KD with another `kl_weight`, with equation 9 from whole answers, with the tail as a bucket, with a live
proxy, and with all rows.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.evaluation.student import evaluate_student
from trl_bbkd.proxykd.trainer import ProxyKDTrainer
from trl_bbkd.runs.recipe import load_recipe


RECIPE = Path(__file__).parents[1] / "recipes" / "proxykd.yaml"
WORLD = RECIPE.parent / "tinyworld"
SAMPLES = 8
# Whose proxy an arm takes over (`None`: its own, or none at all), and what it changes
ARMS = {
    "SeqKD": (None, {"kl_weight": 0.0, "distil_on_all_rows": True}),
    "no proxy": (None, {"kl_weight": 0.0}),
    "Proxy-KD": (None, {}),
    "no alignment": (None, {"stages": ["cache", "distil"]}),
    "no DPO": (None, {"preference_weight": 0.0}),
    "no weights": ("Proxy-KD", {"sample_weighting": "none"}),
    "kl_weight 1": ("Proxy-KD", {"kl_weight": 1.0}),
    "kl_weight 100": ("Proxy-KD", {"kl_weight": 100.0}),
    "weights by sum": ("Proxy-KD", {"sample_weighting": "sum"}),
    "bucket": ("Proxy-KD", {"target_tail": "bucket"}),
    "live proxy": ("Proxy-KD", {"target_source": "live"}),
    "all rows": ("Proxy-KD", {"distil_on_all_rows": True}),
}
COLUMNS = {
    "valid, T=1.0": ("valid@t1.0", "{:.3f}"),
    "T=0.7": ("valid@t0.7", "{:.3f}"),
    "greedy": ("valid@greedy", "{:.3f}"),
    "distinct valid": ("distinct_valid@t1.0", "{:,.0f}"),
    "teacher NLL": ("teacher_nll", "{:.4f}"),
}


def train(recipe, folder: Path, seed: int, changes: dict, data: dict, tokenizer) -> ProxyKDTrainer:
    overrides = [f"--{name}={value}" for name, value in changes.items() if name != "stages"]
    overrides += ["--output_dir", str(folder), "--seed", str(seed), "--disable_tqdm", "true"]
    overrides += ["--stages", *changes["stages"]] if "stages" in changes else []
    args = load_recipe(recipe, overrides).training_args
    trainer = ProxyKDTrainer(
        str(WORLD / "student"),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def run_seed(arguments, seed: int, data: dict, tokenizer, judge) -> dict:
    def measured(model, **settings) -> dict[str, float]:
        rows = data["test"].to_list()
        defaults = {"max_new_tokens": 32, "num_samples": SAMPLES, "batch_size": 512}
        return evaluate_student(model, tokenizer, rows, judge, **defaults, **settings)

    root = Path(arguments.output_dir) / f"seed{seed}"
    results = {"undistilled": measured(AutoModelForCausalLM.from_pretrained(WORLD / "student"))}
    proxies = {}
    for arm in arguments.arms:
        source, changes = ARMS[arm]
        folder = root / arm.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        if source is not None:
            for stage in ("warmup", "align"):
                shutil.copytree(root / source / "proxy" / stage, folder / "proxy" / stage)
        started = time.perf_counter()
        trainer = train(arguments.recipe, folder, seed, changes, data, tokenizer)
        seconds = time.perf_counter() - started
        results[arm] = measured(trainer.model) | {"seconds": seconds}
        if source is None and trainer.args.needs_proxy:
            proxy = measured(trainer.proxy_stages.loaded_proxy(), temperatures=(1.0,))
            proxies[arm] = {"stages": trainer.stage_reports, **proxy}
        print(f"seed {seed}, {arm}:", json.dumps(results[arm]), flush=True)
    return {"students": results, "proxies": proxies}


def students_table(results: list[dict]) -> str:
    lines = [
        f"| arm | {' | '.join(COLUMNS)} | valid, T=1.0, of each seed |",
        "| --- |" + " ---: |" * len(COLUMNS) + " --- |",
    ]
    for arm in results[0]["students"]:
        runs = [result["students"][arm] for result in results]
        cells = [form.format(statistics.mean(run[name] for run in runs)) for name, form in COLUMNS.values()]
        seeds = ", ".join(f"{run['valid@t1.0']:.3f}" for run in runs)
        lines.append(f"| {arm} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def proxies_table(results: list[dict]) -> str:
    """Means over the seeds of what was measured of the proxies."""
    lines = ["| proxy of | at | top-1 agreement | NLL | valid, T=1.0 |", "| --- | --- | ---: | ---: | ---: |"]
    for arm in results[0]["proxies"]:
        reports = [result["proxies"][arm]["stages"] for result in results]
        for stages in zip(*reports, strict=True):
            for entries in zip(*(stage["metrics"] for stage in stages), strict=True):
                if "nll" in entries[0]:
                    means = [statistics.mean(entry[name] for entry in entries) for name in ("top1_agreement", "nll")]
                    lines.append(
                        f"| {arm} | {stages[0]['stage']}, {entries[0]['at']} | {means[0]:.3f} | {means[1]:.4f} | |"
                    )
        valid = statistics.mean(result["proxies"][arm]["valid@t1.0"] for result in results)
        nll = statistics.mean(result["proxies"][arm]["teacher_nll"] for result in results)
        lines.append(f"| {arm} | as the student saw it | | {nll:.4f} | {valid:.3f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--output_dir", default="output/proxykd_tinyworld")
    arguments = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    sys.path.insert(0, str(WORLD))
    import world

    tokenizer = AutoTokenizer.from_pretrained(WORLD / "student", padding_side="left")
    files = {split: str(WORLD / f"teacher_{split}.jsonl") for split in ("train", "test")}
    data = {
        split: tokenize_teacher_data(Dataset.from_json(file), tokenizer, max_completion_length=32)[0]
        for split, file in files.items()
    }
    results = []
    for seed in arguments.seeds:
        results.append(run_seed(arguments, seed, data, tokenizer, world.judge))
        tables = students_table(results) + "\n\n" + proxies_table(results) + "\n"
        (Path(arguments.output_dir) / "tables.md").write_text(tables)
        (Path(arguments.output_dir) / "results.json").write_text(json.dumps(results, indent=1))
    print(tables)


if __name__ == "__main__":
    main()
