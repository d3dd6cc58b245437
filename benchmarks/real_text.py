"""
GAD against SeqKD on real text: a small story model distils a larger one of which only the text is known.

For each seed the student is fine-tuned on the teacher's answers; from this shared checkpoint GAD and SeqKD go on for the
same number of optimizer steps. The table gives, on held-out prompts, the student's NLL of the teacher's answers
(coverage), the NLL that the teacher's own model gives to the student's samples (quality; it trains nothing), their length
and their diversity.

    python benchmarks/real_text.py --student stories260K --teacher stories15M --data stories15M_generations.jsonl
"""

import json
import logging
import math
import random
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common.arguments import evidence_arguments, evidence_parser
from common.seeds import KeptRuns, run_seeds
from common.tables import markdown, mean_and_each
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bbkd import GADConfig, GADTrainer
from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.evaluation.student import generate_completions, pad_rows, teacher_nll
from trl_bbkd.seqkd.trainer import CurveCallback, curve, train_seqkd


NGRAM = 4
SEQKD_ARMS = ("seqkd", "seqkd_x2")  # the second: twice the steps
GAD_ARMS = {
    "gad": {},
    **{f"anchor_{weight}": {"sft_weight": weight} for weight in (0.03, 0.1, 0.3, 1.0)},
    **{f"entropy_{share}": {"discriminator_entropy": share} for share in (0.3, 1.0)},
    "anchor_0.3_entropy_0.3": {"sft_weight": 0.3, "discriminator_entropy": 0.3},
}


def parse_args(argv=None):
    parser = evidence_parser(__doc__, "output/real_text", (*GAD_ARMS, *SEQKD_ARMS))
    parser.set_defaults(arms=["gad", "seqkd"])
    parser.add_argument("--student", required=True, help="checkpoint of the student")
    parser.add_argument("--teacher", required=True, help="checkpoint of the teacher, used as judge only")
    parser.add_argument("--data", required=True, help="JSON lines with `prompt` and `completion`, the teacher's text")
    parser.add_argument("--report_on", choices=["test", "validation"], default="test")
    parser.add_argument("--test_prompts", type=int, default=160)
    parser.add_argument("--validation_prompts", type=int, default=96)
    parser.add_argument("--samples", type=int, default=2, help="samples per held-out prompt and temperature")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.8])
    parser.add_argument("--selection_temperature", type=float, default=0.8, help="of SeqKD's best checkpoint")
    parser.add_argument("--max_completion_length", type=int, default=128)
    parser.add_argument(
        "--curve_points", type=int, default=0, help="measurements on validation prompts during a stage"
    )
    # Shared start and SeqKD
    parser.add_argument(
        "--sft_rows", type=int, help="rows of the shared start, and GAD gets the others; by default both get all"
    )
    parser.add_argument("--sft_steps", type=int, default=300)
    parser.add_argument("--sft_batch_size", type=int, default=16)
    parser.add_argument("--sft_learning_rate", type=float, default=1e-3)
    parser.add_argument("--seqkd_learning_rate", type=float, default=3e-4)
    # GAD
    parser.add_argument("--discriminator_warmup_steps", type=int, default=8, help="steps in which only D learns")
    parser.add_argument("--adversarial_steps", type=int, default=56)
    parser.add_argument("--prompts_per_step", type=int, default=8)
    parser.add_argument("--num_generations", type=int, default=6)
    parser.add_argument("--rollout_temperature", type=float, default=1.0)
    parser.add_argument("--learning_rate", type=float, default=1.5e-4)
    parser.add_argument("--lr_scheduler_type", default="constant")
    parser.add_argument("--beta", type=float, default=0.02)
    parser.add_argument("--scale_rewards", default="group")
    parser.add_argument("--discriminator_head", default="likelihood")
    parser.add_argument("--discriminator_learning_rate", type=float, default=3e-4)
    return parser.parse_args(argv)


