"""
Grade-school problems with GPT-3's answers, a story model as proxy, and a small student with its tokenizer.

The teacher's text is `175b_finetuning` and `175b_verification` of `gsm8k_gpt3_solutions.jsonl`. Of the closed models'
texts we have, it is the closest to what a TinyStories proxy knows: raw, the proxy gives it 5.1 nats a token and
guesses 21 % of the tokens, against 6.2 nats for BIG-Bench reasoning, 6.9 for answers to instructions and 10.4 for
code. (Stories that the proxy wrote itself, at 1.0, would need no alignment.) Questions of more than
`--max_prompt_length` tokens are left out, and answers are cut after `--max_completion_length`; these questions, and
stories, are what the student is pretrained on.
"""

import argparse
import json
import logging
import random
import re
from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, set_seed

from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.proxy.agreement import teacher_agreement
from trl_bbkd.proxykd.config import ProxyKDConfig
from trl_bbkd.proxykd.trainer import ProxyKDTrainer
from trl_bbkd.seqkd.trainer import CurveCallback
from trl_bbkd.soft_targets.rows import soft_target_rows

from .arguments import evidence_arguments, evidence_parser
from .device import HAS_GPU
from .models import llama_config
from .seeds import KeptRuns
from .tables import mean_and_each


TEACHERS = ("175b_finetuning", "175b_verification")


def word_problems_parser(description: str, output_dir: str, arms: Iterable[str]) -> argparse.ArgumentParser:
    parser = evidence_parser(description, output_dir, arms)
    parser.add_argument("--proxy", required=True, help="checkpoint of the proxy, whose tokenizer the student takes")
    parser.add_argument("--data", required=True, help="gsm8k_gpt3_solutions.jsonl")
    parser.add_argument("--pretraining_data", required=True, help="JSON lines with `prompt` and `completion`: stories")
    parser.add_argument("--report_on", choices=["test", "validation"], default="test")
    parser.add_argument("--validation_questions", type=int, default=40)
    parser.add_argument("--test_questions", type=int, default=80)
    parser.add_argument("--max_rows", type=int, help="rows to distil from; by default all that are left")
    parser.add_argument("--max_prompt_length", type=int, default=64)
    parser.add_argument("--max_completion_length", type=int, default=40)
    # Student
    parser.add_argument("--hidden_size", type=int, default=48)
    parser.add_argument("--num_layers", type=int, default=3)
    parser.add_argument("--pretraining_steps", type=int, default=300)
    parser.add_argument("--pretraining_learning_rate", type=float, default=6e-3)
    parser.add_argument("--student_steps", type=int, default=150)
    parser.add_argument("--student_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="of the arms without a proxy")
    parser.add_argument("--kd_learning_rate", type=float, default=3e-3, help="of the arms with one")
    parser.add_argument("--kl_weight", type=float, default=10.0)
    parser.add_argument("--target_tail", choices=["renormalize", "bucket"], default="renormalize")
    parser.add_argument("--curve_points", type=int, default=5, help="measurements on validation rows in training")
    # Proxy
    parser.add_argument("--proxy_batch_size", type=int, default=8)
    parser.add_argument("--proxy_learning_rate", type=float, default=1e-4)
    parser.add_argument("--proxy_warmup_epochs", type=float, default=1.0)
    parser.add_argument("--alignment_learning_rate", type=float, default=1e-4)
    parser.add_argument("--alignment_rounds", type=int, default=4)
    parser.add_argument("--warmup_share", type=float, default=0.1)
    parser.add_argument("--alignment_share", type=float, default=0.45)
    return parser


class Data:
    """Rows of the teacher and texts for pretraining. Which questions are held out is the same for every seed."""

    def __init__(self, args, tokenizer):
        questions = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()]
        random.Random(0).shuffle(questions)
        length = {row["question"]: len(tokenizer(row["question"] + "\n")["input_ids"]) for row in questions}
        short = [row for row in questions if length[row["question"]] <= args.max_prompt_length]
        test, validation = args.test_questions, args.validation_questions
        rows = {
            "test": short[:test],
            "validation": short[test : test + validation],
            "train": short[test + validation :],
        }
        rows = {name: self._tokenized(args, tokenizer, part) for name, part in rows.items()}
        self.train = rows["train"].select(range(min(len(rows["train"]), args.max_rows or len(rows["train"]))))
        self.held_out = {name: rows[name] for name in ("validation", "test")}
        self.scored = {name: soft_target_rows(part, tokenizer).to_list() for name, part in self.held_out.items()}
        stories = [json.loads(line) for line in Path(args.pretraining_data).read_text(encoding="utf-8").splitlines()]
        texts = [row["prompt"] + row["completion"] for row in stories]
        texts += [row["question"] for row in questions if length[row["question"]] > args.max_prompt_length]
        # The first word is the prompt, and everything after it is learned
        self.pretraining = Dataset.from_list(
            [{"prompt": text.split(" ", 1)[0], "completion": text.split(" ", 1)[1]} for text in texts]
        )

    @staticmethod
    def _tokenized(args, tokenizer, questions: list[dict]) -> Dataset:
        # Without the calculator's marks, <<3+4=7>>: they say again what the words around them say
        answers = [
            (row["question"], re.sub(r"<<.*?>>", "", row[t]["solution"])) for row in questions for t in TEACHERS
        ]
        # The two answers to a question are sometimes the same
        rows = [{"prompt": f"{prompt}\n", "completion": answer} for prompt, answer in dict.fromkeys(answers)]
        length = {"max_completion_length": args.max_completion_length}
        return tokenize_teacher_data(Dataset.from_list(rows), tokenizer, **length)[0]


