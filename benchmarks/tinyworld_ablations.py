"""
What each part of GAD is worth in tinyworld: `docs/results/gad.md` is written from this script's table.

    python benchmarks/tinyworld_ablations.py --seeds 0 1 2 --output_dir output/ablations

The world counts to 49 here, by up to 9 at once: in the recipe's, which counts to 9, SeqKD alone becomes nearly perfect
if it may train for long. A student of 7,552 parameters is trained by SeqKD until it gains little more, and its best
checkpoint is kept. Every arm starts there, with a larger discriminator (91,648 parameters) fine-tuned on the same teacher text, and runs the
adversarial stage only. Finished parts are kept in `output_dir` and not run again; `--arms` selects some; `--table` only
prints what is there.
"""

import functools
import json
import random
from pathlib import Path

import torch
from common.arguments import evidence_arguments, evidence_parser
from common.tables import each_of, markdown, mean_of
from common.tinyworld import ANSWER_TOKENS, STUDENT_COLUMNS, build, measured, tokenized, world
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_bbkd import GADConfig, GADTrainer


STUDENT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
STUDENT_BASE_STEPS = 1000
BASES = {"student": (STUDENT, 8e-3), "discriminator": (build.DISCRIMINATOR, 3e-3)}  # sizes, learning rate
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
    "sft_weight": 0.0,
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
    # Warm-up throughout: cross-entropy, for as many steps
    "SFT alone": {"warmup_epochs": 1, "num_train_epochs": 1, "discriminator_updates_per_batch": 0},
    "anchor 0.03": {"sft_weight": 0.03},
    "anchor 0.1": {"sft_weight": 0.1},
    "anchor 0.3": {"sft_weight": 0.3},
    "anchor 1": {"sft_weight": 1.0},
    "anchor 0.1, frozen D": {"sft_weight": 0.1, "discriminator_learning_rate": 0.0},
    "entropy 0.3": {"discriminator_entropy": 0.3},
    "entropy 1": {"discriminator_entropy": 1.0},
}
COLUMNS = STUDENT_COLUMNS | {
    "teacher NLL": ("teacher_nll", "{:.3f}"),
    "length ratio": ("length_ratio@t1.0", "{:.3f}"),
    "D accuracy, last": ("accuracy", "{:.3f}"),
}


def parse_args(argv=None):
    parser = evidence_parser(__doc__, "output/ablations", ARMS)
    parser.add_argument("--discriminator_base_steps", type=int, default=600, help="on text of the world, before SFT")
    parser.add_argument("--discriminator_steps", type=int, default=3000, help="of SFT on the teacher's text")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run")
    return parser.parse_args(argv)


def config(output_dir: Path, seed: int, **settings) -> GADConfig:
    return GADConfig(str(output_dir), **evidence_arguments(seed) | {"use_cpu": True} | settings)


class Experiment:
    def __init__(self, output_dir: Path, seed: int, base_steps: int, discriminator_steps: int):
        world.MAX_COUNT, world.MAX_AMOUNT = 49, 9
        self.folder, self.seed = output_dir / f"seed{seed}", seed
        self.base_steps = {"student": STUDENT_BASE_STEPS, "discriminator": base_steps}
        self.discriminator_steps = discriminator_steps
        self.bases = {name: output_dir / name for name in BASES}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build.build_tokenizer()
        train, test = map(Dataset.from_list, build.teacher_rows())
        self.train, self.test = tokenized(train, self.tokenizer), tokenized(test, self.tokenizer).to_list()

    def measure(self, model, **settings) -> dict[str, float]:
        return measured(model, self.tokenizer, self.test, **settings)

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
        build.save_model(trainer.model, self.tokenizer, self.folder / "students" / name)
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


def read(output_dir: Path, name: str, seeds: list[int]) -> list[dict]:
    paths = [output_dir / f"seed{seed}" / f"{name}.json" for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def warned(results: list[dict]) -> str:
    told = [result["warnings"] for result in results if "warnings" in result]
    kinds = {warning["kind"] for warnings in told for warning in warnings}
    return (", ".join(sorted(kinds)) or "none") if told else "–"


def table(output_dir: Path, seeds: list[int]) -> str:
    rows = []
    for name in [UNDISTILLED, SEQKD, *ARMS, "discriminator"]:
        results = read(output_dir, name, seeds)
        cells = [mean_of(results, *column) for column in COLUMNS.values()]
        rows.append([name, *cells, warned(results), each_of(results, "valid@t1.0")])
    return markdown(["arm", *COLUMNS, "warnings", "valid, T=1.0, of each seed"], rows)


def main(argv=None) -> None:
    arguments = parse_args(argv)
    output_dir = Path(arguments.output_dir)
    if not arguments.table:
        for seed in arguments.seeds:
            steps = arguments.discriminator_base_steps, arguments.discriminator_steps
            Experiment(output_dir, seed, *steps).run(arguments.arms)
    print(table(output_dir, arguments.seeds))


if __name__ == "__main__":
    main()
