"""Fill stores with soft targets, those of a proxy above all."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.student import pad_rows
from .head import last_hidden_states, lm_head, scored_positions
from .kernel import chunked_top_log_probs
from .loss import LMHead
from .store import RowTargets, TargetStore, TargetStoreWriter, bytes_per_token, stored_keys


SAMPLED_ELEMENTS = 65536
ROWS_READ = 10_000


@dataclass
class StoreSpec:
    """
    A store to be filled.

    Args:
        folder (`str` or `Path`):
            Its folder.
        k (`int`):
            Tokens kept per position.
        fingerprint (`dict[str, str]`):
            What its targets depend on, by name.
    """

    folder: str | Path
    k: int
    fingerprint: dict[str, str]


def fill_stores(
    specs: list[StoreSpec],
    rows: Dataset,
    compute: Callable[[list[dict]], list[list[RowTargets]]],
    *,
    batch_size: int = 8,
    description: str,
) -> list[TargetStore]:
    """
    Compute, in one pass, the targets of every row that the stores do not hold yet. Each process does its share.

    Args:
        specs (`list[StoreSpec]`):
            The stores.
        rows ([`~datasets.Dataset`]):
            Rows with `input_ids`, `labels` and `row_key`, and whatever `compute` reads. Rows with the same tokens are
            stored once.
        compute (`Callable[[list[dict]], list[list[RowTargets]]]`):
            From a batch of rows, for each store, the targets of each row.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows of a batch.
        description (`str`):
            Of the progress bar.

    Returns:
        `list[TargetStore]`

    Raises:
        [`~errors.TargetStoreError`]: a folder holds a store made from something else.
    """
    state = PartialState()
    keys = list(rows["row_key"])
    lengths, answer_tokens = row_lengths(rows)
    # Neighbours of like length need little padding; the order does not depend on how often writing was interrupted
    order = sorted({key: index for index, key in enumerate(keys)}.values(), key=lambda i: (lengths[i], keys[i]))
    with contextlib.ExitStack() as stack:
        with state.main_process_first():
            # The main process describes the stores; the others compare
            writers = [
                stack.enter_context(TargetStoreWriter(spec.folder, spec.k, spec.fingerprint, part=state.process_index))
                for spec in specs
            ]
        state.wait_for_everyone()
        done = [stored_keys(spec.folder) for spec in specs]
        state.wait_for_everyone()
        # Batches of all rows, whether stored or not: padding, and so the last digits, are those of an uninterrupted run
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        missing = [
            (number, [i for i in batch if any(keys[i] not in found for found in done)])
            for number, batch in enumerate(batches)
        ]
        own = [(number, batch) for number, batch in missing[state.process_index :: state.num_processes] if batch]
        size = sum(bytes_per_token(spec.k) for spec in specs)
        total = int(sum(answer_tokens[batch].sum() for _, batch in own))
        progress = tqdm(total=total, unit="tok", desc=description, disable=not state.is_main_process)
        stack.enter_context(progress)
        for number, batch in own:
            found = compute([rows[index] for index in batch])
            for writer, stored, targets in zip(writers, done, found, strict=True):
                new = [(keys[i], target) for i, target in zip(batch, targets, strict=True) if keys[i] not in stored]
                if new:
                    writer.append(number, *map(list, zip(*new, strict=True)))
            progress.update(int(answer_tokens[batch].sum()))
            progress.set_postfix_str(f"{progress.n * size / 1e6:.1f} of {total * size / 1e6:.1f} MB")
    state.wait_for_everyone()
    return [TargetStore(spec.folder) for spec in specs]


def row_lengths(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Of each row with `labels`, its tokens and its answer tokens as of [`answer_length`], without Python lists."""
    found = [(np.zeros(0, dtype=np.int64),) * 2]
    for batch in rows.select_columns("labels").with_format("arrow").iter(batch_size=ROWS_READ):
        column = batch["labels"].combine_chunks()
        lengths = column.value_lengths().to_numpy().astype(np.int64)
        scored = np.append(column.flatten().to_numpy() != -100, False)
        starts, before = np.cumsum(lengths) - lengths, np.append(0, np.cumsum(scored))
        found.append((lengths, before[starts + lengths] - before[starts] - (scored[starts] & (lengths > 0))))
    lengths, answers = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return lengths, answers


