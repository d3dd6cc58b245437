import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.answers import AnswersByPrompt
from ..data.splitting import input_key
from ..discriminator.checks import check_vocabulary
from ..errors import TeacherDataError
from ..host._compat import get_config_model_id, print_prompt_completions_sample, whole_models
from ..host.model_files import load_model
from ..host.model_paths import no_model
from ..host.sharding import is_sharded
from ..preference.trainer import SAMPLES_FOLDER, PreferenceRoundsTrainer
from .comparing import ComparingJudge
from .config import DISCRIMINATOR, OVERLAP, SELF, TEACHER, PreferenceKDConfig
from .discriminating import METRICS_FILE, DiscriminatorJudge, trained_judge
from .judges import FunctionJudge, Judge, Judged, JudgeFunction, OverlapJudge
from .pairs import preferred_pairs
from .rounds import (
    CANDIDATES_FILE,
    PAIRS_FILE,
    SCORES_FOLDER,
    forget_parts,
    judged_in_blocks,
    keep_table,
    kept_table,
    round_report,
)


class JudgedRounds(PreferenceRoundsTrainer):
    """
    Rounds whose pairs a judge makes of the student's own samples, or of the teacher's answer and a sample.

    A method sets `_judge_function` before it calls the constructor.
    """

    args: PreferenceKDConfig

    _judge_function: JudgeFunction | None
    _references: dict[str, list[str]] | None = None
    _answer_length = 1.0  # mean length of the teacher's answers that are trained on, in tokens

    def _shard(self, number: int) -> Dataset:
        return self._teacher_rows.shard(self.args.num_rounds, number - 1, contiguous=True)

    def _pairs(self, shard: Dataset, folder: Path, number: int) -> Dataset:
        pairs = kept_table(folder / PAIRS_FILE)
        if pairs is None:
            pairs = self._make_pairs(shard, folder, number)
            keep_table(pairs, folder / PAIRS_FILE)
            forget_parts(folder / SAMPLES_FOLDER, folder / SCORES_FOLDER)
        if len(pairs) == 0:
            raise TeacherDataError(
                f"Round {number} has no pair: no two samples of a prompt differ enough for judge={self.args.judge!r}. Raise "
                "sample_temperature or num_generations, or lower pair_margin."
            )
        if self.args.log_completions and self.accelerator.is_main_process:
            self._print_pairs(pairs, number)
        self._answer_length = mean(map(len, pairs["teacher_ids"]))
        # Whether a judge has drawn random numbers or the pairs were there already
        set_seed(self.args.seed + number)
        needs_answers = self.args.judge != TEACHER and self.args.sft_weight > 0
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"] + ["teacher_ids"] * needs_answers
        return pairs.select_columns(columns)

    def _make_pairs(self, shard: Dataset, folder: Path, number: int) -> Dataset:
        rows = self._judged_rows(shard, self._candidates(shard, folder, number))
        if self.args.judge == TEACHER:
            scores = None
            pairs = [teacher_pair(row, each) for row in rows for each in range(len(row.candidates))]
        else:
            with self._judge(rows, number) as judge:
                scores = judged_in_blocks(folder / SCORES_FOLDER, rows, judge, self.args.judge_batch_size)
            pairs = [pair for row, found in zip(rows, scores, strict=True) for pair in self._pairs_of(row, found)]
        table = {
            "prompt": [row.prompt for row in rows],
            "teacher": [row.references[0] for row in rows],
            "candidates": [row.candidates for row in rows],
            "candidate_ids": [row.candidate_ids for row in rows],
        }
        keep_table(
            Dataset.from_dict(table if scores is None else {**table, "scores": scores}), folder / CANDIDATES_FILE
        )
        return Dataset.from_list(pairs) if pairs else Dataset.from_dict({"teacher_ids": []})

    def _candidates(self, shard: Dataset, folder: Path, number: int) -> list[list[list[int]]]:
        """Token ids of the student's samples of each row."""
        count = self.args.num_generations
        rows = shard.select([row for row in range(len(shard)) for _ in range(count)])
        ids = self._sample(rows, folder, number)
        return [ids[start : start + count] for start in range(0, len(ids), count)]

    def _judged_rows(self, shard: Dataset, candidates: list[list[list[int]]]) -> list[Judged]:
        decode = self.processing_class.batch_decode
        own = decode(list(shard["teacher_ids"]), skip_special_tokens=True)
        answers = AnswersByPrompt(self._teacher_rows)
        rows = zip(shard["prompt"], shard["prompt_ids"], shard["teacher_ids"], own, candidates, strict=True)
        return [
            Judged(
                prompt=prompt,
                candidates=decode(samples, skip_special_tokens=True),
                references=list(dict.fromkeys([answer, *self._answers_to(prompt)])),
                prompt_ids=prompt_ids,
                candidate_ids=samples,
                teacher_ids=teacher_ids,
                answers_ids=answers(prompt_ids, teacher_ids),
            )
            for prompt, prompt_ids, teacher_ids, answer, samples in rows
        ]

    def _answers_to(self, prompt: str | list[dict]) -> list[str]:
        """All answers of the teacher to a prompt, of whichever round."""
        if self._references is None:
            texts = self.processing_class.batch_decode(
                list(self._teacher_rows["teacher_ids"]), skip_special_tokens=True
            )
            self._references = {}
            for other, text in zip(self._teacher_rows["prompt"], texts, strict=True):
                self._references.setdefault(input_key(other), []).append(text)
        return self._references[input_key(prompt)]

    @contextlib.contextmanager
    def _judge(self, rows: list[Judged], number: int) -> Iterator[Judge]:
        """The judge of round `number`, for these rows."""
        args = self.args
        if self._judge_function is not None:
            yield FunctionJudge(self._judge_function)
        elif args.judge == OVERLAP:
            yield OverlapJudge(args.overlap_metric)
        elif args.judge == DISCRIMINATOR:
            yield self._discriminator_judge(rows, number)
        else:
            with self._judging_model() as (model, tokenizer), self.accelerator.autocast():
                batch_size, kwargs = args.per_device_eval_batch_size, args.chat_template_kwargs
                yield ComparingJudge(model, tokenizer, args.judge_question, batch_size, kwargs)
        gc.collect()
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _judging_model(self) -> Iterator[tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]]:
        """A model that compares, with its tokenizer: the student as it is, or one from disk, whole on every process."""
        if self.args.judge == SELF:
            with self._whole() as student:
                yield student, self.processing_class
            return
        trust = {"trust_remote_code": self.args.trust_remote_code}
        with whole_models():
            model = load_model(self.args.judge, dtype="bfloat16" if self.args.bf16 else "float32", **trust)
        tokenizer = AutoTokenizer.from_pretrained(self.args.judge, **trust)
        yield model.to(self.accelerator.device), tokenizer

    def _discriminator_judge(self, rows: list[Judged], number: int) -> DiscriminatorJudge:
        student = self._unwrapped()
        student = student.get_base_model() if isinstance(student, PeftModel) else student
        return trained_judge(
            rows,
            self._disk.folder(number),
            self._disk.folder(number - 1),
            self.args,
            student,
            get_config_model_id(student.config),
            self._tokenizer.pad_token_id,
            # Of its own: the student's would keep the discriminator in memory
            Accelerator(mixed_precision=self.accelerator.mixed_precision),
        )

    def _pairs_of(self, row: Judged, scores: list[float]) -> list[dict[str, Any]]:
        args = self.args
        numbers = preferred_pairs(
            scores,
            [len(ids) for ids in row.candidate_ids],
            every=args.pairing == "margin",
            margin=args.pair_margin,
            max_length_ratio=args.pair_max_length_ratio,
        )
        return [
            {
                "prompt": row.prompt,
                "chosen": row.candidates[better],
                "rejected": row.candidates[worse],
                "teacher": row.references[0],
                "chosen_score": scores[better],
                "rejected_score": scores[worse],
                "prompt_ids": row.prompt_ids,
                "chosen_ids": row.candidate_ids[better],
                "rejected_ids": row.candidate_ids[worse],
                "teacher_ids": row.teacher_ids,
            }
            for better, worse in numbers
        ]

    def _print_samples(self, rows: list[dict], ids: list[list[int]], number: int) -> None:
        """The pairs that are made of them are printed."""

    def _print_pairs(self, pairs: Dataset, number: int) -> None:
        shown = pairs[: self.args.num_completions_to_print]
        scores = {name: shown[name] for name in ("chosen_score", "rejected_score") if name in shown}
        print_prompt_completions_sample(
            shown["prompt"],
            shown["chosen"],
            scores,
            None,
            number,
            extra={name: shown[name] for name in ("rejected", "teacher")},
        )

    @property
    def round_reports(self) -> list[dict[str, Any]]:
        """
        What each finished round trained on: `prompts`, `samples` and `pairs`, counted; `score`, the mean over the samples, and
        over the pairs `chosen_score`, `rejected_score`, `chosen_length` and `rejected_length`; and `examples`, some pairs.
        """
        folders = {entry["round"]: self._disk.folder(entry["round"]) for entry in self.rounds if entry["round"] > 0}
        found = []
        for number, folder in folders.items():
            report = round_report(kept_table(folder / CANDIDATES_FILE), kept_table(folder / PAIRS_FILE))
            metrics = folder / METRICS_FILE
            if metrics.is_file():
                report["discriminator"] = json.loads(metrics.read_text(encoding="utf-8"))
            found.append({"round": number, **report})
        return found