def split_rows(path: str, test: int, validation: int) -> tuple[list[dict], list[dict], list[dict]]:
    """Train, validation and test rows. The split is the same for every seed."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    random.Random(0).shuffle(rows)
    return rows[test + validation :], rows[test : test + validation], rows[:test]


@torch.no_grad()
def judge_nlls(judge, tokenizer, prompts: list[str], texts: list[str], batch_size: int = 32) -> list[float]:
    """The judge's nats for each text after its prompt, both in the judge's own tokens."""
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        encoded = tokenizer(prompt + text, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        rows.append(
            (
                ids,
                [i if end > len(prompt) else -100 for i, (_, end) in zip(ids, encoded["offset_mapping"], strict=True)],
            )
        )
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    nlls = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        input_ids, attention_mask = pad_rows([rows[row][0] for row in batch], 0, judge.device, side="right")
        labels, _ = pad_rows([rows[row][1] for row in batch], -100, judge.device, side="right")
        logits = judge(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(dim=1)
        for row, loss in zip(batch, losses.tolist(), strict=True):
            nlls[row] = loss
    return nlls


def distinct_ngrams(texts: list[str]) -> float:
    """Different word n-grams out of all."""
    ngrams = [tuple(words[i : i + NGRAM]) for words in map(str.split, texts) for i in range(len(words) - NGRAM + 1)]
    return len(set(ngrams)) / len(ngrams)


class Measure:
    """Measures of a student on held-out rows."""

    def __init__(self, args, rows: list[dict], tokenizer, judge, judge_tokenizer):
        self.args, self.rows, self.tokenizer = args, rows, tokenizer
        self.judge, self.judge_tokenizer = judge, judge_tokenizer
        self.prompts = [row["prompt"] for row in rows]
        # The teacher's answers up to where a student's sample would be cut
        self.answers = tokenizer.batch_decode([row["teacher_ids"] for row in rows], skip_special_tokens=True)
        self.answer_chars = sum(map(len, self.answers))

    def coverage(self, student) -> float:
        """The student's nats per character of the teacher's answers."""
        tokens = sum(len(row["teacher_ids"]) for row in self.rows)
        return teacher_nll(student, self.tokenizer, self.rows) * tokens / self.answer_chars

    def text(self, groups: list[list[str]]) -> dict[str, float]:
        """Metrics of texts, as many for each prompt."""
        num_samples = len(groups[0])
        texts = [text for group in groups for text in group]
        prompts = [prompt for prompt in self.prompts for _ in range(num_samples)]
        nlls = judge_nlls(self.judge, self.judge_tokenizer, prompts, texts)
        chars = [len(text) for text in texts]
        nll_per_char = sum(nlls) / sum(chars)
        # Standard error of a ratio of means; the samples of a prompt are not independent
        residuals = [nll - nll_per_char * length for nll, length in zip(nlls, chars, strict=True)]
        by_prompt = [sum(residuals[i : i + num_samples]) for i in range(0, len(residuals), num_samples)]
        slots = list(zip(*groups, strict=True))
        return {
            "judge_nll": nll_per_char,
            "judge_nll_se": math.sqrt(sum(r * r for r in by_prompt)) / sum(chars),
            "length_ratio": sum(chars) / num_samples / self.answer_chars,
            "distinct_samples": len(set(zip(prompts, texts, strict=True))) / len(texts),
            # For each draw over all prompts, so that it compares with one answer of the teacher to each
            "distinct_4grams": statistics.mean(distinct_ngrams(slot) for slot in slots),
        }

    def teacher(self) -> dict[str, float]:
        return self.text([[answer] for answer in self.answers])

    def samples(self, student, temperature: float, num_samples: int, seed: int) -> dict[str, float]:
        groups = generate_completions(
            student,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.args.max_completion_length,
            temperature=temperature,
            num_samples=num_samples,
            batch_size=128,
            seed=seed,
        )
        return self.text(groups)

    def quality(self, student, seed: int) -> dict[str, float]:
        """What SeqKD's checkpoints are chosen by."""
        return self.samples(student, self.args.selection_temperature, 1, seed) | {
            "student_nll": self.coverage(student)
        }

    def all(self, student, num_samples: int, seed: int, known: dict | None = None) -> dict[str, float]:
        metrics = known or {"student_nll": self.coverage(student)}
        for temperature in self.args.temperatures:
            if f"judge_nll@t{temperature}" in metrics:
                continue
            samples = self.samples(student, temperature, num_samples, seed)
            metrics |= {f"{name}@t{temperature}": value for name, value in samples.items()}
        return metrics


def gad_config(args, seed: int, output_dir: Path, **settings) -> GADConfig:
    steps = args.discriminator_warmup_steps + args.adversarial_steps
    return GADConfig(
        output_dir=str(output_dir),
        max_steps=steps,
        # Counted in steps: warm-up keeps this share of `max_steps`. The student is warmed up already, so only D moves.
        num_train_epochs=steps,
        warmup_epochs=args.discriminator_warmup_steps,
        warmup_learning_rate=0.0,
        discriminator_only_steps=0,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        per_device_train_batch_size=args.prompts_per_step * args.num_generations,
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        temperature=args.rollout_temperature,
        beta=args.beta,
        scale_rewards=args.scale_rewards,
        max_grad_norm=1.0,
        discriminator_head=args.discriminator_head,
        discriminator_learning_rate=args.discriminator_learning_rate,
        discriminator_max_grad_norm=1.0,
        discriminator_batch_size=(args.prompts_per_step + 1) * args.num_generations,
        **evidence_arguments(seed),
        **{"sft_weight": 0.0} | settings,
    )


def train_sft(student: str, args, seed, dataset, tokenizer, output_dir, steps, learning_rate, measure=None):
    """SFT, annealed to 0. With `measure`, the checkpoint that the judge likes best is kept, otherwise the last one."""
    config = gad_config(args, seed, output_dir)
    config.per_device_train_batch_size = args.sft_batch_size
    return train_seqkd(
        student,
        config,
        dataset,
        tokenizer,
        measure=lambda model: measure.quality(model, seed) if measure else {},
        is_better=lambda new, best: measure is None or new["judge_nll"] < best["judge_nll"],
        output_dir=str(output_dir),
        max_steps=steps,
        learning_rate=learning_rate,
    )


