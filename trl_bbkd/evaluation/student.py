"""What a student says to held-out prompts: sampling it, judging the samples, and its likelihood of the teacher's text."""

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.splitting import input_key, rows_by_input
from ..data.teacher_data import answer_text, end_token_id, prompt_ids_of, prompt_token_ids
from ..errors import JudgeError, kind_of
from ..host._compat import wait_for_each_other
from .bars import TokensAsTheyCome, progress_bar_of
from .processes import place, shared
from .vllm import TrainersVLLM


TEMPERATURES = (1.0, 0.7, 0.0)
SECONDS_WITHOUT_A_BAR = 5
SEED_OF_A_PROCESS = 1_000_003  # apart, so that no process draws another's random numbers in a later measurement

# (prompts, completions) -> {"valid": [1.0, 0.0, ...], ...}, one number a completion
SampleMetrics = Callable[[list, list[str]], dict[str, list[float]]]


def temperature_name(temperature: float) -> str:
    """How a temperature is written in the name of a metric: `t1.0`, `t0.7`, `greedy`."""
    return "greedy" if temperature == 0 else f"t{temperature}"


@contextlib.contextmanager
def without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """
    Let a mixture of experts generate. With `output_router_logits` in its configuration it would compute its balancing loss of
    every single new token, which transformers cannot.
    """
    config = model.config.get_text_config()
    asked = getattr(config, "output_router_logits", False)
    if asked:
        config.output_router_logits = False
    try:
        yield
    finally:
        if asked:
            config.output_router_logits = asked


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    chat_template_kwargs: dict | None = None,
    prompt_ids: list[list[int]] | None = None,
) -> list[list[str]]:
    """
    Sample completions. The global random state and the model's mode are as before afterwards.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The student.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`list`):
            Strings or lists of messages.
        max_new_tokens (`int`):
            Length limit of a completion.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; `0` is greedy decoding, of which there is one sample whatever `num_samples`.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.
        num_samples (`int`, *optional*, defaults to `1`):
            Completions per prompt.
        batch_size (`int`, *optional*, defaults to `32`):
            Completions generated at once. Samples depend on it through the order of random numbers.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
        chat_template_kwargs (`dict`, *optional*):
            Passed to `apply_chat_template`.
        prompt_ids (`list[list[int]]`, *optional*):
            The prompts' token ids, as the rows of [`~data.teacher_data.tokenize_teacher_data`] have them. By default, the
            prompts are tokenised here.

    Returns:
        `list[list[str]]`: for each prompt its completions, without special tokens.
    """
    ids = generate_completion_ids(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        chat_template_kwargs=chat_template_kwargs,
        prompt_ids=prompt_ids,
    )
    return [tokenizer.batch_decode(samples, skip_special_tokens=True) for samples in ids]


@torch.no_grad()
def generate_completion_ids(
    model,
    tokenizer,
    prompts,
    *,
    max_new_tokens,
    temperature=1.0,
    top_p=1.0,
    num_samples=1,
    batch_size=32,
    seed=0,
    chat_template_kwargs=None,
    prompt_ids=None,
    progress_bar: str | None = None,
    is_shared: bool = False,
    vllm: TrainersVLLM | None = None,
) -> list[list[list[int]]]:
    """
    [`generate_completions`], as token ids up to and including the token that ends an answer. `progress_bar` is the text
    before a bar of their tokens; `None` shows none. With `is_shared` the processes of a run, all of which call it
    with the same prompts, share the work. `vllm`, which holds the model, samples in its place, on all processes.
    """
    num_samples = num_samples if temperature > 0 else 1
    end_ids = end_token_ids(model, tokenizer, prompts[0])
    if vllm is not None:
        return vllm.sample(
            prompt_token_ids(tokenizer, prompts, chat_template_kwargs) if prompt_ids is None else prompt_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            num_samples=num_samples,
            end_ids=end_ids,
            seed=seed,
            progress_bar=progress_bar,
        )
    pad_id = end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    # Everything is stated, because generate() takes what is left open from the checkpoint's own settings.
    config = GenerationConfig(
        **{"do_sample": False, "temperature": 1.0, "top_p": 1.0, **sampling},
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
        use_cache=True,
        disable_compile=True,
    )
    if prompt_ids is None:
        prompt_ids = prompt_token_ids(tokenizer, prompts, chat_template_kwargs)
    # Neighbours of like length need little padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompt_ids[index]))
    queue = [index for index in order for _ in range(num_samples)]
    completions: list[list[list[int]]] = [[] for _ in prompts]

    was_training = model.training
    model.eval()
    wait_for_each_other(model)
    devices = [model.device] if model.device.type != "cpu" else []
    bar = progress_bar_of(len(queue) * max_new_tokens, progress_bar, "token")
    at_once = place()[1] if is_shared else 1

    def generate(indices: list[int]) -> list[list[int]]:
        input_ids, attention_mask = pad_rows(
            [prompt_ids[index] for index in indices], pad_id, model.device, side="left"
        )
        streamer = None if bar.disable else TokensAsTheyCome(bar, end_ids, max_new_tokens, at_once)
        with without_router_logits(model):
            output = model.generate(
                input_ids=input_ids, attention_mask=attention_mask, generation_config=config, streamer=streamer
            )
        rows = output[:, input_ids.shape[1] :].tolist()
        lengths = [next((i + 1 for i, token in enumerate(row) if token in end_ids), len(row)) for row in rows]
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    batches = [queue[start : start + batch_size] for start in range(0, len(queue), batch_size)]
    with bar, torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        torch.manual_seed(seed + SEED_OF_A_PROCESS * place()[0] * is_shared)
        results = shared(batches, generate) if is_shared else list(map(generate, batches))
    for index, ids in zip(queue, itertools.chain.from_iterable(results), strict=True):
        completions[index].append(ids)
    model.train(was_training)
    return completions


