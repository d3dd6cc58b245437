"""
What each part of GAD is worth in tinyworld: `docs/results/gad.md` is written from this script's table.

    python benchmarks/tinyworld_ablations.py --seeds 0 1 2 --output_dir output/ablations

The world counts to 49 here, by up to 9 at once: in the recipe's, which counts to 9, SeqKD alone becomes nearly perfect
if it may train for long. A student of 7,552 parameters is trained by SeqKD until it gains little more, and its best
checkpoint is kept. Every arm starts there, with a larger discriminator (91,648 parameters) fine-tuned on the same teacher text, and runs the
adversarial stage only. Finished parts are kept in `output_dir` and not run again; `--arms` selects some; `--table` only
prints what is there.
"""

import argparse
import functools
import json
import os
import random
import statistics
import sys
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

TINYWORLD = Path(__file__).parents[1] / "recipes" / "tinyworld"
sys.path.insert(0, str(TINYWORLD))

import build  # noqa: E402
import torch  # noqa: E402
import world  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from trl_bbkd import GADConfig, GADTrainer  # noqa: E402
from trl_bbkd.data.teacher_data import tokenize_teacher_data  # noqa: E402
from trl_bbkd.evaluation.student import evaluate_student  # noqa: E402


world.MAX_COUNT, world.MAX_AMOUNT = 49, 9
STUDENT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
STUDENT_BASE_STEPS = 1000
BASES = {"student": (STUDENT, 8e-3), "discriminator": (build.DISCRIMINATOR, 3e-3)}  # sizes, learning rate
ANSWER_TOKENS = 32
SEQKD_STEPS, SEQKD_LEARNING_RATE = 8000, 1.2e-2
CURVE_POINTS = 8
DISCRIMINATOR_LEARNING_RATE = 3e-3
UNDISTILLED, SEQKD = "undistilled", "SeqKD at convergence"

COMMON = {
    "max_steps": 120,
    "warmup_epochs": 0,
    "discriminator_only_steps": 0,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 256,
    "num_generations": 8,
    "temperature": 1.0,
    "beta": 0.01,
    "scale_rewards": "batch",
    "discriminator_head": "likelihood",
    "discriminator_learning_rate": 1e-5,
    "discriminator_max_grad_norm": 1.0,
    "discriminator_batch_size": 288,
    "max_completion_length": ANSWER_TOKENS,
}
# A scalar head has to learn from pairs: 60 steps in which only the discriminator moves
SCALAR = {"discriminator_head": "scalar", "discriminator_learning_rate": 1e-4}
SCALAR_WARMUP = {
    "max_steps": 180,
    "num_train_epochs": 3,
    "warmup_epochs": 1,
    "warmup_learning_rate": 0.0,
    "discriminator_warmup_learning_rate": 1e-3,
}
ARMS = {
    "GAD (group)": {},
    "GAD (gae)": {"advantage_estimator": "gae", "critic": "copy", "critic_learning_rate": 2e-3},
    "D as small as the student": {"discriminator": "seqkd"},
    "without D warm-up": {"discriminator": "base"},
    "frozen D": {"discriminator_learning_rate": 0.0},
    "scalar head": SCALAR | SCALAR_WARMUP,
    "scalar head, without D warm-up": SCALAR | {"discriminator": "base"},
    "token credit": {"discriminator_credit": "token"},
    "replay": {"discriminator_replay_size": 4096},
    "gate": {"policy_min_accuracy": 0.6, "discriminator_max_accuracy": 0.8},
    "group std, floor": {"scale_rewards": "group", "group_std_floor": 2.0},
    "length control": {"length_control": True},
}
COLUMNS = {
    "valid@t1.0": "valid, T=1.0",
    "valid@t0.7": "T=0.7",
    "valid@greedy": "greedy",
    "distinct_valid@t1.0": "distinct valid",
    "teacher_nll": "teacher NLL",
    "length_ratio@t1.0": "length ratio",
    "accuracy": "D accuracy, last",
    "warnings": "warnings",
}


def config(output_dir: Path, seed: int, **settings) -> GADConfig:
    return GADConfig(
        str(output_dir),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10,
        seed=seed,
        **settings,
    )


