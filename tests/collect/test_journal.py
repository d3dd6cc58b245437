"""The journal: whose it is, what it keeps, and what a lost process leaves."""

import sqlite3
import subprocess
import sys

import pytest

from trl_bbkd.collect.budget import Spent
from trl_bbkd.collect.journal import Entry, Journal, now
from trl_bbkd.collect.replies import Answers, Usage, read_choice
from trl_bbkd.errors import JournalError


CHOICE = read_choice(
    {"message": {"content": "Hi"}, "finish_reason": "stop", "logprobs": {"content": [{"logprob": -1}]}}
)


USAGE = Usage(3, 4, 1)


def entry(sample=0, usage=USAGE):
    return Entry.answered(sample, CHOICE, Answers([CHOICE], usage, "m", "fp"), usage, 2, str)


def test_what_is_kept(tmp_path):
    with Journal(tmp_path / "journal.sqlite") as journal:
        request = journal.sending(Spent(1, 100, 200, 0.5))
        assert journal.spent() == Spent(1, 100, 200, 0.5) and journal.unheard() == 1
        journal.settle(request, "answered", Spent(1, 3, 4, 0.01), {b"a": entry(0), b"b": entry(1, None)})
        failed = Entry(0, 3, now(), failure="status 500", message="oops")
        journal.settle(journal.sending(Spent(1, 9, 9, 1.0)), "status 500", Spent(1), {b"c": failed})
        journal.settle(journal.sending(Spent(1, 9, 9, 1.0)), "unreachable", Spent(0))
    with Journal(tmp_path / "journal.sqlite") as journal:
        assert [journal.state(key) for key in (b"a", b"b", b"c", b"d")] == ["answer", "answer", "failure", None]
        found = journal.entry(b"a")
        assert read_choice(CHOICE.raw) == CHOICE and '"logprob": -1' in found.choice
        assert (found.model, found.system_fingerprint, found.finish_reason, found.attempts) == ("m", "fp", "stop", 2)
        assert found.usage == Usage(3, 4, 1) and journal.entry(b"b").usage is None
        assert journal.entry(b"c") == failed and journal.entry(b"d") is None
        assert journal.spent() == Spent(2, 3, 4, 0.01) and journal.unheard() == 0


def test_the_key_is_in_no_column(tmp_path):
    """Wherever an endpoint quotes it."""
    raw = {"message": {"content": "my KEY"}, "finish_reason": "stop KEY"}
    answers = Answers([read_choice(raw)], USAGE, "m KEY", "fp KEY")
    kept = Entry.answered(0, answers.choices[0], answers, USAGE, 1, lambda text: text.replace("KEY", "***"))
    assert "KEY" not in str(vars(kept)) and str(vars(kept)).count("***") == 5


def test_a_second_answer_takes_the_place_of_a_failure(tmp_path):
    with Journal(tmp_path / "journal.sqlite") as journal:
        failed = Entry(0, 3, now(), failure="status 500")
        journal.settle(journal.sending(Spent(1)), "status 500", Spent(1), {b"a": failed})
        journal.settle(journal.sending(Spent(1)), "answered", Spent(1), {b"a": entry()})
        assert journal.state(b"a") == "answer"


def test_answers_and_what_they_took_are_one_commit(tmp_path):
    """As where the process ends, or the disk is full, between the two."""
    with Journal(tmp_path / "journal.sqlite") as journal:
        request = journal.sending(Spent(1, 9, 9, 1.0))
        with pytest.raises(sqlite3.Error):
            journal.settle(request, "answered", Spent(1, object(), 1, 0.1), {b"a": entry()})
    with Journal(tmp_path / "journal.sqlite") as journal:
        assert journal.state(b"a") is None and journal.unheard() == 1 and journal.spent() == Spent(1, 9, 9, 1.0)


def test_keys_that_come_again(tmp_path):
    with Journal(tmp_path / "journal.sqlite") as journal:
        meetings = journal.first_meetings()
        assert [meetings.is_first(key) for key in (b"a", b"b", b"a")] == [True, True, False]
        assert journal.first_meetings().is_first(b"a")


def test_a_journal_in_use(tmp_path):
    path = tmp_path / "journal.sqlite"
    code = f"""
from pathlib import Path
from trl_bbkd.collect.journal import Journal
from trl_bbkd.errors import JournalError
try: Journal(Path({str(path)!r}))
except JournalError as error: print(error)
"""
    with Journal(path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "is in use by another collection: the two would pay twice" in done.stdout
        with pytest.raises(JournalError, match="in use"):
            Journal(path)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == ""


def test_another_schema(tmp_path):
    path = tmp_path / "journal.sqlite"
    Journal(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(JournalError, match="has schema 7, this version of trl-bbkd reads 1"):
        Journal(path)


def test_a_database_of_another_program(tmp_path):
    path = tmp_path / "journal.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()
    with pytest.raises(JournalError, match="is a database of another program"):
        Journal(path)
    path.write_text("This is no database, but a text that is long enough to be read as one." * 20)
    with pytest.raises(JournalError, match="is no journal"):
        Journal(path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be opened|cannot be made"):
        Journal(tmp_path / "file/journal.sqlite")
