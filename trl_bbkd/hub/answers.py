"""A collected set on the Hub, as a data set."""

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from ..errors import HubError
from ..host.version import __version__
from ..reports.redaction import public_text
from .push import reason, remedy


GOOD_NAME = "me/answers"


def create_repository(repo_id: str, private: bool, secret: str | None = None) -> str:
    """
    Create a data set's repository, unless it is there; one that is there stays as private or public as it is.

    Args:
        repo_id (`str`):
            Repository, such as `"me/answers"`.
        private (`bool`):
            Whether others may not see it.
        secret (`str`, *optional*):
            What must not be in any message, beside the token and the secrets of the environment.

    Returns:
        `str`: its id, with the user's name where `repo_id` has none.

    Raises:
        [`HubError`]: the Hub refuses it or cannot be reached.
    """
    try:
        return _api().create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    except Exception as error:
        # Without its chain: a client may quote the request, and with it the token
        raise HubError(
            f"The data set {repo_id} cannot be created on the Hub: {reason(error, secret)}. {remedy(error, GOOD_NAME)}"
            "Nothing was asked yet: `push_to_hub: false` collects without the Hub."
        ) from None


def push_set(folder: str | Path, repo_id: str, files: Iterable[str], secret: str | None = None) -> str:
    """
    Send a set and its card, in one commit. The card goes without secrets and absolute paths.

    Args:
        folder (`str` or `Path`):
            Folder of the set.
        repo_id (`str`):
            Repository that is there.
        files (`Iterable[str]`):
            What of the folder goes as it is.
        secret (`str`, *optional*):
            As for [`create_repository`].

    Returns:
        `str`: address of the commit.

    Raises:
        [`HubError`]: the Hub refuses it or cannot be reached.
    """
    folder = Path(folder)
    card = public_text((folder / "README.md").read_text(encoding="utf-8"), secret)
    operations = [CommitOperationAdd("README.md", card.encode())]
    operations += [CommitOperationAdd(name, folder / name) for name in files]
    try:
        commit = _api().create_commit(repo_id, operations, commit_message="Upload answers", repo_type="dataset")
    except Exception as error:
        raise HubError(
            f"The set could not be pushed to {repo_id}: {reason(error, secret)}. It is complete on disk, in {folder}. "
            f"{remedy(error, GOOD_NAME)}The same command pushes it again, and asks for nothing twice."
        ) from None
    return str(commit.repo_url)


def _api() -> HfApi:
    return HfApi(library_name="trl-bbkd", library_version=__version__)
