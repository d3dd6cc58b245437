"""Where teacher text comes from: local files and folders, the Hub, and mixtures of them."""

import codecs
import gzip
import json
import math
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value

from ..errors import TeacherDataError
from .splitting import split_by_input


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ScriptArguments


BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = ".gz"  # of text files; Parquet has compression of its own
# In CSV only an empty cell is missing: `None`, `NA` and `null` are answers and labels like any other. Text stays text, also
# where it looks like a number
CSV_OPTIONS = {
    "keep_default_na": False,
    "na_values": [""],
    "converters": dict.fromkeys(("prompt", "completion", "text"), str),
}
ROW_COLUMN = "row_in_file"  # by which errors name a row, after all shuffling, splitting and dropping
TEST_SPLIT_SEED = 0  # the same split in every process and in every run


def places_of(batch: dict, rows) -> list[int]:
    """A batch's rows as a user knows them: by their place in the file, whatever was done to the data set since."""
    return list(batch[ROW_COLUMN]) if ROW_COLUMN in batch else list(rows)


def row_names(dataset) -> list[int]:
    """The name in errors of each row of a [`~datasets.Dataset`]: its place in the file, if that is known."""
    return list(dataset[ROW_COLUMN]) if ROW_COLUMN in dataset.column_names else list(range(len(dataset)))


def named(columns) -> str:
    """The columns that a user knows, for an error."""
    return ", ".join(column for column in columns if column != ROW_COLUMN)


