"""All that was asked and answered, in one SQLite file: each answer is committed before it counts."""

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import JournalError
from .budget import Spent
from .replies import Answers, Choice, Usage


# What the file says of itself; `application_id` is "BBKD"
SCHEMA, APPLICATION = 1, 0x42424B44
ANSWER, FAILURE = "answer", "failure"
TABLES = """
CREATE TABLE answers (
    key BLOB PRIMARY KEY,
    sample INTEGER NOT NULL,
    failure TEXT,
    reason TEXT,
    message TEXT,
    choice TEXT,
    finish_reason TEXT,
    model TEXT,
    system_fingerprint TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    cached_tokens INTEGER,
    attempts INTEGER NOT NULL,
    asked_at TEXT NOT NULL,
    batch_id TEXT
) WITHOUT ROWID;
CREATE TABLE requests (
    id INTEGER PRIMARY KEY,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cost REAL NOT NULL,
    outcome TEXT,
    sent_at TEXT NOT NULL
);
CREATE TABLE endpoints (kind BLOB PRIMARY KEY, found TEXT NOT NULL);
"""
COLUMNS = "sample, attempts, asked_at, failure, reason, message, choice, finish_reason, model, system_fingerprint, "
COLUMNS += "prompt_tokens, completion_tokens, cached_tokens"


