"""The two worlds of the score-board: rows, a start at SeqKD's plateau, and a judge that trains nothing."""

import functools
import random
from argparse import Namespace
from pathlib import Path

import real_text
import tinyworld_ablations
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import tinyworld
from common.arguments import evidence_arguments
from trl_bbkd import GADConfig, PreferenceKDConfig
from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.evaluation.diversity import distinct_ngrams
from trl_bbkd.evaluation.student import generate_completions, teacher_nll


# The start has learned from the teacher's answers already
PREFERENCES = {"warmup_epochs": 0, "sample_temperature": 1.0, "sample_top_p": 1.0, "beta": 0.1, "sft_weight": 1.0}


class World:
    """
    What arms are trained and measured on.

    Attributes:
        train ([`~datasets.Dataset`]): Tokenised rows.
        held_out (`dict[str, list[dict]]`): Rows of `validation`, by which settings are chosen, and `test`.
        title, quality_name, diversity_name (`str`): Of the picture.
        temperatures (`tuple[float, ...]`): That students are sampled at; 1.0 is one of them.
        num_samples (`int`): Of a held-out prompt at each temperature.
        samples_a_prompt (`int`): With which every arm has as many samples of training prompts in all as GAD.
        preference_epochs (`float`): With which preference distillation trains on about as many sequences as GAD.
    """

    def start(self, seed: int) -> Path:
        """A student that SeqKD has trained until it gains little more; made once."""
        raise NotImplementedError

    def gad_config(self, folder: Path, seed: int, **settings) -> GADConfig:
        raise NotImplementedError

    def preference_config(self, folder: Path, seed: int, **settings) -> PreferenceKDConfig:
        """With as many samples as GAD has, and as many sequences to train on."""
        raise NotImplementedError

    def quality(self, prompts: list[str], texts: list[str]) -> list[float]:
        """The judge's verdict on each text; more is better."""
        raise NotImplementedError

    def quality_beside_answer(self, prompts: list[str], texts: list[str], answers: list[str]) -> list[float]:
        """The same, as a judge of preference distillation: what its students could gain at most."""
        return self.quality(prompts, texts)

    def diversity(self, groups: list[list[str]]) -> float:
        """Of each prompt's samples."""
        raise NotImplementedError

    def missing(self, found: dict) -> list[float]:
        """Temperatures that a student was not measured at."""
        return [temperature for temperature in self.temperatures if str(temperature) not in found.get("texts", {})]

    def measure(self, student: Path, split: str, seed: int, found: dict) -> dict:
        """
        Samples and verdicts at each temperature, the NLL of the teacher's answers, and how long samples are; what was
        found before is kept.
        """
        model = AutoModelForCausalLM.from_pretrained(student)
        rows = self.held_out[split]
        prompts = [row["prompt"] for row in rows]
        found = found or {"nll": teacher_nll(model, self.tokenizer, rows), "texts": {}, "quality": {}}
        for temperature in self.missing(found):
            groups = generate_completions(
                model,
                self.tokenizer,
                prompts,
                max_new_tokens=self.max_new_tokens,
                temperature=temperature,
                num_samples=self.num_samples,
                batch_size=256,
                seed=1000 + seed,
            )
            verdicts = iter(
                self.quality(
                    [prompt for prompt in prompts for _ in range(self.num_samples)],
                    [text for group in groups for text in group],
                )
            )
            found["texts"][str(temperature)] = groups
            found["quality"][str(temperature)] = [[next(verdicts) for _ in group] for group in groups]
        lengths = [len(text) for group in found["texts"]["1.0"] for text in group]
        answers = self.tokenizer.batch_decode([row["teacher_ids"] for row in rows], skip_special_tokens=True)
        found["length_ratio"] = sum(lengths) / self.num_samples / sum(map(len, answers))
        return found


