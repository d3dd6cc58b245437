"""A stage on disk: its folder says what it was made from, and that it is finished."""

import json
from pathlib import Path

from ..errors import StageError
from ..host.files import write_atomically
from ..host.resume import differences


STAGE_FILE = "stage.json"


def finished_stage(folder: str | Path, fingerprint: dict) -> dict | None:
    """
    What a finished stage reported.

    Args:
        folder (`str` or `Path`):
            Folder of the stage.
        fingerprint (`dict`):
            What the stage is made from, by name.

    Returns:
        `dict`: Its report; `None` if it is not finished, or was begun from something else and has made nothing.

    Raises:
        [`StageError`]: it was begun or finished, but from something else.
    """
    path = Path(folder) / STAGE_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    differing = differences(content["fingerprint"], json.loads(json.dumps(fingerprint, default=str)))
    if differing and [file.name for file in path.parent.iterdir()] == [STAGE_FILE] and "report" not in content:
        return None
    if differing:
        raise StageError(
            f"{folder} was made from something else ({differing}). Delete that folder to make it again, or choose another "
            "output_dir."
        )
    return content.get("report")


def begin_stage(folder: str | Path, fingerprint: dict) -> None:
    """Say what a stage is made from, before any of it is."""
    _write(Path(folder), {"fingerprint": fingerprint})


def finish_stage(folder: str | Path, fingerprint: dict, report: dict) -> None:
    """Mark a stage as finished, which is the last thing written to its folder."""
    _write(Path(folder), {"fingerprint": fingerprint, "report": report})


def _write(folder: Path, content: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STAGE_FILE, json.dumps(content, indent=2, default=str) + "\n")
