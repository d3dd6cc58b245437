"""
The store of soft targets: bytes a token, and how fast it is written and read, against training.

    OMP_NUM_THREADS=2 python benchmarks/target_store.py

Random targets (k=10) of some thousand rows of about 200 tokens. Two baselines, of the same run:

- bytes: a safetensors file for each row, with int64 ids, float32 log-probabilities and the float32 log-probabilities of
  the row's own tokens. It is read as well.
- speed: steps of supervised fine-tuning, 8 rows of 200 tokens, of two random Llamas: one of the size of
  `recipes/tinyworld/discriminator`, and one of 15 million parameters.

Files lie in a temporary folder. "Not cached" reads after the operating system has been asked to forget them.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common.arguments import parser
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from trl_bbkd.soft_targets.collator import SoftTargetCollator
from trl_bbkd.soft_targets.store import RowTargets, TargetStore, TargetStoreWriter, row_key


VOCAB = 151936
BATCH = 8
STEP_TOKENS = 200
TINYWORLD = Path(__file__).parents[1] / "recipes" / "tinyworld" / "discriminator"


def make_rows(arguments) -> tuple[list[dict], list[RowTargets]]:
    generator = np.random.default_rng(0)
    rows, targets = [], []
    for _ in range(arguments.rows):
        prompt = int(generator.integers(10, 40))
        tokens = int(generator.integers(arguments.tokens * 3 // 4, arguments.tokens * 5 // 4 + 1))
        ids = generator.integers(0, VOCAB, prompt + tokens).tolist()
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "row_key": row_key(ids, prompt)})
        log_probs = -np.sort(generator.exponential(3.0, (tokens, arguments.k)), axis=1).astype(np.float32)
        label_log_probs = -generator.exponential(1.0, tokens).astype(np.float32)
        targets.append(RowTargets(generator.integers(0, VOCAB, (tokens, arguments.k)), log_probs, label_log_probs))
    return rows, targets


def write_store(folder: Path, rows: list[dict], targets: list[RowTargets], k: int) -> float:
    started = time.perf_counter()
    with TargetStoreWriter(folder, k, {}) as writer:
        for number, start in enumerate(range(0, len(rows), BATCH)):
            keys = [row["row_key"] for row in rows[start : start + BATCH]]
            writer.append(number, keys, targets[start : start + BATCH])
    return time.perf_counter() - started


def write_files(folder: Path, rows: list[dict], targets: list[RowTargets]) -> float:
    folder.mkdir()
    started = time.perf_counter()
    for row, target in zip(rows, targets, strict=True):
        save_file(target._asdict(), folder / f"{row['row_key']}.safetensors")
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Ask for the files to be dropped from memory."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(read, items, repeats: int, before=lambda: None) -> float:
    """The median of some repeats."""
    found = []
    for _ in range(repeats):
        before()
        started = time.perf_counter()
        for item in items:
            read(item)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def training_seconds(config: LlamaConfig, steps: int) -> tuple[float, int]:
    """A step of SFT, and the parameters of its model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    found = []
    for _ in range(steps + 1):
        ids = torch.randint(0, config.vocab_size, (BATCH, STEP_TOKENS))
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:]), sum(p.numel() for p in model.parameters())


def models() -> dict[str, LlamaConfig]:
    sizes = {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
    return {
        "tinyworld discriminator": LlamaConfig.from_pretrained(TINYWORLD, max_position_embeddings=256),
        "Llama, hidden size 288, 6 layers": LlamaConfig(vocab_size=32000, tie_word_embeddings=True, **sizes),
    }


def parse_args(argv=None):
    found = parser(__doc__)
    found.add_argument("--rows", type=int, default=4000)
    found.add_argument("--tokens", type=int, default=200, help="mean tokens of a row")
    found.add_argument("--k", type=int, default=10)
    found.add_argument("--repeats", type=int, default=3, help="the median counts")
    found.add_argument("--steps", type=int, default=5, help="timed training steps")
    found.add_argument("--folder", help="where the temporary folder is made")
    return found.parse_args(argv)


def main(argv=None) -> None:
    arguments = parse_args(argv)
    rows, targets = make_rows(arguments)
    tokens = sum(len(target.ids) for target in targets)
    print(f"{len(rows):,} rows, {tokens:,} tokens, k={arguments.k}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        store_folder, files_folder = Path(temporary) / "store", Path(temporary) / "files"
        speeds = {
            "store, written (batches of 8, each forced to disk)": write_store(
                store_folder, rows, targets, arguments.k
            ),
            "safetensors files, written (not forced to disk)": write_files(files_folder, rows, targets),
        }
        sizes = {
            "safetensors file for each row (baseline)": sum(path.stat().st_size for path in files_folder.iterdir()),
            "store, without the index": sum(path.stat().st_size for path in store_folder.glob("*.targets")),
            "store, with the index": sum(path.stat().st_size for path in store_folder.iterdir()),
        }
        baseline = sizes["safetensors file for each row (baseline)"]
        print("| | bytes a token | / baseline |\n| --- | ---: | ---: |")
        for name, size in sizes.items():
            print(f"| {name} | {size / tokens:.1f} | {size / baseline:.2f} |")

        shuffled = np.random.default_rng(1).permutation(len(rows)).tolist()
        batches = [[rows[i] for i in shuffled[start : start + BATCH]] for start in range(0, len(rows), BATCH)]

        opened = {}

        def open_again():
            # A file that is mapped stays in memory
            opened.clear()
            forget(store_folder)
            opened["store"] = TargetStore(store_folder)

        def from_store(i):
            opened["store"][rows[i]["row_key"]]

        def from_files(i):
            load_file(files_folder / f"{rows[i]['row_key']}.safetensors")

        repeats = arguments.repeats
        speeds["store, read shuffled, not cached"] = seconds_of(from_store, shuffled, repeats, before=open_again)
        collator = SoftTargetCollator(pad_token_id=0, stores=[opened["store"]])
        plain = SoftTargetCollator(pad_token_id=0)
        speeds |= {
            "store, read in order": seconds_of(from_store, range(len(rows)), repeats),
            "store, read shuffled": seconds_of(from_store, shuffled, repeats),
            "safetensors files, read shuffled": seconds_of(from_files, shuffled, repeats),
            "SoftTargetCollator, shuffled batches of 8": seconds_of(collator, batches, repeats),
            "the same collator without targets": seconds_of(plain, batches, repeats),
        }
    training = {}
    for name, config in models().items():
        seconds, parameters = training_seconds(config, arguments.steps)
        training[f"{name} ({parameters:,} parameters)"] = BATCH * STEP_TOKENS / seconds
    print(f"\n| training, {BATCH} x {STEP_TOKENS} tokens | tokens/s |\n| --- | ---: |")
    for name, speed in training.items():
        print(f"| {name} | {speed:,.0f} |")
    print("\n| | tokens/s | / training, tinyworld | / training, 288 |\n| --- | ---: | ---: | ---: |")
    for name, seconds in speeds.items():
        ratios = [f"{tokens / seconds / speed:,.0f}" for speed in training.values()]
        print(f"| {name} | {tokens / seconds:,.0f} | " + " | ".join(ratios) + " |")


if __name__ == "__main__":
    main()
