"""
Write GPT-5-Chat's answers to LMSYS prompts as prompt-completion rows, into `lmsys-gpt-5-chat/` beside this file.

    python recipes/qwen2.5-7b-lmsys/prepare_data.py

The data set ytz20/LMSYS-Chat-GPT-5-Chat-Response (192,014 training and 479 test rows) has the user's messages in
`content` and the teacher's answer in `teacher_response`.
"""

from pathlib import Path


DATA_SET = "ytz20/LMSYS-Chat-GPT-5-Chat-Response"
FOLDER = Path(__file__).parent / "lmsys-gpt-5-chat"


def prompt_and_completion(row: dict) -> dict:
    return {
        "prompt": row["content"],
        "completion": [{"role": "assistant", "content": row["teacher_response"]}],
    }


def main() -> None:
    from datasets import load_dataset

    from trl_bbkd.data.teacher_data import check_teacher_data

    for split, rows in load_dataset(DATA_SET).items():
        rows = rows.map(prompt_and_completion, remove_columns=rows.column_names)
        print(split, check_teacher_data(rows))
        rows.to_parquet(FOLDER / f"{split}.parquet")


if __name__ == "__main__":
    main()