def answer_length(labels: list[int]) -> int:
    """Answer tokens of a row that are predicted from something: the first token of a sequence is not."""
    return len(labels) - 1 - list(labels[1:]).count(-100)


@torch.no_grad()
def store_targets(
    folder: str | Path,
    proxy: PreTrainedModel,
    rows: Dataset,
    *,
    k: int,
    vocab_size: int,
    fingerprint: dict[str, str],
    batch_size: int = 8,
    pad_id: int = 0,
) -> TargetStore:
    """
    Compute the proxy's soft targets of every row that the store does not hold yet. Each process does its share.

    Args:
        folder, rows, k, fingerprint, batch_size:
            As in [`fill_stores`] and [`StoreSpec`].
        proxy ([`~transformers.PreTrainedModel`]):
            The proxy.
        vocab_size (`int`):
            The student's; the proxy's further ids are padding, and left out before its probabilities are normalised.
        pad_id (`int`, *optional*, defaults to `0`):
            Padding token.

    Returns:
        [`~store.TargetStore`]

    Raises:
        [`~errors.TargetStoreError`]: the folder holds a store made from something else.
    """
    was_training = proxy.training
    proxy.eval()
    head = shared_head(lm_head(proxy), vocab_size)

    def compute(batch: list[dict]) -> list[list[RowTargets]]:
        hidden, labels, counts = answer_hidden_states(proxy, batch, pad_id)
        found = chunked_top_log_probs(hidden, head, labels, k)
        ids, log_probs, label_log_probs = (value.cpu().split(counts) for value in found)
        return [row_targets(ids, log_probs, label_log_probs)]

    spec = StoreSpec(folder, k, fingerprint)
    (store,) = fill_stores([spec], rows, compute, batch_size=batch_size, description="Soft targets of the proxy")
    proxy.train(was_training)
    return store


def answer_hidden_states(
    proxy: PreTrainedModel, rows: list[dict], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """
    What the proxy's output layer reads at the answer tokens of some rows: hidden states `(N, H)` and the tokens `(N,)`
    of all rows, one after the other, and how many each row has.
    """
    input_ids, attention_mask = pad_rows([list(row["input_ids"]) for row in rows], pad_id, proxy.device, side="right")
    labels, _ = pad_rows([list(row["labels"]) for row in rows], -100, proxy.device, side="right")
    scored = scored_positions(labels)
    hidden = last_hidden_states(proxy, input_ids, attention_mask)[:, :-1][scored]
    return hidden, labels[:, 1:][scored], scored.sum(dim=1).tolist()


def row_targets(
    ids: Iterable[torch.Tensor], log_probs: Iterable[torch.Tensor], label_log_probs: Iterable[torch.Tensor]
) -> list[RowTargets]:
    """Targets of rows from their tensors, `(T, k)`, `(T, k)` and `(T,)` each."""
    return [
        RowTargets(row_ids.numpy(), values.float().numpy(), of_labels.float().numpy())
        for row_ids, values, of_labels in zip(ids, log_probs, label_log_probs, strict=True)
    ]


def shared_head(head: LMHead, vocab_size: int) -> LMHead:
    """The rows of a proxy's output layer that the student has as well."""
    bias = None if head.bias is None else head.bias[:vocab_size]
    return LMHead(head.weight[:vocab_size], bias, head.logit_scale, head.softcap)


def model_fingerprint(model: torch.nn.Module) -> str:
    """
    A hash of a model's weights: names, shapes, dtypes, and of each tensor evenly spaced elements, 65,536 at most.

    Training moves all elements of a tensor, so that a sample tells one checkpoint from another without reading
    hundreds of gigabytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED_ELEMENTS)].contiguous().cpu()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer's vocabulary."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest()


def rows_fingerprint(keys: list[int]) -> str:
    """A hash of rows, whatever their order, from their keys: a row that is there twice counts twice."""
    return hashlib.blake2b(",".join(map(str, sorted(keys))).encode(), digest_size=16).hexdigest()