def train_gad(student: Path, args, seed, rows, tokenizer, measure, output_dir, settings) -> list[dict]:
    """GAD from the shared checkpoint; its last student is kept."""
    callbacks = []
    if args.curve_points > 0:
        callbacks = [CurveCallback(lambda model: measure.all(model, 1, seed), points=args.curve_points)]
    trainer = GADTrainer(
        model=str(student),
        args=gad_config(args, seed, output_dir, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    trainer.save_model(str(output_dir))
    (output_dir / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    return curve(trainer.state.log_history)


def train_arm(args, arm: str, runs: KeptRuns, train_rows, dataset, tokenizer, validation: Measure) -> list[dict]:
    """The arm's student, in a folder of its name; measurements on the way."""
    warmed, output_dir, seed = runs.root / "warmed", runs.root / arm, runs.seed
    steps = args.discriminator_warmup_steps + args.adversarial_steps
    if arm == "warmed":
        rows = dataset.select(range(args.sft_rows or len(dataset)))
        train_sft(args.student, args, seed, rows, tokenizer, warmed, args.sft_steps, args.sft_learning_rate)
        return []
    if arm in GAD_ARMS:
        rows = train_rows[args.sft_rows or 0 :]
        return train_gad(warmed, args, seed, rows, tokenizer, validation, output_dir, GAD_ARMS[arm])
    # Its own seed, or SeqKD would meet the rows in the order of the shared start
    steps, rate = 2 * steps if arm == "seqkd_x2" else steps, args.seqkd_learning_rate
    sft = train_sft(str(warmed), args, 1000 + seed, dataset, tokenizer, output_dir, steps, rate, validation)
    return [{"best_step": sft.best_step}, *sft.curve]


def run_seed(args, seed: int, train_rows, dataset, tokenizer, validation: Measure, report: Measure) -> dict:
    """Train the arms, and measure the temperatures, that the seed's `results.json` does not have yet."""
    runs = KeptRuns(args.output_dir, seed)
    for arm in ["warmed", *args.arms]:
        if arm not in runs.results:
            start = time.perf_counter()
            points = train_arm(args, arm, runs, train_rows, dataset, tokenizer, validation)
            runs.results[arm] = {"metrics": {}, "seconds": time.perf_counter() - start, "curve": points}
        student = AutoModelForCausalLM.from_pretrained(runs.root / arm)
        result = runs.results[arm]
        result["metrics"] = report.all(student, args.samples, 1000 + seed, result["metrics"])
        runs.save()
        print(f"seed {seed}, {arm}, {result['seconds']:.0f} s:", json.dumps(result["metrics"]), flush=True)
    return runs.results


def tables(args, reference: dict, results: list[dict]) -> str:
    """Mean over seeds, with each seed's value; for the judge's NLL also the mean standard error of one seed."""

    def cell(name: str, arm: str) -> str:
        text = mean_and_each([result[arm]["metrics"][name] for result in results])
        if name.startswith("judge_nll"):
            errors = [result[arm]["metrics"][name.replace("judge_nll", "judge_nll_se")] for result in results]
            text += f" ± {statistics.mean(errors):.3f}"
        return text

    names, found = ["judge_nll", "length_ratio", "distinct_samples", "distinct_4grams"], []
    for temperature in args.temperatures:
        rows = [["teacher's text", "", *(f"{reference[name]:.3f}" for name in names)]]
        for arm in ["warmed", *args.arms]:
            rows.append([arm, cell("student_nll", arm), *(cell(f"{name}@t{temperature}", arm) for name in names)])
        found.append(markdown([f"T={temperature}", "student NLL", *names], rows))
    return "\n\n".join(found) + "\n"


def main(argv=None):
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    tokenizer = AutoTokenizer.from_pretrained(args.student, padding_side="left")
    judge_tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    judge = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()

    train_rows, validation_rows, test_rows = split_rows(args.data, args.test_prompts, args.validation_prompts)
    tokenize = {"max_completion_length": args.max_completion_length}
    dataset, counts = tokenize_teacher_data(Dataset.from_list(train_rows), tokenizer, **tokenize)
    print(counts, flush=True)
    held_out = {}
    for name, rows in (("validation", validation_rows), ("test", test_rows)):
        held_out_rows = tokenize_teacher_data(Dataset.from_list(rows), tokenizer, **tokenize)[0].to_list()
        held_out[name] = Measure(args, held_out_rows, tokenizer, judge, judge_tokenizer)
    validation, report = held_out["validation"], held_out[args.report_on]

    reference = report.teacher()
    print("teacher's text", json.dumps(reference), flush=True)
    run_seeds(
        args,
        lambda seed: run_seed(args, seed, train_rows, dataset, tokenizer, validation, report),
        lambda results: tables(args, reference, results),
    )


if __name__ == "__main__":
    main()
