"""A judge on a port of this machine, and an evaluation by it."""

import json
import os
import re

from tests.collect.server import KEY, MODEL, TeacherServer
from trl_bbkd.cli import main


PARTS = re.compile(
    r"<request>\n(.*)\n</request>\n\n<answer_A>\n(.*)\n</answer_A>\n\n<answer_B>\n(.*)\n</answer_B>$", re.DOTALL
)


class JudgeServer(TeacherServer):
    """
    `says(is_points, request, first, second)` is what it answers.
    """

    def _choice(self, body, index, fault):
        text = body["messages"][-1]["content"]
        words = self.says("Points:" in text, *PARTS.search(text).groups())
        if self.echoes_key:
            words = f"{self._key}\n{words}"
        reason = "length" if words.endswith("[cut]") else "stop"
        return {"index": index, "message": {"role": "assistant", "content": words}, "finish_reason": reason}


def judging(says, **settings):
    server = JudgeServer(**settings)
    server.says = says
    return server


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(server, folder, model="student.jsonl", **changes):
    """The words of a command: options, of which `None` leaves one out."""
    said = {"data": str(folder / "teacher.jsonl"), "judge": MODEL, "base_url": server.url} | {
        "output_dir": str(folder / "out")
    }
    path = folder / model
    words = ["evaluate", str(path) if path.exists() else model]
    for name, value in (said | changes).items():
        for one in value if isinstance(value, list) else [value]:
            words += [] if one is None else [f"--{name}", str(one)]
    return words


def evaluate(server, folder, **changes):
    """Run the command; return its JSON and its page."""
    os.environ["OPENAI_API_KEY"] = KEY
    main(command(server, folder, **changes))
    return json.loads((folder / "out/evaluation.json").read_text()), (folder / "out/evaluation.md").read_text()


def files(folder, answers, teacher="another-model"):
    """Of `(prompt, student's answer, teacher's answer)`."""
    write_rows(
        folder / "teacher.jsonl",
        [{"prompt": prompt, "completion": theirs, "teacher": teacher} for prompt, _, theirs in answers],
    )
    write_rows(folder / "student.jsonl", [{"prompt": prompt, "completion": ours} for prompt, ours, _ in answers])