@dataclass
class Entry:
    """
    What a journal has under a key: an answer, whole or not, or a failure.

    Attributes:
        sample (`int`): number of the answer among those of its prompt.
        attempts (`int`): requests that it took.
        asked_at (`str`): date and time, UTC.
        failure (`str` or `None`): kind of the fault that was the last; then there is no answer.
        reason (`str` or `None`): why an answer is no whole one.
        message (`str` or `None`): what the endpoint said to a request that failed; redacted.
        choice (`str` or `None`): the answer as JSON, as it came, with its log-probabilities.
        finish_reason, model, system_fingerprint (`str` or `None`): the endpoint's own words.
        prompt_tokens, completion_tokens, cached_tokens (`int` or `None`): of the request, at the first of its answers;
            `None` where the endpoint did not say.
    """

    sample: int
    attempts: int
    asked_at: str
    failure: str | None = None
    reason: str | None = None
    message: str | None = None
    choice: str | None = None
    finish_reason: str | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None

    @classmethod
    def answered(
        cls,
        sample: int,
        choice: Choice,
        answers: Answers,
        usage: Usage | None,
        attempts: int,
        redacted: Callable[[str], str],
    ) -> "Entry":
        """An answer, of which `redacted` takes the key, should it be in there."""
        return cls(
            sample,
            attempts,
            now(),
            reason=choice.reason,
            choice=redacted(json.dumps(choice.raw, ensure_ascii=False)),
            finish_reason=choice.finish_reason and redacted(choice.finish_reason),
            model=answers.model and redacted(answers.model),
            system_fingerprint=answers.system_fingerprint and redacted(answers.system_fingerprint),
            prompt_tokens=usage.prompt if usage else None,
            completion_tokens=usage.completion if usage else None,
            cached_tokens=usage.cached if usage else None,
        )

    @property
    def usage(self) -> Usage | None:
        if self.prompt_tokens is None or self.completion_tokens is None:
            return None
        return Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens or 0)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Journal:
    """
    A journal of one process, until it is closed or the process ends, however.

    Args:
        path (`Path`):
            The file; it is made where there is none.

    Raises:
        [`~errors.JournalError`]: it is no journal of this version, or in use.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=0, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            why = getattr(error, "strerror", None) or error
            raise JournalError(
                f"{path} cannot be opened: {why}. Name another output_dir, or another journal."
            ) from None
        try:
            self._open()
        except sqlite3.OperationalError as error:
            self._connection.close()
            if "locked" in str(error):
                raise JournalError(
                    f"{path} is in use by another collection: the two would pay twice. Wait for its end, or name another "
                    "output_dir."
                ) from None
            raise JournalError(f"{path} cannot be opened: {error}.") from None
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise JournalError(f"{path} is no journal: {error}. Name another output_dir, or move the file.") from None
        except JournalError:
            self._connection.close()
            raise

    def _open(self) -> None:
        execute = self._connection.execute
        # Held until the end of the connection: no second collection writes here
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = NORMAL")
        execute("BEGIN EXCLUSIVE")
        (application,), (schema,) = (
            execute("PRAGMA application_id").fetchone(),
            execute("PRAGMA user_version").fetchone(),
        )
        is_new = not execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if is_new:
            for statement in TABLES.split(";")[:-1]:
                execute(statement)
            execute(f"PRAGMA application_id = {APPLICATION}")
            execute(f"PRAGMA user_version = {SCHEMA}")
        execute("COMMIT")
        if not is_new and application != APPLICATION:
            raise JournalError(
                f"{self.path} is a database of another program. Name another output_dir, or move the file."
            )
        if not is_new and schema != SCHEMA:
            raise JournalError(
                f"{self.path} has schema {schema}, this version of trl-bbkd reads {SCHEMA}. Go on with the version that wrote "
                "it, or name another output_dir, where all is asked anew."
            )

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Answers

    def state(self, key: bytes) -> str | None:
        """What is there under a key, `"answer"` or `"failure"`, without reading it."""
        row = self._connection.execute("SELECT failure IS NULL FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else ANSWER if row[0] else FAILURE

    def entry(self, key: bytes) -> Entry | None:
        row = self._connection.execute(f"SELECT {COLUMNS} FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Entry(*row)

    def sending(self, worst: Spent) -> int:
        """Note a request before it is sent: if nothing more is heard of it, its worst case counts as paid."""
        cursor = self._connection.execute(
            "INSERT INTO requests (prompt_tokens, completion_tokens, cost, sent_at) VALUES (?, ?, ?, ?)",
            (worst.prompt, worst.completion, worst.cost, now()),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def settle(self, request: int, outcome: str, actual: Spent, entries: dict[bytes, Entry] | None = None) -> None:
        """What became of a request, with all that it brought, in one commit. One that was never sent leaves nothing."""
        execute = self._connection.execute
        execute("BEGIN")
        for key, entry in (entries or {}).items():
            values = (key, *vars(entry).values())
            marks = ", ".join("?" * len(values))
            execute(f"INSERT OR REPLACE INTO answers (key, {COLUMNS}) VALUES ({marks})", values)
        if actual.requests:
            execute(
                "UPDATE requests SET prompt_tokens = ?, completion_tokens = ?, cost = ?, outcome = ? WHERE id = ?",
                (actual.prompt, actual.completion, actual.cost, outcome, request),
            )
        else:
            execute("DELETE FROM requests WHERE id = ?", (request,))
        execute("COMMIT")

    def spent(self) -> Spent:
        """Of all requests ever sent. Those of which nothing more was heard count with their worst case."""
        sums = "COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(cost)"
        row = self._connection.execute(f"SELECT {sums} FROM requests").fetchone()
        return Spent(row[0], row[1] or 0, row[2] or 0, row[3] or 0.0)

    def unheard(self) -> int:
        """Requests of earlier runs, of which nothing more was heard."""
        return self._connection.execute("SELECT COUNT(*) FROM requests WHERE outcome IS NULL").fetchone()[0]

    # What an endpoint does with parameters

    def findings(self, kind: bytes) -> dict[str, Any] | None:
        row = self._connection.execute("SELECT found FROM endpoints WHERE kind = ?", (kind,)).fetchone()
        return None if row is None else json.loads(row[0])

    def note_findings(self, kind: bytes, found: dict[str, Any]) -> None:
        self._connection.execute("INSERT OR REPLACE INTO endpoints VALUES (?, ?)", (kind, json.dumps(found)))

    # Keys that were met

    def first_meetings(self) -> "FirstMeetings":
        return FirstMeetings(self._connection)


class FirstMeetings:
    """Tells keys that come up for the first time from those that come again; kept on the disk."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection
        connection.execute("DROP TABLE IF EXISTS temp.met")
        connection.execute("CREATE TEMP TABLE met (key BLOB PRIMARY KEY) WITHOUT ROWID")

    def is_first(self, key: bytes) -> bool:
        return self._connection.execute("INSERT OR IGNORE INTO met VALUES (?)", (key,)).rowcount == 1