def end_token_ids(model, tokenizer, prompt: str | list) -> list[int]:
    """The tokens that end an answer to `prompt`: the teacher's answers', the tokenizer's and the model's own."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else own
    return list(dict.fromkeys([end_token_id(tokenizer, prompt), tokenizer.eos_token_id, *own]))


def with_one_end(ids: list[int], ends: list[int], end: int) -> list[int]:
    """
    A student's answer that ends as the teacher's do: a model may end its own with any of several tokens, and which one is
    no sign of quality.
    """
    return [*ids[:-1], end] if ids and ids[-1] in ends else list(ids)


def pad_rows(rows: list[list[int]], pad_id: int, device, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both of shape `(B, L)`, padded on `side` (`"left"` or `"right"`)."""
    tensors = [torch.tensor(row) for row in rows]
    masks = [torch.ones_like(tensor) for tensor in tensors]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(tensors, batch_first=True, padding_value=pad_id, padding_side=side)
    return ids.to(device), pad(masks, batch_first=True, padding_side=side).to(device)


def _prompt_ids(tokenizer, rows: list[dict], chat_template_kwargs: dict | None) -> list[list[int]]:
    batch = {column: [row[column] for row in rows] for column in rows[0]}
    return prompt_ids_of(tokenizer, batch, chat_template_kwargs)


def teacher_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    *,
    batch_size: int = 32,
    chat_template_kwargs: dict | None = None,
) -> float:
    """
    Mean negative log-likelihood, in nats per token, of the teacher's answers (the token that ends them included).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The student. Logits of one batch at a time are in memory.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        rows (`list[dict]`):
            Rows with `prompt` and `teacher_ids`.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows per forward pass.
        chat_template_kwargs (`dict`, *optional*):
            Passed to `apply_chat_template`.
    """
    totals = teacher_nll_by_row(
        model, tokenizer, rows, batch_size=batch_size, chat_template_kwargs=chat_template_kwargs
    )
    return sum(totals) / sum(len(row["teacher_ids"]) for row in rows)


@torch.no_grad()
def teacher_nll_by_row(
    model,
    tokenizer,
    rows,
    *,
    batch_size=32,
    chat_template_kwargs=None,
    progress_bar: str | None = None,
    is_shared: bool = False,
) -> list[float]:
    """
    [`teacher_nll`] before its mean: the sum over the tokens of each row's answer. `progress_bar` and `is_shared` are as in
    [`generate_completion_ids`]; there is no bar of what takes a few seconds.
    """
    prompt_ids = _prompt_ids(tokenizer, rows, chat_template_kwargs)
    pairs = [(prompt, list(row["teacher_ids"])) for prompt, row in zip(prompt_ids, rows, strict=True)]
    order = sorted(range(len(pairs)), key=lambda row: len(pairs[row][0]) + len(pairs[row][1]))
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    was_training = model.training
    model.eval()

    def nll(numbers: list[int]) -> list[float]:
        batch = [pairs[row] for row in numbers]
        input_ids, attention_mask = pad_rows([p + a for p, a in batch], pad_id, model.device, side="right")
        labels, _ = pad_rows([[-100] * len(p) + a for p, a in batch], -100, model.device, side="right")
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2).float(), labels[:, 1:], reduction="none")
        bar.update(min(len(numbers) * at_once, bar.total - bar.n))
        return losses.sum(dim=1).tolist()

    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    at_once = place()[1] if is_shared else 1
    with progress_bar_of(len(order), progress_bar, "answer", delay=SECONDS_WITHOUT_A_BAR) as bar:
        results = shared(batches, nll) if is_shared else list(map(nll, batches))
    found = dict(zip(order, itertools.chain.from_iterable(results), strict=True))
    model.train(was_training)
    return [found[row] for row in range(len(pairs))]


