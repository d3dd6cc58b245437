"""The table of `trl-bbkd compare` on the Hub: in the cards of the students that it compares."""

import json
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError

from ..errors import HubError
from ..host.version import __version__
from ..reports.comparison import Comparison
from .compared import CARD_NAME, CARD_STUDENT, compared_section, with_section
from .names import hub_id
from .push import reason, remedy


def push_comparison(comparison: Comparison, token: str | None = None) -> list[str]:
    """
    Put the comparison into the card of each run's student, on the Hub and in the run's folder. Of the card on the Hub, which may
    have been edited there, nothing else changes. Weights are not sent.

    Args:
        comparison ([`~reports.comparison.Comparison`]):
            Of runs whose students were pushed.
        token (`str`, *optional*):
            Token with write access. `None` takes the one of `hf auth login`, or `HF_TOKEN`.

    Returns:
        `list[str]`: for each run, the address of its repository.

    Raises:
        [`~errors.HubError`]: a run has no repository, or the Hub refuses a card. Before anything is sent all repositories are
            read, and asked whether they may be written to.
    """
    folders = [Path(run.name) for run in comparison.runs]
    repositories = [repository_of(folder) for folder in folders]
    if len({*repositories}) < len(repositories):
        raise HubError(f"Two runs have the same repository, of {', '.join(repositories)}. Push each to its own.")
    api = HfApi(library_name="trl-bbkd", library_version=__version__)
    cards = [_card_of(api, *pair, token) for pair in zip(repositories, folders, strict=True)]
    sent: list[str] = []
    for folder, repository, card in zip(folders, repositories, cards, strict=True):
        section = compared_section(comparison, repositories, folder)
        _send(api, repository, card, with_section(card, section), token, sent)
        own = folder / CARD_NAME
        own.write_text(with_section(own.read_text(encoding="utf-8"), section), encoding="utf-8")
        sent.append(repository)
    return [f"{api.endpoint}/{repository}" for repository in repositories]


def repository_of(folder: Path) -> str:
    """
    Where the student of a run is on the Hub, as its card says.

    Raises:
        [`~errors.HubError`]: it was not pushed, or its card is gone.
    """
    card = folder / CARD_NAME
    found = CARD_STUDENT.search(card.read_text(encoding="utf-8")) if card.is_file() else None
    name = hub_id(json.loads(found[1])) if found else None
    if name is None or "/" not in name:
        raise HubError(
            f"Nothing was sent: the card in {folder} names no repository. Send that student first: `trl-bbkd push {folder} me/student`."
        )
    return name


def _card_of(api: HfApi, repository: str, folder: Path, token: str | None) -> str:
    """The card as it is on the Hub."""
    try:
        api.auth_check(repository, token=token, write=True)
        with tempfile.TemporaryDirectory(prefix="card-") as fetched:
            path = api.hf_hub_download(repository, CARD_NAME, token=token, local_dir=fetched)
            return Path(path).read_text(encoding="utf-8")
    except RemoteEntryNotFoundError:
        why, advice = "it has no card", ""
    except Exception as error:
        # Without its chain: a client may quote the request, and with it the token
        why, advice = reason(error, token), remedy(error)
    raise HubError(
        f"Nothing was sent: the card of {repository} cannot be changed: {why}. {advice}If the student is not there yet, send it: "
        f"`trl-bbkd push {folder} {repository}`."
    ) from None


def _send(api: HfApi, repository: str, before: str, card: str, token: str | None, sent: list[str]) -> None:
    if card == before:
        return
    try:
        api.upload_file(
            path_or_fileobj=card.encode(),
            path_in_repo=CARD_NAME,
            repo_id=repository,
            token=token,
            commit_message="Compare with other students",
        )
    except Exception as error:
        done = f"Done before: {', '.join(sent)}" if sent else "Nothing was sent"
        raise HubError(
            f"The card of {repository} could not be sent: {reason(error, token)}. {remedy(error)}{done}. The same command sends what "
            "is missing."
        ) from None
