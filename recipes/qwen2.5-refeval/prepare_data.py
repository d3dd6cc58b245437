"""
Write the prompts of UltraFeedback, and join them with the teacher's answers, into `ultrafeedback-deepseek-v3/` beside this file.

    python recipes/qwen2.5-refeval/prepare_data.py

The first time it writes `prompts.jsonl`, rows of `prompt`, which is a list of messages. Have the teacher answer them, and write
`answers.jsonl`, rows of `prompt` and `answer`, beside it. The second time it writes `train.jsonl`, what the recipe reads.
"""

import json
from pathlib import Path


DATA_SET, SPLIT = "HuggingFaceH4/ultrafeedback_binarized", "train_prefs"
FOLDER = Path(__file__).parent / "ultrafeedback-deepseek-v3"


def prompt_of(row: dict) -> dict:
    return {"prompt": [{"role": "user", "content": row["prompt"]}]}


def prompt_and_completion(row: dict) -> dict:
    return {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["answer"]}]}


def write(path: Path, rows) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    from datasets import Dataset, load_dataset

    from trl_bbkd.data.teacher_data import check_teacher_data

    answers = FOLDER / "answers.jsonl"
    if not answers.is_file():
        write(FOLDER / "prompts.jsonl", map(prompt_of, load_dataset(DATA_SET, split=SPLIT)))
        print(f"Wrote {FOLDER / 'prompts.jsonl'}. Have the teacher answer them, into {answers.name} beside it.")
        return
    with open(answers, encoding="utf-8") as file:
        rows = [prompt_and_completion(json.loads(line)) for line in file]
    print(check_teacher_data(Dataset.from_list(rows)))
    write(FOLDER / "train.jsonl", rows)


if __name__ == "__main__":
    main()