def evaluate_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    sample_metrics: SampleMetrics | None = None,
    *,
    max_new_tokens: int,
    temperatures: Sequence[float] = TEMPERATURES,
    num_samples: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    chat_template_kwargs: dict | None = None,
    by_row: dict[str, list[float]] | None = None,
    samples: dict[str, list[list[str]]] | None = None,
    progress_bar: str | None = None,
    vllm: TrainersVLLM | None = None,
) -> dict[str, float]:
    """
    Measure a student on held-out teacher rows. The processes of a run share the work, so that all of them must call this; the
    judge is asked on the main process.

    Args:
        model, tokenizer, max_new_tokens, num_samples, batch_size, seed, chat_template_kwargs:
            As in [`generate_completions`].
        rows (`list[dict]`):
            Held-out rows with `prompt` and `teacher_ids`. A prompt that several share is sampled as if it were in one; the
            NLL is that of all its answers.
        sample_metrics (`Callable`, *optional*):
            Judge: `(prompts, completions) -> {name: [one number a completion]}`. Its first metric decides which
            answers are valid (those at 1).
        temperatures (`Sequence[float]`, *optional*, defaults to `(1.0, 0.7, 0.0)`):
            Temperatures to sample at. Answers are told apart at the first one.
        by_row (`dict[str, list[float]]`, *optional*):
            Filled with each metric of the answers (the mean over a prompt's samples, of `distinct_valid` their number), one
            value a prompt, in the order in which rows have them first; and with `teacher_nll` (the mean over the answer's
            tokens), one a row.
        samples (`dict[str, list[list[str]]]`, *optional*):
            Filled with each temperature's answers, a list for each prompt.
        progress_bar (`str`, *optional*):
            Text before bars of the tokens sampled and of the answers whose likelihood was measured. `None` shows none.
        vllm ([`~evaluation.vllm.TrainersVLLM`], *optional*):
            Samples in the model's place.

    Returns:
        `dict[str, float]`: for each temperature, such as `t1.0`: the mean of each metric of the judge (`valid@t1.0`),
        `length@t1.0` (tokens, end-of-sequence token included), `length_ratio@t1.0` (to the teacher's answers),
        `truncated@t1.0` (share of answers cut at `max_new_tokens`); at the first temperature `distinct_valid@t1.0`, the number
        of different valid pairs of prompt and answer, or without a judge `distinct_share@t1.0`, different pairs out of
        all; and `teacher_nll`. Empty on processes other than the main one.

    Raises:
        `ValueError`: the judge returned nothing, or not one number a completion.
    """
    metrics: dict[str, float] = {}
    is_main_process = place()[0] == 0
    prompt_ids = _prompt_ids(tokenizer, rows, chat_template_kwargs)
    groups = rows_by_input(map(tuple, prompt_ids))
    prompt_ids = [prompt_ids[numbers[0]] for numbers in groups]
    prompts = [rows[numbers[0]]["prompt"] for numbers in groups]
    teacher_length = _mean_over_prompts([len(row["teacher_ids"]) for row in rows], groups)
    end_ids = end_token_ids(model, tokenizer, prompts[0])
    with contextlib.nullcontext() if vllm is None else vllm.holding(model):
        for temperature in temperatures:
            at = temperature_name(temperature)
            grouped = generate_completion_ids(
                model,
                tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                num_samples=num_samples,
                batch_size=batch_size,
                seed=seed,
                prompt_ids=prompt_ids,
                progress_bar=None if progress_bar is None else f"{progress_bar}, {at}",
                is_shared=True,
                vllm=vllm,
            )
            if not is_main_process:
                continue
            answers = [ids for group in grouped for ids in group]
            sampled_prompts = [prompt for prompt, group in zip(prompts, grouped, strict=True) for _ in group]
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            values = {
                "length": [float(len(ids)) for ids in answers],
                "truncated": [float(ids[-1] not in end_ids) for ids in answers],
            }
            pairs = [(str(prompt), text) for prompt, text in zip(sampled_prompts, texts, strict=True)]
            judged = {} if sample_metrics is None else judge(sample_metrics, sampled_prompts, texts)
            if temperature == temperatures[0] and judged:
                valid = [value == 1 for value in next(iter(judged.values()))]
                is_new = first_times(list(zip(pairs, valid, strict=True)))
                values["distinct_valid"] = [float(new and good) for new, good in zip(is_new, valid, strict=True)]
            elif temperature == temperatures[0]:
                values["distinct_share"] = list(map(float, first_times(pairs)))
            values = judged | values
            means = {f"{name}@{at}": sum(found) / len(found) for name, found in values.items()}
            if "distinct_valid" in values:
                means[f"distinct_valid@{at}"] = int(sum(values["distinct_valid"]))
            metrics |= means | {f"length_ratio@{at}": means[f"length@{at}"] / teacher_length}
            if by_row is not None:
                by_row |= {f"{name}@{at}": _means(found, len(prompts)) for name, found in values.items()}
            if by_row is not None and "distinct_valid" in values:
                by_row[f"distinct_valid@{at}"] = [len(grouped[0]) * mean for mean in by_row[f"distinct_valid@{at}"]]
            if samples is not None:
                samples[at] = [
                    texts[start : start + len(grouped[0])] for start in range(0, len(texts), len(grouped[0]))
                ]
    totals = teacher_nll_by_row(
        model,
        tokenizer,
        rows,
        batch_size=batch_size,
        chat_template_kwargs=chat_template_kwargs,
        progress_bar=None if progress_bar is None else f"{progress_bar}, teacher NLL",
        is_shared=True,
    )
    if not is_main_process:
        return {}
    lengths = [len(row["teacher_ids"]) for row in rows]
    metrics["teacher_nll"] = sum(totals) / sum(lengths)
    if by_row is not None:
        by_row["teacher_nll"] = [total / length for total, length in zip(totals, lengths, strict=True)]
    return metrics


