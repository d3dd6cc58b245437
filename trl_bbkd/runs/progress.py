"""What of a run is finished and measured, kept beside its student: a run that was killed goes on with what is missing."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..host.resume import last_finished_checkpoint


PROGRESS_NAME = "progress.json"
TRAINED = "trained"


class Progress:
    """
    The finished parts of a run, by name, each with what is needed of it later.

    Args:
        output_dir (`str`):
            Folder of the run.
        settings (`dict`):
            What decides the results. Parts of other settings are not taken over.
        is_new (`bool`, *optional*, defaults to `False`):
            Whether to forget what is on disk.
    """

    def __init__(self, output_dir: str, settings: dict, is_new: bool = False):
        self.path = Path(output_dir) / PROGRESS_NAME
        self.settings = json.loads(json.dumps(settings, default=str))
        found = None if is_new else _read(self.path)
        parts = [found["parts"] if found is not None and found["settings"] == self.settings else {}]
        # One process reads and compares: others may see the file when it is already further, and must not part ways
        broadcast_object_list(parts)
        self.parts: dict[str, Any] = parts[0]
        if is_new:
            self._write()

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def finish(self, name: str, result: Any) -> Any:
        """Keep what a part made. It comes back as it is read by a run that goes on."""
        self.parts[name] = json.loads(json.dumps(result))
        self._write()
        return self.parts[name]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What the part `name` made, now or in the run that this one goes on with."""
        return self.parts[name] if name in self.parts else self.finish(name, make())

    def keep_only(self, *names: str) -> None:
        """Make all other parts again."""
        self.parts = {name: part for name, part in self.parts.items() if name in names}
        self._write()

    def _write(self) -> None:
        if not PartialState().is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a run may be killed while it writes
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"settings": self.settings, "parts": self.parts}) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)


def _read(path: Path) -> dict | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() >= {"settings", "parts"} else None


def is_trained(output_dir: str) -> bool:
    """Whether the run in `output_dir` has trained its student, whatever its settings."""
    found = _read(Path(output_dir) / PROGRESS_NAME)
    return found is not None and TRAINED in found["parts"]


def can_go_on(output_dir: str) -> bool:
    """Whether a run in `output_dir` has left something to go on from."""
    return is_trained(output_dir) or last_finished_checkpoint(output_dir) is not None
