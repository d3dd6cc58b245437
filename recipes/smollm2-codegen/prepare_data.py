"""
Write GPTeacher's code-generation set (GPT-4's answers, MIT, teknium1/GPTeacher) as conversational prompt-completion rows.

    python recipes/smollm2-codegen/prepare_data.py codegen.jsonl

`codegen.jsonl` has `instruction`, `input` and `output` in each line. The rows go to `gpteacher-codegen/train.jsonl` and
`test.jsonl` beside this script; every 20th row is a test row.
"""

import json
import sys
from pathlib import Path


def row(source: dict[str, str]) -> dict:
    question = "\n\n".join(part for part in (source["instruction"], source["input"]) if part)
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": source["output"]}],
    }


def main(path: str) -> None:
    folder = Path(__file__).parent / "gpteacher-codegen"
    folder.mkdir(exist_ok=True)
    rows = [row(json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["completion"][0]["content"].strip()]
    for name, part in (
        ("test", rows[::20]),
        ("train", [row for number, row in enumerate(rows) if number % 20]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        print(f"{folder.name}/{name}.jsonl: {len(part)} rows")


if __name__ == "__main__":
    main(sys.argv[1])
