"""A student on the Hub: what is sent, and what is said when it cannot be."""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ..errors import HubError
from ..host.version import __version__
from ..reports.markdown import escape
from ..reports.redaction import public_text, without_tokens
from .compared import CARD_NAME, CARD_STUDENT, without_stale_comparison
from .eval_results import source_url


logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json")
# By name: an `output_dir` also holds checkpoints, logs, pickles and whatever its owner keeps there
STUDENT_FILES = (
    *WEIGHTS,
    "model-*-of-*.safetensors",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
REPORT_FILES = ("curves.png", "reliability.png", "report.md", "metrics.json", "recipe.yaml")
FOLDER_FILES = ("**/*.json", "**/*.safetensors")
TEXTS = (CARD_NAME, "report.md", "metrics.json", "recipe.yaml")
LOCAL_BASES = {"adapter_config.json": "base_model_name_or_path", "tokenizer_config.json": "name_or_path"}
GOOD_NAME = "me/student"


def push_student(
    output_dir: str | Path,
    repo_id: str,
    *,
    folders: Iterable[str] = (),
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload student",
) -> str:
    """
    Create a repository and send a finished student there: see [`stage_student`] for what goes.

    Args:
        output_dir (`str` or `Path`):
            Folder of a run.
        repo_id (`str`):
            Repository, such as `"me/student"`.
        folders (`Iterable[str]`, *optional*):
            Subfolders to send as well, such as `"discriminator"`.
        token (`str`, *optional*):
            Token with write access. `None` takes the one of `hf auth login`, or `HF_TOKEN`.
        private (`bool`, *optional*):
            Whether a repository that does not exist yet is created private.
        revision (`str`, *optional*):
            Branch to commit to.
        commit_message (`str`, *optional*, defaults to `"Upload student"`):
            Message of the commit.

    Returns:
        `str`: address of the repository.

    Raises:
        [`HubError`]: there is no student in `output_dir`, or the Hub refuses it or cannot be reached.
    """
    api = HfApi(library_name="trl-bbkd", library_version=__version__)
    _check_student(output_dir, folders)
    try:
        url = api.create_repo(repo_id, token=token, private=private, exist_ok=True)
    except Exception as error:
        raise _push_error(error, output_dir, repo_id, token, folders) from None
    upload_student(
        api, output_dir, url.repo_id, folders, token=token, revision=revision, commit_message=commit_message
    )
    card = Path(output_dir) / CARD_NAME
    # By it `compare --push` knows the repository. A folder that cannot be written to does not undo the push
    with contextlib.suppress(OSError):
        card.write_text(_renamed(card.read_text(encoding="utf-8"), url.repo_id), encoding="utf-8")
    return str(url)


def upload_student(
    api: HfApi,
    output_dir: str | Path,
    repo_id: str,
    folders: Iterable[str] = (),
    *,
    report_files: Iterable[str] = REPORT_FILES,
    token: str | None = None,
    **commit,
):
    """
    Send a student to an existing repository, in one commit. The other arguments are those of [`push_student`].

    Args:
        api ([`~huggingface_hub.HfApi`]):
            The client.
        report_files (`Iterable[str]`, *optional*):
            Which files of the report are about this student. By default all of them.
        **commit:
            Passed to [`~huggingface_hub.HfApi.upload_folder`].

    Raises:
        [`HubError`]: there is no student, or the Hub refuses it or cannot be reached.
    """
    _check_student(output_dir, folders)
    with tempfile.TemporaryDirectory(prefix="student-") as staged:
        stage_student(output_dir, staged, repo_id, folders, report_files=report_files, token=token)
        try:
            return api.upload_folder(folder_path=staged, repo_id=repo_id, token=token, **commit)
        except Exception as error:
            # Without its chain: a client may quote the request, and with it the token
            raise _push_error(error, output_dir, repo_id, token, folders) from None


def stage_student(
    output_dir: str | Path,
    staged: str | Path,
    repo_id: str,
    folders: Iterable[str] = (),
    *,
    report_files: Iterable[str] = REPORT_FILES,
    token: str | None = None,
) -> None:
    """
    Lay out in `staged` what goes to the Hub: the student, its tokenizer and card, the report, and nothing else.

    Weights are links. Texts are copies without secrets and absolute paths. In the card's example the student bears the
    name of the repository.

    Args:
        output_dir (`str` or `Path`):
            Folder of a run.
        staged (`str` or `Path`):
            An empty folder.
        repo_id (`str`):
            Repository it is for.
        folders (`Iterable[str]`, *optional*):
            Subfolders that go as well; of them, JSON files and safetensors.
        report_files (`Iterable[str]`, *optional*):
            Which files of the report go. By default all of them.
        token (`str`, *optional*):
            A secret that must not be in any text, as those of the environment.
    """
    output_dir, staged = Path(output_dir).absolute(), Path(staged)
    patterns = [*STUDENT_FILES, CARD_NAME, *report_files]
    patterns += [f"{folder}/{files}" for folder in folders for files in FOLDER_FILES]
    for source in sorted({file for pattern in patterns for file in output_dir.glob(pattern) if file.is_file()}):
        target = staged / source.relative_to(output_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.name in TEXTS and target.parent == staged:
            text = public_text(source.read_text(encoding="utf-8"), token)
            if target.name == CARD_NAME:
                text = _renamed(without_stale_comparison(text, output_dir), repo_id)
            target.write_text(text, encoding="utf-8")
        elif target.name in LOCAL_BASES:
            target.write_text(_without_local_base(source), encoding="utf-8")
        elif target.suffix == ".safetensors":
            target.symlink_to(source)
        else:
            shutil.copy(source, target)


def _renamed(card: str, repo_id: str) -> str:
    """A card whose student bears the name of the repository: in the example, and in the title if it bore the old name."""
    found = CARD_STUDENT.search(card)
    if found is None:
        return card
    old_id = json.loads(found.group(1))
    old, new = Path(old_id).name, Path(repo_id).name
    # The last is of the results in the metadata
    for key, before, after in (("model_name: ", old, new), ("# ", escape(old), escape(new)), ("- name: ", old, new)):
        line = re.compile(f"^{key}{re.escape(before)}$", re.MULTILINE)
        card = line.sub((key + after).replace("\\", r"\\"), card, count=1)
    card = card.replace(f"url: {source_url(old_id)}\n", f"url: {source_url(repo_id)}\n")
    return CARD_STUDENT.sub(lambda _: f'student = "{repo_id}"', card)


def _without_local_base(source: Path) -> str:
    values = json.loads(source.read_text(encoding="utf-8"))
    key = LOCAL_BASES[source.name]
    if os.path.isabs(values.get(key) or ""):
        values[key] = Path(values[key]).name
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _check_student(output_dir: str | Path, folders: Iterable[str]) -> None:
    folder = Path(output_dir)
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise HubError(f"{folder} holds no student ({' or '.join(WEIGHTS[:2])}). Name the `output_dir` of a run.")
    missing = [name for name in folders if not (folder / name).is_dir()]
    if missing:
        raise HubError(f"{folder} holds no folder `{missing[0]}`. Push without it, or name the `output_dir` of a run.")


def creation_error(error: Exception, repo_id: str, output_dir: str, token: str | None) -> HubError:
    """What to say when `repo_id` cannot be created."""
    return HubError(
        f"The repository {repo_id} cannot be created on the Hub: {reason(error, token)}. {remedy(error)}Nothing on "
        f"disk is lost: `push_to_hub: false` trains without the Hub, and `trl-bbkd push {shlex.quote(str(output_dir))} "
        f"{_name_to_take(error, repo_id)}` sends a student that is finished."
    )


def _push_error(error: Exception, output_dir, repo_id: str, token: str | None, folders: Iterable[str]) -> HubError:
    command = [
        "trl-bbkd",
        "push",
        str(output_dir),
        _name_to_take(error, repo_id),
        *(f"--with={folder}" for folder in folders),
    ]
    return HubError(
        f"The student could not be pushed to {repo_id}: {reason(error, token)}. It is complete on disk, in "
        f"{output_dir}. {remedy(error)}Push it again with `{shlex.join(command)}`."
    )


def reason(error: Exception, token: str | None) -> str:
    """What the Hub or its client says, without secrets."""
    if isinstance(error, HfHubHTTPError):
        text = f"the Hub answered {error.response.status_code} {error.response.reason_phrase}"
        text += f" ({error.server_message})" if error.server_message else ""
    else:
        text = f"{type(error).__name__}: {error}"
    return without_tokens(" ".join(text.split()).rstrip("."), token)


def _name_to_take(error: Exception, repo_id: str) -> str:
    """No advice to take a name again that cannot be one."""
    return GOOD_NAME if isinstance(error, HFValidationError) else repo_id


def remedy(error: Exception, good_name: str = GOOD_NAME) -> str:
    """What a user can do, if that can be told; a sentence and a space."""
    if isinstance(error, HFValidationError):
        return f"Write the repository like {good_name}. "
    if isinstance(error, OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE. "
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
        return "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write there. "
    return ""
