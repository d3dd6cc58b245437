"""What rounds leave on disk: what was measured, their logs, and the models that may still be gone back to."""

import json
import shutil
from pathlib import Path

from ..host.files import write_atomically


ROUND_FILE = "round.json"


class RoundsOnDisk:
    """
    The folders of a training in rounds.

    Args:
        output_dir (`str` or `Path`):
            Folder of the training.
        run_name (`str`):
            Name of the file, without its ending, that says what the training is made from.
        model_name (`str`):
            Name of the folder, in each round's, of the model as it was when the round ended.
    """

    def __init__(self, output_dir: str | Path, run_name: str, model_name: str):
        self.output_dir, self.run_file = Path(output_dir), f"{run_name}.json"
        self.model_name = model_name

    def folder(self, number: int) -> Path:
        """The folder of round `number`. That of round 0 holds what was measured before the first."""
        return self.output_dir / f"round-{number}"

    def model(self, number: int) -> Path:
        """Where the model is kept as it was when round `number` ended."""
        return self.folder(number) / self.model_name

    def run(self) -> dict | None:
        """What the training in `output_dir` is made from; `None` if there is none."""
        path = self.output_dir / self.run_file
        return json.loads(path.read_text(encoding="utf-8"))["run"] if path.is_file() else None

    def finished(self) -> list[dict]:
        """What was measured after each round that is finished, in their order."""
        rounds: list[dict] = []
        while (path := self.folder(len(rounds)) / ROUND_FILE).is_file():
            entry = json.loads(path.read_text(encoding="utf-8"))
            del entry["log_history"]
            rounds.append(entry)
        return rounds

    def begin(self, run: dict) -> None:
        """Say what the training is made from, before any of it is."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        _write(self.output_dir / self.run_file, {"run": run, "rounds": []})

    def finish(self, run: dict, rounds: list[dict], log: list[dict]) -> None:
        """
        Mark the last of `rounds` as finished.

        Args:
            run (`dict`):
                What the training is made from.
            rounds (`list[dict]`):
                What was measured after each round.
            log (`list[dict]`):
                Log of the last one.
        """
        folder = self.folder(rounds[-1]["round"])
        folder.mkdir(parents=True, exist_ok=True)
        _write(self.output_dir / self.run_file, {"run": run, "rounds": rounds})
        _write(folder / ROUND_FILE, {**rounds[-1], "log_history": log})

    def clear(self, last: int, best: int) -> None:
        """Delete what is of no further use: the models before the last round's and the best one's, and its checkpoints."""
        for earlier in range(last):
            if earlier != best:
                shutil.rmtree(self.model(earlier), ignore_errors=True)
        for checkpoint in self.folder(last).glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)

    def log_history(self, rounds: list[dict]) -> list[dict]:
        """The logs of finished rounds, as one: steps are counted through."""
        history, first_step = [], 0
        for entry in rounds:
            path = self.folder(entry["round"]) / ROUND_FILE
            log = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            history += [{**line, "step": line["step"] + first_step, "round": entry["round"]} for line in log]
            first_step += max((line["step"] for line in log), default=0)
        return history


def _write(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")
