"""Where teacher text comes from: local files and folders, the Hub, and mixtures of them."""

import math
import re
from pathlib import Path

import datasets
from accelerate import PartialState
from datasets import DatasetDict, IterableDataset, IterableDatasetDict

from .splitting import split_by_input


BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
TEST_SPLIT_SEED = 0  # the same split in every process and in every run


class TeacherDataError(ValueError):
    """The teacher text cannot be used as it is; the message says where and what to do."""


def load_teacher_data(script_args, dataset_args, input_column: str = "prompt"):
    """
    Load the teacher's text.

    `dataset_name` may be a JSON, JSONL, Parquet or CSV file, a folder holding one such file (or several shards) per
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
        `tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]`: training and test rows.

    Raises:
        [`TeacherDataError`]: nothing to load, or a file, data set or split does not exist.
    """
    train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
    with PartialState().main_process_first():
        if dataset_args.datasets:
            splits = {train_split: _load_mixture(dataset_args)}
        elif script_args.dataset_name is None:
            raise TeacherDataError(
                "No teacher data: set `dataset_name` to a .json, .jsonl, .parquet or .csv file, a folder or a Hub id, or "
                "list a mixture under `datasets`."
            )
        else:
            splits = _load_splits(script_args)
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


def _load_mixture(dataset_args):
    from trl import DatasetMixtureConfig, get_dataset

    mixture = DatasetMixtureConfig(datasets=dataset_args.datasets, streaming=dataset_args.streaming)
    try:
        return get_dataset(mixture)["train"]
    except Exception as error:
        paths = ", ".join(str(entry.path) for entry in dataset_args.datasets)
        raise TeacherDataError(f"Could not load the mixture under `datasets` ({paths}): {error}") from error


def _load_splits(script_args) -> dict:
    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise TeacherDataError(f"`dataset_name: {name}` ends in none of {', '.join(BUILDERS)}.")
        files = {script_args.dataset_train_split: [path]}
    elif path.is_dir():
        files = _files_per_split(path, script_args)
    elif path.suffix in BUILDERS or name.startswith((".", "/", "~")):
        raise TeacherDataError(f"`dataset_name: {name}` does not exist (looked for {path.absolute()}).")
    else:
        try:
            loaded = datasets.load_dataset(name, script_args.dataset_config, streaming=streaming)
        except Exception as error:
            raise TeacherDataError(
                f"`dataset_name: {name}` is neither a local file or folder nor a data set the Hub returned: {error}"
            ) from error
        return dict(loaded) if isinstance(loaded, DatasetDict | IterableDatasetDict) else {"train": loaded}

    splits = {}
    for split, split_files in files.items():
        data_files = [str(file) for file in split_files]
        try:
            splits[split] = datasets.load_dataset(
                BUILDERS[split_files[0].suffix], data_files={"train": data_files}, split="train", streaming=streaming
            )
        except Exception as error:
            cause = error.__cause__ or error
            raise TeacherDataError(f"Could not read {', '.join(data_files)}: {cause}") from error
    return splits


def _files_per_split(folder: Path, script_args) -> dict[str, list[Path]]:
    found = sorted(file for file in folder.iterdir() if file.suffix in BUILDERS)
    files = {}
    for split in (script_args.dataset_train_split, script_args.dataset_test_split):
        # The split is a whole word of the file name: teacher_train.jsonl, train-00000-of-00002.parquet.
        named = [file for file in found if split in (file.stem, *re.split(r"[-_.]", file.stem))]
        if len({file.suffix for file in named}) > 1:
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