def load(args) -> tuple[Data, object]:
    """The rows and their tokenizer, and how many rows there are on the screen."""
    logging.basicConfig(level=logging.WARNING)
    tokenizer = AutoTokenizer.from_pretrained(args.proxy, padding_side="left")
    data = Data(args, tokenizer)
    sizes = {"train": len(data.train), "pretraining": len(data.pretraining)}
    print(sizes | {name: len(rows) for name, rows in data.held_out.items()}, flush=True)
    return data, tokenizer


def measure(model, rows: list[dict]) -> dict[str, float]:
    """NLL per token of the teacher's answers, and the share of their tokens that are the model's likeliest ones."""
    return teacher_agreement(model, rows, Accelerator(cpu=not HAS_GPU), batch_size=16)


def student_arguments(args, seed: int, folder: Path, learning_rate: float) -> dict:
    """Of a trainer of either method."""
    return {
        "output_dir": str(folder),
        "max_completion_length": args.max_completion_length,
        "max_steps": args.student_steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": args.student_batch_size,
        "per_device_eval_batch_size": 32,
        "proxy_per_device_train_batch_size": args.proxy_batch_size,
        "proxy_learning_rate": args.proxy_learning_rate,
        "proxy_warmup_epochs": args.proxy_warmup_epochs,
        **evidence_arguments(seed),
    }


class WordProblemRuns(KeptRuns):
    """One seed's runs: the student is pretrained once, and every arm starts from it."""

    def __init__(self, args, seed: int, data: Data, tokenizer, *kinds: str):
        super().__init__(args.output_dir, seed, *kinds)
        self.args, self.data, self.tokenizer = args, data, tokenizer

    def student(self) -> Path:
        folder = self.root / "student"
        if not (folder / "model.safetensors").is_file():
            set_seed(self.seed)
            sizes = {"max_position_embeddings": 256, "tie_word_embeddings": True}
            config = llama_config(self.tokenizer, self.args.hidden_size, self.args.num_layers, width=3, **sizes)
            pretrain(LlamaForCausalLM(config), self.args, self.seed, self.data, self.tokenizer, folder)
        return folder

    def callback(self) -> CurveCallback:
        validation = self.data.scored["validation"]
        return CurveCallback(lambda model: measure(model, validation), points=self.args.curve_points)


def pretrain(student, args, seed: int, data: Data, tokenizer, folder: Path) -> None:
    # Without a KL it is SFT; its loss computes the logits of 32,000 tokens in chunks, which takes a quarter of the time
    settings = {"stages": ["distil"], "kl_weight": 0.0, "distil_on_all_rows": True}
    settings |= {"max_completion_length": 96, "max_steps": args.pretraining_steps}
    trainer = ProxyKDTrainer(
        model=student,
        args=ProxyKDConfig(
            **student_arguments(args, seed, folder, learning_rate=args.pretraining_learning_rate) | settings
        ),
        train_dataset=data.pretraining,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))


def best_on_validation(runs: list[dict]) -> str:
    """Of each seed's curve; for comparison, students are measured at their last step."""
    best = [min(run["curve"], key=lambda point: point["nll"]) for run in runs if run["curve"]]
    return ", ".join(f"{point['nll']:.3f} at {point['step']}" for point in best) or "–"


def means(runs: list[dict], *names: str) -> list[str]:
    return [mean_and_each([run[name] for run in runs]) for name in names]