class Experiment:
    def __init__(self, output_dir: Path, seed: int, base_steps: int, discriminator_steps: int):
        self.folder, self.seed = output_dir / f"seed{seed}", seed
        self.base_steps = {"student": STUDENT_BASE_STEPS, "discriminator": base_steps}
        self.discriminator_steps = discriminator_steps
        self.bases = {name: output_dir / name for name in BASES}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build.build_tokenizer()
        from datasets import Dataset

        train, test = map(Dataset.from_list, build.teacher_rows())
        tokenize = functools.partial(
            tokenize_teacher_data, tokenizer=self.tokenizer, max_completion_length=ANSWER_TOKENS
        )
        self.train, self.test = tokenize(train)[0], list(tokenize(test)[0])

    def measure(self, model, temperatures=(1.0, 0.7, 0.0), num_samples=8) -> dict[str, float]:
        return evaluate_student(
            model,
            self.tokenizer,
            self.test,
            world.judge,
            max_new_tokens=ANSWER_TOKENS,
            temperatures=temperatures,
            num_samples=num_samples,
            batch_size=512,
        )

    def result(self, name: str, run) -> dict:
        path = self.folder / f"{name}.json"
        if not path.is_file():
            path.write_text(json.dumps(run(), indent=2) + "\n")
            print(f"seed {self.seed}: {name}", json.loads(path.read_text()), flush=True)
        return json.loads(path.read_text())

    def build_base(self, name: str) -> None:
        if not (self.bases[name] / "config.json").is_file():
            sizes, learning_rate = BASES[name]
            steps = self.base_steps[name]
            build.save_model(
                build.train_on_web_text(self.tokenizer, sizes, steps, learning_rate), self.tokenizer, self.bases[name]
            )

    def undistilled(self) -> dict:
        return self.measure(AutoModelForCausalLM.from_pretrained(self.bases["student"]))

    def fine_tune(self, model: Path, name: str, steps: int, learning_rate: float, key: str) -> dict:
        """SFT on the teacher's text, in a plain loop because thousands of steps are needed; the best `key` stays."""
        torch.manual_seed(self.seed)
        student = AutoModelForCausalLM.from_pretrained(model)
        optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
        ramp = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 20, 1.0) * (1 - step / steps)
        )
        batches = self.sft_batches()
        best, curve = None, []
        for step in range(1, steps + 1):
            input_ids, labels = next(batches)
            logits = student(input_ids=input_ids).logits[:, :-1]  # causal: padding on the right changes nothing
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            ramp.step()
            if step % (steps // CURVE_POINTS) == 0:
                curve.append({"step": step} | self.measure(student, temperatures=(1.0,), num_samples=4))
                if best is None or curve[-1][key] > best[key]:
                    best = curve[-1]
                    build.save_model(student, self.tokenizer, self.folder / name)
        kept = AutoModelForCausalLM.from_pretrained(self.folder / name)
        return self.measure(kept) | {"best_step": best["step"], "steps": steps, "curve": curve}

    def sft_batches(self, size: int = 64):
        rows = [(self.tokenizer(row["prompt"])["input_ids"], list(row["teacher_ids"])) for row in self.train]
        rng = random.Random(self.seed)
        while True:
            rng.shuffle(rows)
            for start in range(0, len(rows) - size + 1, size):
                pairs = rows[start : start + size]
                width = max(len(prompt) + len(answer) for prompt, answer in pairs)
                ids = [prompt + answer + [0] * (width - len(prompt) - len(answer)) for prompt, answer in pairs]
                labels = [
                    [-100] * len(prompt) + answer + [-100] * (width - len(prompt) - len(answer))
                    for prompt, answer in pairs
                ]
                yield torch.tensor(ids), torch.tensor(labels)

    def seqkd(self) -> dict:
        return self.fine_tune(self.bases["student"], "seqkd", SEQKD_STEPS, SEQKD_LEARNING_RATE, "valid@t1.0")

    def discriminator(self) -> dict:
        return self.fine_tune(
            self.bases["discriminator"],
            "discriminator",
            self.discriminator_steps,
            DISCRIMINATOR_LEARNING_RATE,
            "step",
        )

    def arm(self, name: str) -> dict:
        settings = COMMON | {"discriminator": "fine-tuned"} | ARMS[name]
        models = {
            "base": self.bases["discriminator"],
            "fine-tuned": self.folder / "discriminator",
            "seqkd": self.folder / "seqkd",
        }
        settings["discriminator"] = str(models[settings["discriminator"]])
        trainer = GADTrainer(
            model=str(self.folder / "seqkd"),
            args=config(self.folder / "runs" / name, self.seed, **settings),
            train_dataset=self.train,
            processing_class=self.tokenizer,
        )
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "discriminator/accuracy" in entry]
        return self.measure(trainer.model) | {
            "accuracy": log[-1]["discriminator/accuracy"],
            "warnings": [vars(warning) for warning in trainer.monitor.warnings],
            "seconds": trainer.state.log_history[-1]["train_runtime"],
            "log": log,
        }

    def run(self, arms: list[str]) -> None:
        for name in BASES:
            self.build_base(name)
        self.result(UNDISTILLED, self.undistilled)
        self.result(SEQKD, self.seqkd)
        self.result("discriminator", self.discriminator)
        for name in arms:
            self.result(name, functools.partial(self.arm, name))


def cell(key: str, results: list[dict]) -> str:
    values = [result[key] for result in results if key in result]
    if not values:
        return "–"
    if key == "warnings":
        kinds = {warning["kind"] for warnings in values for warning in warnings}
        return ", ".join(sorted(kinds)) or "none"
    mean = statistics.mean(values)
    return f"{mean:,.0f}" if key.startswith("distinct") else f"{mean:.3f}"


def print_table(output_dir: Path, seeds: list[int]) -> None:
    print("| arm | " + " | ".join(COLUMNS.values()) + " | valid, T=1.0, of each seed |")
    print("| --- |" + " ---: |" * len(COLUMNS) + " --- |")
    for name in [UNDISTILLED, SEQKD, *ARMS, "discriminator"]:
        paths = [output_dir / f"seed{seed}" / f"{name}.json" for seed in seeds]
        results = [json.loads(path.read_text()) for path in paths if path.is_file()]
        each = ", ".join(f"{result['valid@t1.0']:.3f}" for result in results)
        print(f"| {name} | " + " | ".join(cell(key, results) for key in COLUMNS) + f" | {each} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ablations of GAD in tinyworld.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output_dir", type=Path, default=Path("output/ablations"))
    parser.add_argument("--discriminator_base_steps", type=int, default=600, help="on text of the world, before SFT")
    parser.add_argument("--discriminator_steps", type=int, default=3000, help="of SFT on the teacher's text")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if not arguments.table:
        for seed in arguments.seeds:
            steps = arguments.discriminator_base_steps, arguments.discriminator_steps
            Experiment(arguments.output_dir, seed, *steps).run(arguments.arms)
    print_table(arguments.output_dir, arguments.seeds)


if __name__ == "__main__":
    main()
