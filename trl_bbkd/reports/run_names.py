"""What runs are called where they stand side by side."""

import os
from collections.abc import Sequence
from pathlib import Path


def short_names(folders: Sequence[str]) -> list[str]:
    """
    Names of folders that differ: their paths less what all begin and end with, so that `out/gad/student` and `out/proxy/student`
    are `gad` and `proxy`. Of each path at least one part stays.
    """
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    paths = _without_shared_beginning(paths)
    paths = [path[::-1] for path in _without_shared_beginning([path[::-1] for path in paths])]
    return [os.path.join(*path) for path in paths]


def _without_shared_beginning(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    shared = len(os.path.commonprefix(paths))
    shared = min(shared, *(len(path) - 1 for path in paths))
    return [path[shared:] for path in paths]
