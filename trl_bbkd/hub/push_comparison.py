"""The table of `trl-bbkd compare` on the Hub: in the cards of the students that it compares."""

import json
import logging
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from ..errors import HubError
from ..host.version import __version__
from ..reports.comparison import ComparedRun, Comparison, equal_diversity_explained
from ..reports.markdown import code, escape, one_line, table
from ..reports.redaction import public_text
from ..reports.verdicts import verdicts
from .compared import BEGIN, CARD_NAME, CARD_STUDENT, END, is_torn, weights_of, with_section
from .names import hub_id
from .push import reason, remedy


logger = logging.getLogger(__name__)

TORN = "has a comparison whose first or last line is gone: delete what is left of it"


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
        [`~errors.HubError`]: a run has no repository, another student is there, or the Hub refuses a card. Before anything is sent
            all repositories are read, and asked whether they may be written to.
    """
    folders = [Path(run.name) for run in comparison.runs]
    own_cards = [_own_card(folder) for folder in folders]
    repositories = [_repository_of(*pair) for pair in zip(own_cards, folders, strict=True)]
    if len({*repositories}) < len(repositories):
        raise HubError(f"Two runs have the same repository, of {', '.join(repositories)}. Push each to its own.")
    api = HfApi(library_name="trl-bbkd", library_version=__version__)
    cards = [_card_of(api, *pair, token) for pair in zip(repositories, comparison.runs, strict=True)]
    sections = [compared_section(comparison, repositories, folder) for folder in folders]
    sent: list[str] = []
    for folder, own_card, repository, card, section in zip(
        folders, own_cards, repositories, cards, sections, strict=True
    ):
        _send(api, repository, card, with_section(card, section), token, sent)
        sent.append(repository)
        try:
            (folder / CARD_NAME).write_text(with_section(own_card, section), encoding="utf-8")
        except OSError as error:
            logger.warning(
                f"The card in {folder} cannot be written ({error.strerror}). If that student is pushed again, the comparison goes."
            )
    return [f"{api.endpoint}/{repository}" for repository in repositories]


def compared_section(comparison: Comparison, repositories: list[str], folder: str | Path) -> str:
    """
    The section in Markdown, fit for strangers: tables and settings. Answers are left out, since the teacher's rows may be nobody's
    to read.

    Args:
        comparison ([`~reports.comparison.Comparison`]):
            The runs.
        repositories (`list[str]`):
            What each is called.
        folder (`str` or `Path`):
            Folder of the run whose card it is for: the section holds as long as the weights there stay.
    """
    names = [escape(name) for name in repositories]
    links = " · ".join(f"[{name}](https://huggingface.co/{name})" for name in repositories)
    lines = ["## Compared", "", f"Students of the same teacher, side by side: {links}.", ""]
    lines += [f"* {sentence}" for sentence in verdicts(comparison.found, names)]
    lines += ["", *table(["", *names], comparison.table()), "", comparison.explanation, ""]
    lines += [*table([f"less {names[0]}", *names[1:]], comparison.differences()), ""]
    if comparison.judged:
        lines += [equal_diversity_explained(comparison.judged), ""]
    if settings := comparison.settings():
        rows = [[escape(name), *map(code, values)] for name, *values in settings]
        lines += ["Settings that differ:", "", *table(["", *names], rows), ""]
    return "\n".join([BEGIN.format(weights=weights_of(folder)), public_text("\n".join(lines)), END])


def _own_card(folder: Path) -> str:
    """The card in a run's folder; empty where there is none."""
    path = folder / CARD_NAME
    try:
        card = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:
        raise HubError(f"Nothing was sent: {path} cannot be read ({one_line(error)}).") from error
    if is_torn(card):
        raise HubError(f"Nothing was sent: {path} {TORN}.")
    return card


def _repository_of(card: str, folder: Path) -> str:
    """Where the student of a run is on the Hub, as its card says."""
    found = CARD_STUDENT.search(card)
    name = hub_id(json.loads(found[1])) if found else None
    # A student that was not pushed is called by its folder, as seen from where it was trained
    if name is None or "/" not in name or name == "/".join(folder.resolve().parts[-2:]):
        raise HubError(
            f"Nothing was sent: the card in {folder} names no repository. Send that student first: `trl-bbkd push {folder} me/student`."
        )
    return name


def _card_of(api: HfApi, repository: str, run: ComparedRun, token: str | None) -> str:
    """The card as it is on the Hub, of the student that was compared."""
    push = f"`trl-bbkd push {run.name} {repository}`"
    advice = f"If the student is not there yet, send it: {push}"
    try:
        api.auth_check(repository, token=token, write=True)
        card, metrics = (_text_of(api, repository, name, token) for name in (CARD_NAME, "metrics.json"))
    except Exception as error:
        # Without its chain: a client may quote the request, and with it the token
        why, advice = reason(error, token), f"{remedy(error)}{advice}"
    else:
        if card is None:
            why = "it has no card"
        elif _results(metrics, run.method) != run.metrics["results"][run.method]:
            why, advice = f"its student is another than that in {run.name}", f"Send this one first: {push}"
        elif is_torn(card):
            why, advice = f"it {TORN}", "Or send it anew: " + push
        else:
            return card
    raise HubError(f"Nothing was sent: the card of {repository} cannot be changed: {why}. {advice}.") from None


def _text_of(api: HfApi, repository: str, name: str, token: str | None) -> str | None:
    """A file on the Hub; `None` where it is not there."""
    with tempfile.TemporaryDirectory(prefix="card-") as fetched:
        try:
            path = api.hf_hub_download(repository, name, token=token, local_dir=fetched)
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError as error:
            # The client speaks of a cache, in which nothing was looked for
            raise (error.__cause__ or error) from None
        return Path(path).read_text(encoding="utf-8")


def _results(metrics: str | None, method: str) -> dict | None:
    """Of a `metrics.json`, what its student reached; `None` where that is not known."""
    try:
        return json.loads(metrics or "")["results"][method]
    except (ValueError, KeyError, TypeError):
        return None


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