def load_teacher_data(
    script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig", input_column: str = "prompt"
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Load the teacher's text.

    `dataset_name` may be a JSON, JSONL, Parquet or CSV file (text also as `.gz`), a folder holding one such file (or several shards) per
    split, named after it (`train.jsonl`, `teacher_train.jsonl`), or a Hub id. A `datasets` mixture comes before it.
    The test split is the one named `dataset_test_split` where it exists; otherwise `test_split_size` of the training
    rows, always the same ones, are held out.

    Args:
        script_args ([`~trl.ScriptArguments`]):
            `dataset_name`, `dataset_config`, `dataset_train_split`, `dataset_test_split`, `dataset_streaming`.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            `datasets`, `streaming`, `test_split_size`.
        input_column (`str`, *optional*, defaults to `"prompt"`):
            Column of what the student is given: rows that share it are held out together.

    Returns:
        `tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]`: training and test rows, each with its place
        in the file as `row_in_file`.

    Raises:
        [`TeacherDataError`]: nothing to load, or a file, data set or split does not exist.
    """
    from accelerate import PartialState

    train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
    _refuse_needless_split(script_args, dataset_args)
    with PartialState().main_process_first():
        if dataset_args.datasets:
            splits = {train_split: _load_mixture(dataset_args)}
        elif script_args.dataset_name is None:
            raise TeacherDataError(
                "No teacher data: set `dataset_name` to a .json, .jsonl, .parquet or .csv file, a folder or a Hub id, or "
                "list a mixture under `datasets`."
            )
        else:
            splits = load_splits(script_args)
    splits = {name: _with_places(split) for name, split in splits.items()}
    if train_split not in splits:
        raise TeacherDataError(
            f"`dataset_train_split: {train_split}` does not exist in {script_args.dataset_name}; available splits: "
            f"{', '.join(splits)}."
        )
    train, test = splits[train_split], splits.get(test_split)
    if test is None and test_split != "test":
        raise TeacherDataError(
            f"`dataset_test_split: {test_split}` does not exist in {script_args.dataset_name}; available splits: "
            f"{', '.join(splits)}. Name one of them or set `test_split_size`."
        )
    if test is None and dataset_args.test_split_size is not None:
        if isinstance(train, IterableDataset):
            raise TeacherDataError(
                "`test_split_size` cannot divide a streaming set, whose length is unknown; give the test rows as a "
                "split of their own (`dataset_test_split`) or turn streaming off."
            )
        size = dataset_args.test_split_size
        # A whole number counts rows, a fraction is a share of them.
        rows = int(size) if size >= 1 else math.ceil(size * len(train))
        if not 0 < rows < len(train):
            raise TeacherDataError(
                f"`test_split_size: {size}` takes {rows} of {len(train)} rows. Name fewer rows, or a share between 0 and 1."
            )
        train, test = split_by_input(train, input_column, rows, TEST_SPLIT_SEED)
    return train, test


def _refuse_needless_split(script_args, dataset_args) -> None:
    """Refuse the name of a split where there is one file, or a mixture: it would be taken and mean nothing."""
    split, path = script_args.dataset_train_split, Path(script_args.dataset_name or "").expanduser()
    if split == "train" or not (dataset_args.datasets or path.is_file()):
        return
    if dataset_args.datasets or split not in _words(path):
        what = "a mixture, whose entries have a `split` each" if dataset_args.datasets else f"one file, {path.name}"
        raise TeacherDataError(
            f"`dataset_train_split: {split}` means nothing for {what}: all its rows are for training. Take dataset_train_split out."
        )


def _words(file: Path) -> list[str]:
    """Of a file's name, the whole words: teacher_train.jsonl, train-00000-of-00002.parquet."""
    return [file.stem, *re.split(r"[-_.]", file.stem)]


def _load_mixture(dataset_args):
    from trl import DatasetMixtureConfig, get_dataset

    mixture = DatasetMixtureConfig(datasets=dataset_args.datasets, streaming=dataset_args.streaming)
    try:
        return get_dataset(mixture)["train"]
    except Exception as error:
        paths = ", ".join(str(entry.path) for entry in dataset_args.datasets)
        raise TeacherDataError(f"Could not load the mixture under `datasets` ({paths}): {error}") from error


def _with_places(rows):
    """`rows` with the column that names each of them."""
    if isinstance(rows, Dataset):
        return rows if ROW_COLUMN in rows.column_names else rows.add_column(ROW_COLUMN, np.arange(len(rows)))
    features = rows.features and Features({**rows.features, ROW_COLUMN: Value("int64")})
    return rows.map(lambda row, index: {ROW_COLUMN: index, **row}, with_indices=True, features=features)


def load_splits(script_args) -> dict:
    """The splits that `dataset_name` has, as [`load_teacher_data`] reads them. Imports nothing of torch."""
    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    path = Path(name).expanduser()
    if path.is_file():
        if _format(path) is None:
            raise TeacherDataError(f"`dataset_name: {name}` ends in none of {_suffixes()}.")
        files = {script_args.dataset_train_split: [path]}
    elif path.is_dir():
        files = _files_per_split(path, script_args)
    elif _format(path) is not None or name.startswith((".", "/", "~")):
        raise TeacherDataError(f"`dataset_name: {name}` does not exist (looked for {path.absolute()}).")
    else:
        try:
            loaded = datasets.load_dataset(name, script_args.dataset_config, streaming=streaming)
        except Exception as error:
            raise TeacherDataError(
                f"`dataset_name: {name}` is neither a local file or folder nor a data set the Hub returned: {error}"
            ) from error
        return dict(loaded) if isinstance(loaded, DatasetDict | IterableDatasetDict) else {"train": loaded}
    return {split: _read_files(split_files, streaming) for split, split_files in files.items()}


def _read_files(files: list[Path], streaming: bool):
    kind = _format(files[0])
    data_files = [str(file) for file in files]
    for file in files:
        if file.stat().st_size == 0:
            raise TeacherDataError(f"{file} is empty.")
        # pyarrow takes text of any encoding, and fails when it is used
        if kind == "json" and not streaming and not _is_utf8(file):
            raise TeacherDataError(f"Could not read {_what_is_wrong(file, kind)}")
    try:
        rows = datasets.load_dataset(
            kind,
            data_files={"train": data_files},
            split="train",
            streaming=streaming,
            **(CSV_OPTIONS if kind == "csv" else {}),
        )
        # A stream is not read before it is used: what is wrong with its first rows is told here
        columns = rows.column_names if not streaming else list(next(iter(rows)))
    except Exception as error:
        problem = next((found for file in files if (found := _what_is_wrong(file, kind))), None)
        problem = problem or f"{data_files[0]}: {_first_line(error.__cause__ or error)}"
        raise TeacherDataError(f"Could not read {problem}") from error
    if any(column.startswith("__index_level_") for column in columns):
        raise TeacherDataError(
            f"Could not read {', '.join(data_files)}: rows have more cells than the header has names. Put text that holds commas "
            "between double quotes."
        )
    return rows


def _format(path: Path) -> str | None:
    """The format that a file's name says, also of one that is compressed."""
    if path.suffix != COMPRESSED:
        return BUILDERS.get(path.suffix)
    kind = BUILDERS.get(Path(path.stem).suffix)
    return kind if kind != "parquet" else None


def _suffixes() -> str:
    return f"{', '.join(BUILDERS)} ({COMPRESSED} after them, but for .parquet)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open(file: Path):
    return gzip.open(file, "rb") if file.suffix == COMPRESSED else open(file, "rb")


def _is_utf8(file: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with _open(file) as content:
            while chunk := content.read(1 << 20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except (UnicodeDecodeError, OSError, EOFError, zlib.error):
        return False
    return True


def _what_is_wrong(file: Path, kind: str) -> str | None:
    """What a reader's error does not say of a file of text, or `None`."""
    if kind == "parquet":
        return None
    lines, number = 0, 0
    try:
        with _open(file) as content:
            for number, line in enumerate(content, start=1):  # noqa: B007
                text = line.decode("utf-8-sig")
                lines += bool(text.strip())
                if ".jsonl" in file.suffixes and text.strip():
                    json.loads(text)
    except UnicodeDecodeError:
        return f"{file}: line {number} is not UTF-8. Save the file as UTF-8."
    except json.JSONDecodeError as error:
        return f"{file}: line {number} is no JSON: {error}."
    except (OSError, EOFError, zlib.error) as error:
        return f"{file}: {_first_line(error)}."
    if lines <= (kind == "csv"):
        return f"{file}: it has no rows."
    return None


def _files_per_split(folder: Path, script_args) -> dict[str, list[Path]]:
    found = sorted(file for file in folder.iterdir() if file.is_file() and _format(file) is not None)
    files = {}
    for split in (script_args.dataset_train_split, script_args.dataset_test_split):
        named = [file for file in found if split in _words(file)]
        if len({_format(file) for file in named}) > 1 or len({file.suffix for file in named}) > 1:
            raise TeacherDataError(
                f"The `{split}` split of {folder} is there in several formats "
                f"({', '.join(file.name for file in named)}): keep one or set `dataset_name` to the file."
            )
        if named:
            files[split] = named
    if script_args.dataset_train_split not in files:
        names = ", ".join(file.name for file in found) or "none"
        raise TeacherDataError(
            f"{folder} has no file for the `{script_args.dataset_train_split}` split; data files found: {names}. Name "
            "one after the split, such as train.jsonl, or set `dataset_train_split`."
        )
    return files
