"""`trl-bbkd collect`: a recipe becomes a set of a teacher's answers."""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import EndpointError, RecipeError
from .settings import FILTER_KEYS, CollectConfig
from .tally import Tally, listed


SECONDS_BETWEEN_LINES = 30.0
REFRESH = 0.25
MANY_ROWS = 10_000


def collect(settings: CollectConfig) -> bool:
    """
    Ask for what is missing, and write the set of what is there.

    Args:
        settings ([`~collect.settings.CollectConfig`]):
            The recipe.

    Returns:
        `bool`: whether the run came to its end, or to a cap, and was not interrupted.

    Raises:
        [`~errors.DistillationError`]: something in the recipe, the prompts or the journal does not fit, or the endpoint
            or the Hub refuses. What was answered before is kept.
    """
    key = key_of(settings)
    # Only now: what reads data sets takes a second to import
    from ..host.files import write_atomically
    from ..hub.answers import create_repository, push_set
    from .answer_set import FILE, AnswerSet
    from .card import card, warnings
    from .filters import Filters
    from .journal import Journal
    from .prompts import Prompts
    from .run import Collection

    folder = Path(settings.output_dir).expanduser()
    prompts = Prompts(settings)
    filters = Filters(settings) if any(getattr(settings, name) for name in FILTER_KEYS) else None
    aligner = None if settings.tokenizer is None else _aligner(settings.tokenizer, prompts)
    journal_file = Path(settings.journal).expanduser() if settings.journal else folder / "journal.sqlite"
    with Journal(journal_file) as journal:
        collection = Collection(settings, prompts, journal, key)
        if len(prompts) >= MANY_ROWS:
            _say(f"Reading {len(prompts):,} prompts.")
        collection.count()
        _say(_opening(collection.tally, journal.unheard()))
        # Before the first request: a Hub that refuses is known before anything is paid
        repository = None
        if settings.push_to_hub and settings.hub_dataset_id:
            repository = create_repository(settings.hub_dataset_id, settings.hub_private_repo, key)
        interrupted = False
        if collection.tally.expected:
            interrupted = ask(collection, settings)
        survey = AnswerSet(prompts, collection.maker, journal, aligner, filters).write(folder)
        spent = journal.spent()
        # A set of an earlier recipe keeps its card until there is another
        if survey.rows or not (folder / FILE).exists():
            write_atomically(folder / "README.md", card(settings, survey, spent, collection.found))
    for line in warnings(settings, survey, collection.found):
        _say(f"Warning: {line}")
    if survey.rows:
        _say(f"{survey.rows:,} {'answers' if settings.labels is None else 'labelled texts'} in {folder / FILE}.")
    for what, counts in (("Left out", survey.reasons), ("Failed", survey.failures)):
        if counts:
            retry = " Ask again with --retry_failed." if what == "Failed" else ""
            _say(f"{what}: {listed(counts)}.{retry}")
    for reason, examples in survey.examples.items():
        for example in examples:
            _say(f"  {reason}, {example}")
    end = collection.end
    if end is not None and end.kind == "error":
        raise EndpointError(f"{end.text.rstrip('.')}.{_open(survey.not_asked)}")
    if end is not None and end.kind == "cap":
        fits = "" if collection.tally.spent.requests else " The worst case of a single request is more than it leaves."
        _say(f"Stopped at `{end.text}: {getattr(settings, end.text):g}`.{fits}{_open(survey.not_asked)}")
    if repository and not interrupted:
        if survey.rows:
            _say(f"On the Hub: {push_set(folder, repository, [FILE], key)}")
        else:
            _say("Nothing was pushed: there is no answer.")
    return not interrupted


def _aligner(tokenizer: str, prompts):
    """
    What brings log-probabilities to the tokens of the tokenizer that a recipe names.

    Raises:
        [`~errors.RecipeError`]: there is none, or it cannot spell.
        [`~errors.TeacherDataError`]: it has no chat template, and the set has messages.
    """
    from ..data.rendering import ChatRenderer
    from .alignment import Aligner
    from .spelling import load_speller

    speller = load_speller(tokenizer)
    if prompts.conversational:
        ChatRenderer(speller.tokenizer)
    return Aligner(speller)


def key_of(settings: CollectConfig) -> str | None:
    """
    The endpoint's key, from the environment.

    Raises:
        [`~errors.RecipeError`]: there is none.
    """
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise RecipeError(
            f"there is no key: the environment has no {settings.api_key_env}. Set it (export {settings.api_key_env}=...), name "
            "another variable with `api_key_env`, or write `api_key_env: null` for an endpoint that needs none."
        )
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(f"the key in {settings.api_key_env} has characters that no header can carry. Copy it again.")
    return key


def _opening(tally: Tally, unheard: int) -> str:
    there = f" {tally.there:,} are there." if tally.there else ""
    there += f" {tally.failed_before:,} failed before." if tally.failed_before else ""
    lost = f" Of {unheard:,} requests nothing was heard: they count at their worst." if unheard else ""
    return f"{tally.expected:,} answers to ask for.{there}{lost}"


def _open(count: int) -> str:
    what = "1 answer is" if count == 1 else f"{count:,} answers are"
    return f" {what} not asked for yet: the same command goes on." if count else ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def ask(collection, settings: CollectConfig) -> bool:
    """Run, with a line that tells how it goes; return whether it was interrupted."""
    try:
        asyncio.run(_run(collection, settings.currency if settings.prompt_price is not None else None))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return True
    end = collection.end
    return end is not None and end.kind == "interrupt"


async def _run(collection, currency: str | None) -> None:
    with _live_line() as show:
        teller = asyncio.create_task(_tell(collection, currency, show))
        try:
            await collection.run()
        finally:
            teller.cancel()
    if collection.tally.answered or collection.tally.failed:
        _say(collection.tally.line(currency))


async def _tell(collection, currency: str | None, show) -> None:
    while True:
        line = collection.tally.line(currency)
        if collection.end is not None:
            line += f" · stopping, {collection.pace.in_flight} in flight"
            line += " (Ctrl-C again leaves them)" if collection.end.kind == "interrupt" else ""
        elif collection.pace.is_paused:
            line += " · pause"
        show(line)
        await asyncio.sleep(REFRESH)


@contextlib.contextmanager
def _live_line() -> Iterator:
    """A line that is written anew on a terminal; elsewhere a line now and then."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("") as status:
            yield lambda line: status.update(Text(line))
        return
    last = time.monotonic()

    def show(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            _say(line)

    yield show
