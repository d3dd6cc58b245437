"""
Let Llama label the sentences of PubMed-RCT-20k, into `pubmed-rct-20k/` beside this file.

    python recipes/roberta-pubmed-rct/prepare_data.py

Not run by us: names of splits and columns are those that the Hub's pages of armanc/pubmed-rct20k and of its copies
state (176,642 training and 29,578 test rows; `text`, and `label` as a name in small letters). It needs a GPU of 24 GB
and access to the teacher. The true labels of the training rows are kept as `gold`: those of 200 rows set the
temperature, the others are only looked at for the report.
"""

import json
import random
from pathlib import Path

from datasets import Dataset, load_dataset

from trl_bbkd import pseudo_label
from trl_bbkd.llkd.label_calibration import apply_temperature, fit_temperature


DATA_SET = "armanc/pubmed-rct20k"
TEACHER = "meta-llama/Llama-3.1-8B-Instruct"  # the paper's is a LLaMA: its version and size are not known
LABELS = ["background", "objective", "methods", "results", "conclusions"]
FOLDER = Path(__file__).parent / "pubmed-rct-20k"
CHECKED_ROWS = 200
# Ours: the paper's prompt is not known
PROMPT = """\
The following sentence is from the abstract of a medical article about a randomized controlled trial.

Sentence: {text}

Which part of the abstract is it from?
{labels}

Answer with one letter."""


def calibrated_rows(labelled: Dataset, checked_rows: int = CHECKED_ROWS) -> tuple[list[dict], float]:
    """Rows as a recipe takes them, with confidences at the temperature that fits some rows' true labels, and it."""
    checked = sorted(random.Random(0).sample(range(len(labelled)), checked_rows))
    some = labelled.select(checked)
    temperature = fit_temperature(some["teacher_probs"][:], [LABELS.index(name) for name in some["gold"]])
    probs = apply_temperature(labelled["teacher_probs"][:], temperature)
    confidences, numbers = probs.max(dim=1)
    columns = zip(labelled["text"], numbers.tolist(), confidences.tolist(), labelled["gold"], strict=True)
    rows = [
        {"text": text, "label": LABELS[number], "teacher_confidence": round(confidence, 6), "gold": gold}
        for text, number, confidence, gold in columns
    ]
    return rows, temperature


def write_rows(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    splits = load_dataset(DATA_SET).select_columns(["text", "label"])
    unlabelled = splits["train"].rename_column("label", "gold")
    labelled = pseudo_label(unlabelled, LABELS, TEACHER, prompt=PROMPT, as_chat=True, batch_size=64)
    rows, temperature = calibrated_rows(labelled)
    right = sum(row["label"] == row["gold"] for row in rows) / len(rows)
    print(f"{len(rows)} rows, {right:.1%} of the labels are right; temperature {temperature:.2f}")
    write_rows(rows, FOLDER / "teacher_train.jsonl")
    write_rows(splits["test"].to_list(), FOLDER / "teacher_test.jsonl")


if __name__ == "__main__":
    main()
