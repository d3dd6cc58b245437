"""What is wrong with a recipe is one line, before the first request."""

import sqlite3
import sys

import pytest
from tokenizers import normalizers

from tests.collect.helpers import prompts_file, write_recipe
from tests.collect.server import KEY, TeacherServer
from tests.collect.teachers import byte_level
from trl_bbkd.cli import main
from trl_bbkd.collect.command import key_of
from trl_bbkd.collect.journal import Journal
from trl_bbkd.collect.settings import CollectConfig


@pytest.fixture(scope="module")
def server():
    with TeacherServer() as server:
        yield server


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main(["collect", *map(str, words)])
    assert stopped.value.code == 2
    # What `datasets` and the run say of themselves aside
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line.removeprefix("error: ")


@pytest.fixture
def refusal(server, tmp_path, monkeypatch, capsys):
    """What a recipe of three prompts, changed so, is refused with."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts_file(tmp_path, ["A?", "B?", "C?"])

    def refuse(*words, **changes):
        before = server.requests
        line = refused(capsys, write_recipe(server, tmp_path, **changes), *words)
        assert server.requests == before
        return line

    return refuse


def test_no_key(refusal, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert refusal() == (
        "there is no key: the environment has no OPENAI_API_KEY. Set it (export OPENAI_API_KEY=...), name another variable with "
        "`api_key_env`, or write `api_key_env: null` for an endpoint that needs none."
    )


def test_a_key_with_a_line_break(refusal, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a\nb-secret")
    line = refusal()
    assert "the key in OPENAI_API_KEY has characters that no header can carry" in line and "secret" not in line
    # At its end, as a file of keys has it, it is no part of the key
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert key_of(CollectConfig("http://h/v1", "m", "out", "x")) == KEY


CHANGES = {
    "a cap of 0": ({"max_cost": 0}, "max_cost: expected more than 0, got 0."),
    "a cap that is no number": (
        {"max_cost": float("nan"), "prompt_price": 1, "completion_price": 1},
        "max_cost: expected more than 0, got nan.",
    ),
    "a price that is no number": ({"prompt_price": float("nan")}, "prompt_price: expected 0 or more, got nan."),
    "a cap of 0 requests": ({"max_requests": 0}, "max_requests: expected 1 or more, got 0."),
    "a cap of money without a price": ({"max_cost": 1}, "needs `prompt_price` and `completion_price`"),
    "a typo": ({"max_token": 5}, "unknown key 'max_token'; did you mean 'max_tokens'?"),
    "a name of elsewhere": ({"rpm": 5}, "unknown key 'rpm'; did you mean 'requests_per_minute'?"),
    "a key in the recipe": ({"api_key": KEY}, "a key stands in no recipe and in no command."),
    "a key for a name": (
        {"api_key_env": KEY},
        "it is the name of an environment variable, such as OPENAI_API_KEY, not a key.",
    ),
    "a password": ({"base_url": f"http://me:{KEY}@h/v1"}, "base_url: it holds a user or a password."),
    "a key in the address": ({"base_url": f"http://h/v1?api_key={KEY}"}, "base_url: 'api_key' looks like a secret."),
    "no address": ({"base_url": "localhost:8000"}, "base_url: expected an address such as https://"),
    "too long an address": ({"base_url": "http://h/v1/chat/completions"}, "leave /chat/completions out"),
    "logprobs": ({"top_logprobs": 5}, "endpoints give them with `logprobs: true` alone."),
    "a share of 1": ({"max_similarity": 1.0}, "max_similarity: expected a share between 0 and 1, got 1."),
    "no characters": ({"max_characters": 0}, "max_characters: expected 1 or more, got 0."),
    "filters of labels": (
        {"labels": ["a", "b"], "num_samples": 5, "max_characters": 9},
        "max_characters: a set of labels has",
    ),
    "one label": ({"labels": ["a"], "num_samples": 5}, "labels: expected two names or more"),
    "a label twice": ({"labels": ["a", "A "], "num_samples": 5}, "labels: 'a' is there twice."),
    "too many labels": ({"labels": [f"l{n}" for n in range(27)], "num_samples": 5}, "Set `label_answers: names`."),
    "labels alone": ({"labels": ["a", "b"]}, "labels: one thing has to say how sure the teacher is"),
    "labels, said twice": (
        {"labels": ["a", "b"], "num_samples": 5, "logprobs": True, "top_logprobs": 5},
        "one thing has to",
    ),
    "labels without alternatives": ({"labels": ["a", "b"], "logprobs": True}, "need `top_logprobs: 20`"),
    "a label's prompt without the text": (
        {"labels": ["a", "b"], "num_samples": 5, "label_prompt": "{labels}?"},
        "label_prompt: it needs {text} and {labels}",
    ),
    "a label's prompt alone": (
        {"label_prompt": "{text}{labels}"},
        "label_prompt: it asks for one of `labels`. Name them.",
    ),
    "labels as messages": (
        {"labels": ["a", "b"], "num_samples": 5, "conversational": True},
        "conversational: a set of labels",
    ),
    "labels of no text": ({"labels": ["a", "b"], "num_samples": 5, "prompt_column": "x"}, "has no column 'x'"),
    "agreement of one": ({"teacher_confidence": "agreement"}, "Set num_samples to 2 or more."),
    "a mean of nothing": ({"teacher_confidence": "mean_logprob"}, "mean_logprob needs `logprobs: true`. Add it."),
    "no such confidence": ({"teacher_confidence": "high"}, "expected one of agreement, mean_logprob, verbalised"),
    "a tokenizer without log-probabilities": ({"tokenizer": "x"}, "with `logprobs: true` alone. Add it."),
    "no tokenizer": (
        {"tokenizer": "no/such/folder", "logprobs": True},
        "tokenizer: there is no tokenizer at no/such/folder: ",
    ),
    "a stream": ({"extra_body": {"stream": True}}, "take 'stream' out: answers are read whole."),
    "a parameter of ours": ({"extra_body": {"n": 2}}, "take 'n' out: a recipe has a key for it."),
    "a training's recipe": ({"method": "gad"}, "this recipe trains: `trl-bbkd train"),
    "no such prompts": ({"dataset_name": "nowhere.jsonl"}, "`dataset_name: nowhere.jsonl` does not exist"),
    "no such column": ({"prompt_column": "question"}, "has no column 'question'; columns found: prompt"),
    "no such split": ({"dataset_name": ".", "dataset_train_split": "test"}, "has no file for the `test` split"),
    "a name of no parameter": ({"max_tokens_name": "max_new"}, "expected one of max_tokens, max_completion_tokens"),
    "no name on the Hub": ({"push_to_hub": True}, "push_to_hub: it needs `hub_dataset_id`, the repository of the set"),
    "a student's name on the Hub": ({"hub_model_id": "me/a"}, "'hub_model_id'; did you mean 'hub_dataset_id'?"),
    "system prompt of texts": ({"system_prompt": "x", "keep_system_prompt": True}, "Add `conversational: true`."),
}


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES)
def test_recipes(refusal, changes, message):
    line = refusal(**changes)
    assert message in line and KEY not in line and "\n" not in line


def test_a_tokenizer_that_cannot_spell(refusal, tmp_path):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "student")
    line = refusal(tokenizer=str(tmp_path / "student"), logprobs=True)
    assert f"tokenizer: {tmp_path}/student cannot spell 'Naïve Ünïcode, UPPER lower'" in line


def test_a_tokenizer_without_a_chat_template(refusal, tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "student")
    line = refusal(tokenizer=str(tmp_path / "student"), logprobs=True, conversational=True)
    assert "the tokenizer of" in line and "has no chat template" in line


OPTIONS = {
    "a typo": (["--temprature", "1"], "unknown option --temprature; did you mean '--temperature'?"),
    "a value": (["--temperature", "hot"], "--temperature: expected a number, got 'hot'."),
    "a check": (["--concurrency", "0"], "--concurrency: expected 1 or more, got 0."),
    "a key": (["--api_key", KEY], "option --api_key: a key stands in no recipe and in no command."),
    "a key, joined": ([f"--api-key={KEY}"], "option --api-key: a key stands in no recipe"),
}


@pytest.mark.parametrize(("words", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options(refusal, words, message):
    line = refusal(*words)
    assert message in line and KEY not in line


@pytest.mark.parametrize("missing", ["base_url", "model", "output_dir", "dataset_name"])
def test_what_is_needed(refusal, missing):
    assert f"`{missing}` is missing." in refusal(**{missing: None})


ROWS = {
    "another column": ([{"question": "A?"}], "has neither a column `prompt` nor `messages`; columns found: question."),
    "empty": (["A?", " "], "Row 1: `prompt` is empty; remove the row."),
    "a picture": ([[{"role": "user", "content": [{"type": "image"}]}]], "only text is distilled"),
    "an answer": (["x", "y", {"prompt": None}], "Row 2: `prompt` is no text, as in the first row"),
    "no question": ([[{"role": "assistant", "content": "Hi"}]], "has no message that could be answered"),
    "tools": ([{"prompt": [{"role": "user", "content": "A?"}], "tools": "{"}], "Row 0: `tools` is no JSON"),
    "tools beside texts": ([{"prompt": "A?", "tools": "[]"}], "the column `tools` needs a set of messages."),
}


@pytest.mark.parametrize(("rows", "message"), ROWS.values(), ids=ROWS)
def test_rows(refusal, tmp_path, rows, message):
    prompts_file(tmp_path, rows)
    assert message in refusal()


@pytest.mark.parametrize(
    ("package", "changes"),
    [("py3langid", {"languages": ["en"]}), ("rensa", {"max_similarity": 0.8})],
    ids=["py3langid", "rensa"],
)
def test_a_filter_whose_package_is_missing(refusal, monkeypatch, package, changes):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    assert refusal(**changes) == (
        f'{next(iter(changes))}: this needs {package}, which is not installed: pip install "trl-bbkd[filters]".'
    )


def test_a_language_that_is_none(refusal):
    pytest.importorskip("py3langid")
    assert "languages: 'english' is none of af, am, ar," in refusal(languages=["english"])


def test_labels_of_messages(refusal, tmp_path):
    prompts_file(tmp_path, [{"text": [{"role": "user", "content": "A?"}]}])
    assert "labels: they are of texts, but `text` is no text." in refusal(labels=["a", "b"], num_samples=5)
    prompts_file(tmp_path, [{"note": "A?"}])
    assert "neither a column `text` nor `prompt`; columns found: note." in refusal(labels=["a", "b"], num_samples=5)


def test_a_journal_in_use(refusal, tmp_path):
    with Journal(tmp_path / "out/journal.sqlite"):
        assert "journal.sqlite is in use by another collection" in refusal()


def test_a_journal_of_another_schema(refusal, tmp_path):
    Journal(tmp_path / "out/journal.sqlite").close()
    connection = sqlite3.connect(tmp_path / "out/journal.sqlite")
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    assert "has schema 9" in refusal()


def test_an_endpoint_that_is_not_there(refusal):
    line = refusal(base_url="http://127.0.0.1:9/v1")
    assert (
        "http://127.0.0.1:9/v1 and model 'teacher-1': unreachable: Connection refused. 3 answers are not asked for"
        in line
    )
    assert "unreachable" in refusal(base_url="http://no-such-host.invalid/v1")


def test_an_unknown_model_ends_the_run_after_one_request(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts_file(tmp_path, ["A?", "B?", "C?"])
    before = server.requests
    line = refused(capsys, write_recipe(server, tmp_path, model="teacher-9"))
    assert server.requests == before + 1
    assert "unknown model: The model `teacher-9` does not exist. 3 answers are not asked for yet" in line


def test_a_cap_that_no_request_fits_under(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts_file(tmp_path, ["A?", "B?"])
    before = server.requests
    main(["collect", str(write_recipe(server, tmp_path, max_total_tokens=64))])
    assert server.requests == before
    assert capsys.readouterr().err.splitlines()[-1] == (
        "Stopped at `max_total_tokens: 64`. The worst case of a single request is more than it leaves. 2 answers are not asked "
        "for yet: the same command goes on."
    )


def test_what_is_in_the_place_of_the_journal(refusal, tmp_path):
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file/sub/journal.sqlite"
    assert refusal(output_dir=str(path.parent)) == (
        f"{path} cannot be opened: Not a directory. Name another output_dir, or another journal."
    )


def test_no_such_recipe(capsys):
    assert "there is no recipe nowhere.yaml. `collect` names the one of the package" in refused(capsys, "nowhere.yaml")
