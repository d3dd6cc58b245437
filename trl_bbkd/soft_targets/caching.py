"""Fill a store with the soft targets of a proxy."""

import hashlib
import json
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation import pad_rows
from .head import last_hidden_states, lm_head, scored_positions
from .kernel import chunked_top_log_probs
from .loss import LMHead
from .store import RowTargets, TargetStore, TargetStoreWriter, bytes_per_token, stored_keys


SAMPLED_ELEMENTS = 65536


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
        folder (`str` or `Path`):
            Folder of the store.
        proxy ([`~transformers.PreTrainedModel`]):
            The proxy.
        rows ([`~datasets.Dataset`]):
            Rows with `input_ids`, `labels` and `row_key`. Rows with the same tokens are stored once.
        k (`int`):
            Tokens kept per position.
        vocab_size (`int`):
            The student's; the proxy's further ids are padding, and left out before its probabilities are normalised.
        fingerprint (`dict[str, str]`):
            What the targets depend on, by name.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows in one forward pass, and in one write.
        pad_id (`int`, *optional*, defaults to `0`):
            Padding token.

    Returns:
        [`~store.TargetStore`]

    Raises:
        [`~store.TargetStoreError`]: the folder holds a store made from something else.
    """
    state = PartialState()
    keys = list(rows["row_key"])
    lengths = [len(ids) for ids in rows["input_ids"]]
    # Neighbours of like length need little padding; the order does not depend on how often writing was interrupted
    order = sorted({key: index for index, key in enumerate(keys)}.values(), key=lambda i: (lengths[i], keys[i]))
    was_training = proxy.training
    proxy.eval()
    head = _shared_head(lm_head(proxy), vocab_size)
    with state.main_process_first(), TargetStoreWriter(folder, k, fingerprint, part=state.process_index):
        pass  # the main process describes the store; the others compare
    state.wait_for_everyone()
    done = stored_keys(folder)
    state.wait_for_everyone()
    # Batches of all rows, whether stored or not: padding, and so the last digits, are those of an uninterrupted run
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    missing = [(number, [i for i in batch if keys[i] not in done]) for number, batch in enumerate(batches)]
    own = [(number, batch) for number, batch in missing[state.process_index :: state.num_processes] if batch]
    tokens = sum(lengths[index] for _, batch in own for index in batch)
    progress = tqdm(total=tokens, unit="tok", desc="Soft targets of the proxy", disable=not state.is_main_process)
    with TargetStoreWriter(folder, k, fingerprint, part=state.process_index) as writer, progress:
        written = 0
        for number, batch in own:
            batch_rows = [rows[index] for index in batch]
            targets = _row_targets(proxy, head, batch_rows, k, pad_id)
            writer.append(number, [row["row_key"] for row in batch_rows], targets)
            written += sum(len(row.label_log_probs) for row in targets) * bytes_per_token(k)
            progress.set_postfix_str(f"{written / 1e6:.1f} MB")
            progress.update(sum(lengths[index] for index in batch))
    proxy.train(was_training)
    state.wait_for_everyone()
    return TargetStore(folder)


def _row_targets(proxy, head: LMHead, rows: list[dict], k: int, pad_id: int) -> list[RowTargets]:
    input_ids, attention_mask = pad_rows([list(row["input_ids"]) for row in rows], pad_id, proxy.device, side="right")
    labels, _ = pad_rows([list(row["labels"]) for row in rows], -100, proxy.device, side="right")
    scored = scored_positions(labels)
    hidden = last_hidden_states(proxy, input_ids, attention_mask)[:, :-1][scored]
    found = chunked_top_log_probs(hidden, head, labels[:, 1:][scored], k)
    ids, log_probs, label_log_probs = (value.cpu() for value in found)
    counts = scored.sum(dim=1).tolist()
    parts = zip(ids.split(counts), log_probs.float().split(counts), label_log_probs.float().split(counts), strict=True)
    return [RowTargets(*(value.numpy() for value in part)) for part in parts]


def _shared_head(head: LMHead, vocab_size: int) -> LMHead:
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
    """A hash of a set of rows, whatever their order, from their keys."""
    return hashlib.blake2b(",".join(map(str, sorted(set(keys)))).encode(), digest_size=16).hexdigest()
