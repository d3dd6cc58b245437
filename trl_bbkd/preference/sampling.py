"""A model's own answers to the prompts of a round: made in bulk, kept on disk, never made twice."""

import json
from pathlib import Path

from accelerate import PartialState
from tqdm.auto import tqdm

from ..data.teacher_data import end_token_id
from ..evaluation.student import end_token_ids, generate_completion_ids, with_one_end
from ..host.files import write_atomically


BATCHES_PER_FILE = 4


def sample_completions(
    folder: str | Path, rows: list[dict], generate, batch_size: int, seed: int, role: str
) -> list[list[int]]:
    """
    Sample an answer to each row's prompt. What is in `folder` already is read, not made again.

    Args:
        folder (`str` or `Path`):
            Where samples are kept, a JSON Lines file for every few batches, each written in one piece.
        rows (`list[dict]`):
            Rows with `prompt`, `completion` and what `generate` needs.
        generate (`Callable[[list[dict], int], tuple[list[list[int]], list[str]]]`):
            Makes token ids and texts for some rows, with a seed.
        batch_size (`int`):
            Samples made at once.
        seed (`int`):
            Seed; every file has one of its own, so that its samples do not depend on which were made before.
        role (`str`):
            What the model is, such as `"proxy"`: the name of its samples in the files.

    Returns:
        `list[list[int]]`: token ids of each row's sample.
    """
    folder, state, size = Path(folder), PartialState(), BATCHES_PER_FILE * batch_size
    folder.mkdir(parents=True, exist_ok=True)
    parts = [(number, rows[start : start + size]) for number, start in enumerate(range(0, len(rows), size))]
    missing = [(number, part) for number, part in parts if not _file(folder, number).is_file()]
    state.wait_for_everyone()
    own = missing[state.process_index :: state.num_processes]
    for number, part in tqdm(own, desc=f"Sampling from the {role}", disable=not state.is_main_process or not own):
        ids, texts = generate(part, seed + number)
        lines = [
            {"prompt": row["prompt"], "teacher": row["completion"], role: text, f"{role}_ids": sample}
            for row, text, sample in zip(part, texts, ids, strict=True)
        ]
        _write(_file(folder, number), lines)
    state.wait_for_everyone()
    return [line[f"{role}_ids"] for number, _ in parts for line in read_samples(_file(folder, number))]


def read_samples(path: Path) -> list[dict]:
    """The samples in a file: `prompt`, `teacher`, and text and token ids of the model's answer."""
    # Not `splitlines`, which also splits at characters that JSON leaves as they are
    with open(path, encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.jsonl"


def _write(path: Path, lines: list[dict]) -> None:
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


class ModelSampler:
    """Samples with transformers, from a model in memory. The arguments are those of [`~evaluation.student.generate_completions`]."""

    def __init__(self, model, tokenizer, *, max_new_tokens, temperature, top_p, batch_size):
        self.model, self.tokenizer = model, tokenizer
        self.settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "batch_size": batch_size,
        }

    def __call__(self, rows: list[dict], seed: int) -> tuple[list[list[int]], list[str]]:
        prompts, prompt_ids = [row["prompt"] for row in rows], [row["prompt_ids"] for row in rows]
        groups = generate_completion_ids(
            self.model, self.tokenizer, prompts, seed=seed, prompt_ids=prompt_ids, **self.settings
        )
        ends = end_token_ids(self.model, self.tokenizer, prompts[0])
        end = end_token_id(self.tokenizer, prompts[0])
        ids = [with_one_end(group[0], ends, end) for group in groups]
        return ids, self.tokenizer.batch_decode(ids, skip_special_tokens=True)


class VLLMSampler:
    """
    Samples with vLLM in this process, from a checkpoint on disk, with the same settings as [`ModelSampler`]. Several
    processes have one each, on their own device.
    """

    def __init__(
        self,
        path: str,
        tokenizer,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        adapter: str | None = None,
        vllm_kwargs: dict | None = None,
    ):
        from vllm import LLM, SamplingParams

        self.tokenizer = tokenizer
        # It would start processes of its own, and not know which device is this one's
        own = {"distributed_executor_backend": "external_launcher"} if PartialState().num_processes > 1 else {}
        self.llm = LLM(model=path, enable_lora=adapter is not None, **own | (vllm_kwargs or {}))
        self.parameters = lambda seed, end: SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, seed=seed, stop_token_ids=[end]
        )
        self.request = {}
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self.request = {"lora_request": LoRARequest("adapter", 1, adapter)}

    def __call__(self, rows: list[dict], seed: int) -> tuple[list[list[int]], list[str]]:
        inputs = [{"prompt_token_ids": list(row["prompt_ids"])} for row in rows]
        eos, end = self.tokenizer.eos_token_id, end_token_id(self.tokenizer, rows[0]["prompt"])
        parameters = [self.parameters(seed + row, end) for row in range(len(inputs))]
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False, **self.request)
        ids = [with_one_end(list(output.outputs[0].token_ids), [eos, end], end) for output in outputs]
        return ids, self.tokenizer.batch_decode(ids, skip_special_tokens=True)
