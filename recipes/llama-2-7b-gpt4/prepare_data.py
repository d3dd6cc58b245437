"""
Write GPT-4's answers in OpenOrca and Nectar as prompt-completion rows, into `gpt4-answers/` beside this file.

    python recipes/llama-2-7b-gpt4/prepare_data.py

The paper's third source, GPT-4's answers to benchmark training sets, is not public. Not run by us: names of files and
columns are those the two data sets state. 256 rows are held out.
"""

from pathlib import Path


ORCA, ORCA_FILE = "Open-Orca/OpenOrca", "1M-GPT4-Augmented.parquet"
NECTAR = "berkeley-nest/Nectar"
TEACHERS = ("gpt-4", "gpt-4-0613")
FOLDER = Path(__file__).parent / "gpt4-answers"
TEST_ROWS = 256


def orca_row(row: dict) -> dict[str, str]:
    parts = [part for part in (row["system_prompt"], row["question"]) if part]
    return {"prompt": "\n\n".join(parts) + "\n\n", "completion": row["response"]}


def nectar_row(row: dict) -> dict[str, str]:
    """GPT-4's answer out of seven; an empty one where it is not among them."""
    answers = [answer["answer"] for answer in row["answers"] if answer["model"] in TEACHERS]
    return {"prompt": row["prompt"].strip() + "\n\n", "completion": answers[0] if answers else ""}


def main() -> None:
    from datasets import concatenate_datasets, load_dataset

    from trl_bbkd.data.splitting import split_by_input
    from trl_bbkd.data.teacher_data import check_teacher_data

    sources = [
        (load_dataset(ORCA, data_files=ORCA_FILE, split="train"), orca_row),
        (load_dataset(NECTAR, split="train"), nectar_row),
    ]
    rows = concatenate_datasets(
        [source.map(convert, remove_columns=source.column_names) for source, convert in sources]
    )
    rows = rows.filter(lambda row: bool(row["completion"].strip()))
    train, test = split_by_input(rows, "prompt", TEST_ROWS, seed=0)
    for split, part in {"train": train, "test": test}.items():
        print(split, check_teacher_data(part))
        part.to_parquet(FOLDER / f"{split}.parquet")


if __name__ == "__main__":
    main()
