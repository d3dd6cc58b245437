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

import json
import shutil
import time
from pathlib import Path

import torch
from common.arguments import evidence_parser
from common.seeds import run_seeds
from common.tables import each_of, markdown, mean_of
from common.tinyworld import RECIPES, STUDENT_COLUMNS, WORLD, measured, teacher_rows, tokenized
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bbkd.proxykd.trainer import ProxyKDTrainer
from trl_bbkd.runs.recipe import load_recipe


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


def parse_args(argv=None):
    parser = evidence_parser(__doc__, "output/proxykd_tinyworld", ARMS)
    parser.add_argument("--recipe", default=str(RECIPES / "proxykd.yaml"))
    return parser.parse_args(argv)


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


def run_seed(arguments, seed: int, data: dict, tokenizer) -> dict:
    root, test = Path(arguments.output_dir) / f"seed{seed}", data["test"].to_list()
    results = {"undistilled": measured(AutoModelForCausalLM.from_pretrained(WORLD / "student"), tokenizer, test)}
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
        results[arm] = measured(trainer.model, tokenizer, test) | {"seconds": seconds}
        if source is None and trainer.args.needs_proxy:
            proxy = measured(trainer.proxy_stages.loaded_proxy(), tokenizer, test, temperatures=(1.0,))
            proxies[arm] = {"stages": trainer.stage_reports, **proxy}
        print(f"seed {seed}, {arm}:", json.dumps(results[arm]), flush=True)
    return {"students": results, "proxies": proxies}


def students_table(results: list[dict]) -> str:
    rows = []
    for arm in results[0]["students"]:
        runs = [result["students"][arm] for result in results]
        rows.append(
            [arm, *(mean_of(runs, *column) for column in STUDENT_COLUMNS.values()), each_of(runs, "valid@t1.0")]
        )
    return markdown(["arm", *STUDENT_COLUMNS, "valid, T=1.0, of each seed"], rows)


def proxies_table(results: list[dict]) -> str:
    """Means over the seeds of what was measured of the proxies."""
    rows = []
    for arm in results[0]["proxies"]:
        found = [result["proxies"][arm] for result in results]
        for stages in zip(*(proxy["stages"] for proxy in found), strict=True):
            for entries in zip(*(stage["metrics"] for stage in stages), strict=True):
                if "nll" in entries[0]:
                    about = f"{stages[0]['stage']}, {entries[0]['at']}"
                    rows.append(
                        [arm, about, mean_of(entries, "top1_agreement"), mean_of(entries, "nll", "{:.4f}"), ""]
                    )
        last = mean_of(found, "teacher_nll", "{:.4f}"), mean_of(found, "valid@t1.0")
        rows.append([arm, "as the student saw it", "", *last])
    return markdown(["proxy of", "at", "top-1 agreement", "NLL", "valid, T=1.0"], rows)


def main(argv=None):
    arguments = parse_args(argv)
    disable_progress_bars()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "student", padding_side="left")
    data = {split: tokenized(teacher_rows(split), tokenizer) for split in ("train", "test")}
    run_seeds(
        arguments,
        lambda seed: run_seed(arguments, seed, data, tokenizer),
        lambda results: students_table(results) + "\n\n" + proxies_table(results) + "\n",
    )


if __name__ == "__main__":
    main()
