"""A round's samples, scores and pairs on disk: made once, read by a run that goes on."""

import json
import os
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm

from ..host.files import write_atomically
from .judges import Judge, Judged


EXAMPLES = 3  # pairs that a report shows
CANDIDATES_FILE, PAIRS_FILE, SCORES_FOLDER = "candidates.parquet", "pairs.parquet", "scores"


def judged_in_blocks(folder: Path, rows: list[Judged], judge: Judge, size: int) -> list[list[float]]:
    """
    Have every row judged, a block of them at a time. A block that is on disk is read, not judged again.

    Args:
        folder (`Path`):
            Where scores are kept, a file for every block, written in one piece.
        rows (`list[Judged]`):
            The same on all processes of a run, which share the blocks.
        judge ([`~judges.Judge`]):
            The judge.
        size (`int`):
            Rows of a block.

    Returns:
        `list[list[float]]`: of each row the scores of its candidates.
    """
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [
        (folder / f"{start // size:05d}.json", rows[start : start + size]) for start in range(0, len(rows), size)
    ]
    missing = [(file, block) for file, block in blocks if not file.is_file()]
    state.wait_for_everyone()
    own = missing[state.process_index :: state.num_processes]
    for file, block in tqdm(own, desc="Judging", disable=not state.is_main_process or not own):
        write_atomically(file, json.dumps(judge(block)))
    state.wait_for_everyone()
    return [scores for file, _ in blocks for scores in json.loads(file.read_text(encoding="utf-8"))]


def keep_table(rows: Dataset, file: Path) -> None:
    """Write a table to disk, whole or not at all, on the main process."""
    state = PartialState()
    if state.is_main_process:
        unfinished = file.with_name(file.name + ".tmp")
        pyarrow.parquet.write_table(rows.with_format("arrow")[:], unfinished)
        os.replace(unfinished, file)
    state.wait_for_everyone()


def kept_table(file: Path) -> Dataset | None:
    """A table that [`keep_table`] has written, if it has."""
    return Dataset.from_dict(pyarrow.parquet.read_table(file).to_pydict()) if file.is_file() else None


def forget_parts(*folders: Path) -> None:
    """Delete what a table has in one piece."""
    if PartialState().is_main_process:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    PartialState().wait_for_everyone()


def round_report(candidates: Dataset, pairs: Dataset) -> dict[str, Any]:
    """
    What a round trained on, in numbers and a few examples.

    Args:
        candidates, pairs ([`~datasets.Dataset`]):
            The round's tables.
    """
    scores = [score for row in candidates["scores"] for score in row] if "scores" in candidates.column_names else []
    texts = ["prompt", "chosen", "rejected", "teacher"]
    scored = [name for name in ("chosen_score", "rejected_score") if name in pairs.column_names]
    return {
        "prompts": len(candidates),
        "samples": sum(map(len, candidates["candidates"])),
        "pairs": len(pairs),
        "score": mean(scores) if scores else None,
        **{name: mean(pairs[name]) for name in scored},
        "chosen_length": mean(map(len, pairs["chosen_ids"])),
        "rejected_length": mean(map(len, pairs["rejected_ids"])),
        "examples": pairs.select(range(min(EXAMPLES, len(pairs)))).select_columns(texts + scored).to_list(),
    }