def teacher_pair(row: Judged, sample: int) -> dict[str, Any]:
    """The teacher's answer over a sample."""
    return {
        "prompt": row.prompt,
        "chosen": row.references[0],
        "rejected": row.candidates[sample],
        "teacher": row.references[0],
        "prompt_ids": row.prompt_ids,
        "chosen_ids": row.teacher_ids,
        "rejected_ids": row.candidate_ids[sample],
        "teacher_ids": row.teacher_ids,
    }


def check_judge(
    args: PreferenceKDConfig,
    function: JudgeFunction | None,
    student: str | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """
    Refuse a judge that will not be able to judge, before anything is loaded.

    Raises:
        TypeError: it is no function.
        ImportError: it needs a package that is not installed.
        ValueError: no such judge, or one that cannot be trained here.
    """
    if function is not None:
        if not callable(function):
            raise TypeError(f"judge is {function!r}, which cannot be called: hand in a function, or set args.judge.")
        return
    if args.judge == OVERLAP:
        OverlapJudge(args.overlap_metric)
    if args.judge == DISCRIMINATOR:
        if is_sharded(args):
            raise ValueError(
                "judge='discriminator' trains a model beside the student that FSDP and DeepSpeed do not shard yet. Use plain data "
                "parallelism (--accelerate_config ddp), or another judge."
            )
        path = student if isinstance(student, str) else get_config_model_id(student.config)
        if args.discriminator is not None:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
            check_vocabulary(args.discriminator, tokenizer, path, args.trust_remote_code)
    if args.judge in (TEACHER, OVERLAP, SELF, DISCRIMINATOR):
        return
    if ":" in args.judge:
        raise ValueError(f"judge={args.judge!r} is a function for recipes. In Python, hand it in: judge=.")
    try:
        AutoConfig.from_pretrained(args.judge, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(no_model("judge", args.judge, "a model", error)) from error