def first_times(items: Sequence[Hashable]) -> list[bool]:
    """Of each item, whether it is none that came before."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(item, number) == number for number, item in enumerate(items)]


def _means(values: list[float], prompts: int) -> list[float]:
    """The mean of each prompt's samples, which are neighbours."""
    samples = len(values) // prompts
    return [sum(values[prompt * samples : (prompt + 1) * samples]) / samples for prompt in range(prompts)]


def _mean_over_prompts(values: Sequence[float], groups: list[list[int]]) -> float:
    """The mean of what rows have, in which a prompt weighs as one, however many rows share it."""
    return sum(sum(values[number] for number in numbers) / len(numbers) for numbers in groups) / len(groups)


def evaluate_teacher(
    rows: list[dict],
    sample_metrics: SampleMetrics | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    temperature: float = TEMPERATURES[0],
) -> dict[str, float]:
    """
    The teacher's own held-out answers under the same judge: the reference of the table, as if sampled once. Several answers
    to a prompt weigh as one.

    Args:
        rows (`list[dict]`):
            Held-out rows with `prompt`, `completion` and `teacher_ids`.
        sample_metrics (`Callable`, *optional*):
            As in [`evaluate_student`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer: the judge sees conversational answers as a student writes them, with what the chat
            template adds, such as reasoning. By default it sees the text of the messages.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the students, beside which the answers stand: metrics are named after it.
    """
    texts = [answer_text(row["completion"]) for row in rows]
    if tokenizer is not None and not isinstance(rows[0]["prompt"], str):
        texts = tokenizer.batch_decode([row["teacher_ids"] for row in rows], skip_special_tokens=True)
    # Prompts that are not tokenised yet are compared as they are written
    groups = rows_by_input(input_key(row.get("prompt_ids", row["prompt"])) for row in rows)
    at = temperature_name(temperature)
    length = _mean_over_prompts([len(row["teacher_ids"]) for row in rows], groups)
    metrics = {f"length@{at}": length, f"length_ratio@{at}": 1.0}
    if sample_metrics is not None:
        judged = judge(sample_metrics, [row["prompt"] for row in rows], texts)
        metrics |= {f"{name}@{at}": _mean_over_prompts(values, groups) for name, values in judged.items()}
    return metrics


def judge(sample_metrics: SampleMetrics, prompts: list, texts: list[str]) -> dict[str, list[float]]:
    """Call the judge and check what it returns: numbers, one a text."""
    judged = sample_metrics(prompts, texts)
    if not isinstance(judged, dict):
        raise JudgeError(
            f"`sample_metrics` must return a dict of lists, one for each metric by its name; got {type(judged).__name__}."
        )
    lengths = {name: len(values) if hasattr(values, "__len__") else kind_of(values) for name, values in judged.items()}
    if not lengths or any(length != len(texts) for length in lengths.values()):
        raise JudgeError(
            f"`sample_metrics` must return a dict of lists with one number for each of the {len(texts)} completions; "
            f"it returned lists of lengths {lengths}."
        )
    try:
        return {name: [float(value) for value in values] for name, values in judged.items()}
    except (TypeError, ValueError) as error:
        raise JudgeError(f"`sample_metrics` must return numbers only: {error}.") from error
