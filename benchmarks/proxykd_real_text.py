"""
Proxy-KD against SFT on real text: a story model as proxy, GPT-3's answers to word problems as the teacher's text.

The teacher's text is `175b_finetuning` and `175b_verification` of `gsm8k_gpt3_solutions.jsonl`. Of the closed models'
texts we have, it is the closest to what a TinyStories proxy knows: raw, the proxy gives it 5.1 nats a token and
guesses 21 % of the tokens, against 6.2 nats for BIG-Bench reasoning, 6.9 for answers to instructions and 10.4 for
code. (Stories that the proxy wrote itself, at 1.0, would need no alignment.) Questions of more than
`--max_prompt_length` tokens are left out, and answers are cut after `--max_completion_length`; these questions, and
stories, are what the student is pretrained on.

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

import argparse
import json
import logging
import random
import re
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.proxy.agreement import teacher_agreement
from trl_bbkd.proxykd.config import ProxyKDConfig
from trl_bbkd.proxykd.trainer import ProxyKDTrainer
from trl_bbkd.seqkd.trainer import CurveCallback, curve
from trl_bbkd.soft_targets.rows import soft_target_rows


TEACHERS = ("175b_finetuning", "175b_verification")
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


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy", required=True, help="checkpoint of the proxy, whose tokenizer the student takes")
    parser.add_argument("--data", required=True, help="gsm8k_gpt3_solutions.jsonl")
    parser.add_argument("--pretraining_data", required=True, help="JSON lines with `prompt` and `completion`: stories")
    parser.add_argument("--output_dir", default="output/proxykd_real_text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
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
    return parser.parse_args(argv)


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


def measure(model, rows: list[dict]) -> dict[str, float]:
    """NLL per token of the teacher's answers, and the share of their tokens that are the model's likeliest ones."""
    return teacher_agreement(model, rows, Accelerator(cpu=not torch.cuda.is_available()), batch_size=16)


def common_arguments(seed: int) -> dict:
    return {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "seed": seed,
    }


def pretrain_student(args, seed: int, data: Data, tokenizer, folder: Path) -> None:
    set_seed(seed)
    student = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    trainer = ProxyKDTrainer(
        model=student,
        # Without a KL it is SFT; its loss computes the logits of 32,000 tokens in chunks, which takes a quarter of the time
        args=config(
            args,
            seed,
            folder,
            ["distil"],
            kl_weight=0.0,
            distil_on_all_rows=True,
            max_completion_length=96,
            max_steps=args.pretraining_steps,
            learning_rate=args.pretraining_learning_rate,
        ),
        train_dataset=data.pretraining,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))


def config(args, seed: int, folder: Path, stages: list[str], **settings) -> ProxyKDConfig:
    return ProxyKDConfig(
        **{
            "output_dir": str(folder),
            "stages": stages,
            "warmup_share": args.warmup_share,
            "alignment_share": args.alignment_share,
            "max_completion_length": args.max_completion_length,
            "max_steps": args.student_steps,
            "learning_rate": args.kd_learning_rate,
            "lr_scheduler_type": "linear",
            "per_device_train_batch_size": args.student_batch_size,
            "per_device_eval_batch_size": 32,
            "kl_weight": args.kl_weight,
            "target_tail": args.target_tail,
            "proxy_per_device_train_batch_size": args.proxy_batch_size,
            "proxy_learning_rate": args.proxy_learning_rate,
            "proxy_warmup_epochs": args.proxy_warmup_epochs,
            "alignment_learning_rate": args.alignment_learning_rate,
            "alignment_rounds": args.alignment_rounds,
            **common_arguments(seed),
            **settings,
        }
    )


class Seed:
    """
    One seed's runs, all below one folder; what is finished there is not run again.

    The proxy's stages and distillation are separate runs, so that arms share a proxy: `ProxyKDTrainer.train` gives the
    student the same run whichever stages went before it.
    """

    def __init__(self, args, seed: int, data: Data, tokenizer):
        self.args, self.seed, self.data, self.tokenizer = args, seed, data, tokenizer
        self.root = Path(args.output_dir) / f"seed_{seed}"
        self.path = self.root / "results.json"
        self.results = json.loads(self.path.read_text()) if self.path.is_file() else {"proxies": {}, "arms": {}}

    def run(self) -> dict:
        for arm in ["undistilled", *self.args.arms]:
            if arm in self.results["arms"]:
                continue
            start = time.perf_counter()
            points, rows = ([], 0) if arm == "undistilled" else self._train(arm)
            folder = self._student() if arm == "undistilled" else self.root / arm
            student = AutoModelForCausalLM.from_pretrained(folder)
            metrics = measure(student, self.data.scored[self.args.report_on])
            self.results["arms"][arm] = {
                **metrics,
                "rows": rows,
                "parameters": student.num_parameters(),
                "seconds": time.perf_counter() - start,
                "curve": points,
            }
            self._save()
            print(f"seed {self.seed}, {arm}:", json.dumps(self.results["arms"][arm]), flush=True)
        return self.results

    def _train(self, arm: str) -> tuple[list[dict], int]:
        proxy, settings = ARMS[arm]
        args = self.args
        if proxy is None:
            settings = {**settings, "learning_rate": args.learning_rate}
        else:
            settings = {**settings, "target_store": str(self._targets(proxy))}
        validation = self.data.scored["validation"]
        trainer = self._trainer(
            self.root / arm,
            ["distil"],
            None,
            settings,
            callbacks=[CurveCallback(lambda model: measure(model, validation), points=args.curve_points)],
        )
        trainer.train()
        trainer.save_model(str(self.root / arm))
        return curve(trainer.state.log_history), len(trainer.train_dataset)

    def _student(self) -> Path:
        folder = self.root / "student"
        if not (folder / "model.safetensors").is_file():
            pretrain_student(self.args, self.seed, self.data, self.tokenizer, folder)
        return folder

    def _targets(self, name: str) -> Path:
        """The soft targets of a proxy, which is trained first."""
        if name == "raw":
            self._stages(name, ["cache"], self.args.proxy)
        elif name == "aligned_all":
            self._targets("aligned")
            self._stages(name, ["cache"], str(self.root / "aligned/proxy/align"), {"distil_on_all_rows": True})
        else:
            self._stages("warmed", ["warmup"], self.args.proxy)
            settings = {"preference_weight": 0.0} if name == "no_dpo" else {}
            self._stages(name, ["align", "cache"], str(self.root / "warmed/proxy/warmup"), settings)
        return self.root / name / "proxy/targets"

    def _stages(self, name: str, stages: list[str], proxy: str, settings: dict | None = None) -> None:
        if name in self.results["proxies"]:
            return
        start = time.perf_counter()
        trainer = self._trainer(self.root / name, stages, proxy, settings or {})
        trainer.train()
        seconds = time.perf_counter() - start
        rounds = [
            {"stage": report["stage"], **entry}
            for report in trainer.proxy_stages.reports
            for entry in report["metrics"]
            if "nll" in entry
        ]
        losses = [
            {
                key: line[key]
                for key in ("step", "round", "loss", "rewards/margins", "rewards/accuracies")
                if key in line
            }
            for line in trainer.proxy_stages.log_history
            if "loss" in line
        ]
        self.results["proxies"][name] = {"rounds": rounds, "seconds": seconds, "log": losses}
        self._save()
        print(f"seed {self.seed}, proxy {name}, {seconds:.0f} s:", json.dumps(rounds), flush=True)

    def _trainer(self, folder: Path, stages, proxy, settings: dict, callbacks=None) -> ProxyKDTrainer:
        return ProxyKDTrainer(
            model=str(self._student()),
            proxy_model=proxy,
            args=config(self.args, self.seed, folder, stages, **settings),
            train_dataset=self.data.train,
            eval_dataset=self.data.held_out[self.args.report_on],
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )

    def _save(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")


def mean_and_seeds(values: list[float]) -> str:
    text = f"{statistics.mean(values):.3f}"
    return text if len(values) == 1 else text + f" ({' '.join(f'{value:.3f}' for value in values)})"


def tables(args, results: list[dict]) -> str:
    """Mean over seeds, with each seed's value."""
    lines = [
        "| arm | rows | teacher NLL | token accuracy | best NLL on validation, at step |",
        "|---|---:|---|---|---|",
    ]
    for arm in ["undistilled", *args.arms]:
        runs = [result["arms"][arm] for result in results]
        best = [min(run["curve"], key=lambda point: point["nll"]) for run in runs if run["curve"]]
        cells = [
            f"{runs[0]['rows']:,}" if runs[0]["rows"] else "–",
            mean_and_seeds([run["nll"] for run in runs]),
            mean_and_seeds([run["top1_agreement"] for run in runs]),
            ", ".join(f"{point['nll']:.3f} at {point['step']}" for point in best) or "–",
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", "| proxy | top-1 agreement | teacher NLL |", "|---|---|---|"]
    for name in ("warmed", "aligned", "no_dpo"):
        proxies = [result["proxies"][name]["rounds"] for result in results if name in result["proxies"]]
        for entries in zip(*proxies, strict=True):
            agreement = mean_and_seeds([entry["top1_agreement"] for entry in entries])
            nll = mean_and_seeds([entry["nll"] for entry in entries])
            lines.append(f"| {name}, {entries[0]['stage']}, {entries[0]['at']} | {agreement} | {nll} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    tokenizer = AutoTokenizer.from_pretrained(args.proxy, padding_side="left")
    data = Data(args, tokenizer)
    sizes = {"train": len(data.train), "pretraining": len(data.pretraining)}
    print(sizes | {name: len(rows) for name, rows in data.held_out.items()}, flush=True)
    results = []
    for seed in args.seeds:
        results.append(Seed(args, seed, data, tokenizer).run())
        text = tables(args, results)
        print(text, flush=True)
        (Path(args.output_dir) / "table.md").write_text(text)


if __name__ == "__main__":
    main()