class Tinyworld(World):
    """
    Counting to 49; the judge is exact. Answers to a prompt always differ, so that diversity is that of their 3-grams.
    """

    title = "Counting to 49: students of one start, sampled at several temperatures"
    quality_name, diversity_name = "valid answers", "distinct 3-grams among 8 answers to a prompt"
    temperatures = (1.2, 1.0, 0.8, 0.6, 0.4, 0.2)
    max_new_tokens, num_samples, samples_a_prompt = tinyworld.ANSWER_TOKENS, 8, 8
    preference_epochs = 2.5
    # Of the discriminator of docs/results/gad.md's second table, which has not memorised the answers
    BASE_STEPS, DISCRIMINATOR_STEPS = 1500, 800

    def __init__(self, folder: Path):
        self.folder = folder
        experiment = self.experiment(0)
        self.tokenizer, self.train = experiment.tokenizer, experiment.train
        test = experiment.test
        known = {row["prompt"] for row in [*self.train, *test]}
        validation = tinyworld.tokenized(Dataset.from_list(self.new_rows(len(test), known)), self.tokenizer)
        self.held_out = {"validation": validation.to_list(), "test": test}

    def experiment(self, seed: int) -> tinyworld_ablations.Experiment:
        return tinyworld_ablations.Experiment(self.folder, seed, self.BASE_STEPS, self.DISCRIMINATOR_STEPS)

    def new_rows(self, count: int, known: set[str]) -> list[dict]:
        rng, prompts = random.Random(1), {}
        while len(prompts) < count:
            prompt = tinyworld.world.make_prompt(rng)
            if prompt not in known:
                prompts[prompt] = " " + tinyworld.world.sample_answer(prompt, rng)
        return [{"prompt": prompt, "completion": answer} for prompt, answer in prompts.items()]

    def start(self, seed: int) -> Path:
        self.experiment(seed).run([])
        return self.folder / f"seed{seed}" / "seqkd"

    def gad_config(self, folder: Path, seed: int, **settings) -> GADConfig:
        common = tinyworld_ablations.COMMON | {"discriminator": self.teacher_model(seed)}
        return tinyworld_ablations.config(folder, seed, **common | settings)

    def preference_config(self, folder: Path, seed: int, **settings) -> PreferenceKDConfig:
        common = tinyworld_ablations.COMMON
        return PreferenceKDConfig(
            str(folder),
            per_device_train_batch_size=64,
            sample_batch_size=1000,
            max_completion_length=self.max_new_tokens,
            lr_scheduler_type=common["lr_scheduler_type"],
            max_grad_norm=common["max_grad_norm"],
            **self.discriminator_arguments(seed),
            **PREFERENCES,
            **evidence_arguments(seed),
            num_generations=self.samples_a_prompt,
            **{"num_train_epochs": self.preference_epochs} | settings,
        )

    def discriminator_arguments(self, seed: int) -> dict:
        names = (
            "discriminator_head",
            "discriminator_learning_rate",
            "discriminator_max_grad_norm",
            "discriminator_batch_size",
        )
        return {name: tinyworld_ablations.COMMON[name] for name in names} | {"discriminator": self.teacher_model(seed)}

    def teacher_model(self, seed: int) -> str:
        """A larger model after SFT on the teacher's answers: GAD's discriminator, or a proxy."""
        return str(self.folder / f"seed{seed}" / "discriminator")

    def proxy_arguments(self, seed: int) -> dict:
        return {
            "proxy_model": self.teacher_model(seed),
            "max_completion_length": self.max_new_tokens,
            "max_steps": 480,
            "per_device_train_batch_size": 64,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            **evidence_arguments(seed),
        }

    def quality(self, prompts: list[str], texts: list[str]) -> list[float]:
        return tinyworld.world.judge(prompts, texts)["valid"]

    def diversity(self, groups: list[list[str]]) -> float:
        return sum(distinct_of_a_prompt(tuple(group)) for group in groups) / len(groups)


@functools.cache
def distinct_of_a_prompt(texts: tuple[str, ...]) -> float:
    return distinct_ngrams(texts, 3)


class Stories(World):
    """Stories of 15 M parameters told by 260 k; the judge is the teacher's likelihood, diversity that of words' 4-grams."""

    title = "Stories: students of one start, sampled at several temperatures"
    quality_name, diversity_name = (
        "the teacher's log-likelihood, nats a character",
        "distinct 4-grams of an answer to each prompt",
    )
    temperatures = (1.0, 0.8, 0.6)
    num_samples, samples_a_prompt, preference_epochs = 2, 2, 1.0

    def __init__(self, folder: Path, student: str, teacher: str, data: str):
        self.folder, self.student = folder, student
        self.args = real_text.parse_args(["--student", student, "--teacher", teacher, "--data", data])
        self.max_new_tokens = self.args.max_completion_length
        self.tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
        self.judge_tokenizer = AutoTokenizer.from_pretrained(teacher)
        self.judge = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
        train, validation, test = real_text.split_rows(data, self.args.test_prompts, self.args.validation_prompts)
        tokenize = functools.partial(
            tokenize_teacher_data, tokenizer=self.tokenizer, max_completion_length=self.max_new_tokens
        )
        self.train = tokenize(Dataset.from_list(train))[0]
        self.held_out = {
            name: tokenize(Dataset.from_list(rows))[0].to_list()
            for name, rows in (("validation", validation), ("test", test))
        }

    def start(self, seed: int) -> Path:
        folder = self.folder / f"seed{seed}" / "seqkd"
        if not (folder / "config.json").is_file():
            args = self.args
            real_text.train_sft(
                self.student,
                args,
                seed,
                self.train,
                self.tokenizer,
                folder,
                args.sft_steps,
                args.sft_learning_rate,
            )
        return folder

    def gad_config(self, folder: Path, seed: int, **settings) -> GADConfig:
        rate = {"learning_rate": settings.pop("learning_rate", self.args.learning_rate)}
        return real_text.gad_config(Namespace(**vars(self.args) | rate), seed, folder, **settings)

    def preference_config(self, folder: Path, seed: int, **settings) -> PreferenceKDConfig:
        return PreferenceKDConfig(
            str(folder),
            per_device_train_batch_size=16,
            max_completion_length=self.max_new_tokens,
            max_grad_norm=1.0,
            discriminator_head="likelihood",
            discriminator_learning_rate=self.args.discriminator_learning_rate,
            discriminator_max_grad_norm=1.0,
            **PREFERENCES,
            **evidence_arguments(seed),
            num_generations=self.samples_a_prompt,
            **{"num_train_epochs": self.preference_epochs} | settings,
        )

    def quality(self, prompts: list[str], texts: list[str]) -> list[float]:
        """Less the nats a character."""
        nlls = real_text.judge_nlls(self.judge, self.judge_tokenizer, prompts, texts)
        return [-nll / max(len(text), 1) for nll, text in zip(nlls, texts, strict=True)]

    def diversity(self, groups: list[list[str]]) -> float:
        draws = list(zip(*groups, strict=True))
        return sum(distinct_ngrams(draw) for draw in draws) / len(draws)
