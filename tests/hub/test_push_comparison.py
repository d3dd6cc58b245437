"""The table of a comparison in the students' cards: with the real client against a server of the Hub's protocol."""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from tests.hub.test_hub import start
from tests.hub_server import TOKEN, HubServer
from tests.reports.test_comparison import write_run
from tests.reports.test_report import make_report
from trl_bbkd.cli import main
from trl_bbkd.errors import HubError
from trl_bbkd.hub.compared import END, SECTION, STANDS_BEFORE
from trl_bbkd.hub.model_card import StudentCard, write_card
from trl_bbkd.hub.push import push_student
from trl_bbkd.hub.push_comparison import push_comparison
from trl_bbkd.reports.comparison import Comparison, read_runs


PAPER = {"title": "A paper", "id": "2511.10643", "citation": "@article{}"}
SECRET = "a-password-of-somebody"
SETTING = "mirror-4f9c"  # that no variable of the environment holds


@pytest.fixture
def runs(tmp_path):
    """Two finished runs with a student and a card each."""
    found = [
        write_run(tmp_path / "one", 0.5, discriminator=f"{tmp_path}/larger", model_init_kwargs={"token": SETTING}),
        write_run(tmp_path / "two", 0.8, seed=1, learning_rate=1e-4, discriminator=f"{tmp_path}/{SECRET}"),
    ]
    for folder in found:
        with open(f"{folder}/model.safetensors", "w") as weights:
            weights.write(folder)
        write_new_card(folder)
    return found


def write_new_card(folder):
    write_card(StudentCard("GAD", PAPER, [], None, name=os.path.basename(folder), repo_id=folder), folder)


@pytest.fixture
def hub(monkeypatch):
    """A Hub that the client in this process speaks to, logged in, with what was pushed."""
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("MY_API_KEY", SECRET)
        yield server


def text_in(folder):
    with open(f"{folder}/README.md", encoding="utf-8") as card:
        return card.read()


@pytest.fixture
def pushed(runs, hub):
    for folder in runs:
        push_student(folder, f"me/{os.path.basename(folder)}")
    return runs


def on_the_hub(hub, repository):
    return [commit for commit in hub.commits if commit.repo_id == repository][-1].files["README.md"].decode()


class TestSection:
    def test_each_card_gets_it_and_nothing_else_changes(self, pushed, hub, tmp_path, capsys):
        before = on_the_hub(hub, "me/one")
        main(["compare", *pushed, "--push"])
        assert capsys.readouterr().err.splitlines()[-2:] == [
            f"On the Hub: {hub.url}/me/{name}" for name in ("one", "two")
        ]
        assert [set(commit.files) for commit in hub.commits[2:]] == [{"README.md"}] * 2
        card = on_the_hub(hub, "me/one")
        section = SECTION.search(card)
        assert card.replace(f"{section[0]}\n\n", "") == before and card.index("## Compared") < card.index(
            "## How to use it"
        )
        assert text_in(pushed[0]).count(section[0]) == 1 and ModelCard(card).text
        comparison = Comparison(read_runs(pushed))
        for label, *cells in [*comparison.table(), *comparison.differences()]:
            assert f"| {label} | {' | '.join(cells)} |" in section[0]
        assert "* **me/two** beside me/one: better: quality at equal diversity (+0." in section[0]
        page = MarkdownIt().enable("table").render(section[0])
        assert page.count("<table>") == 3 and page.count('href="https://huggingface.co/me/two"') == 1

    @pytest.mark.slow
    def test_the_command_by_itself(self, runs, hub, tmp_path):
        """Each in a process of its own, which finds the Hub by its environment alone."""
        for folder in runs:
            push_student(folder, f"me/{os.path.basename(folder)}")
        done = start(hub, "compare", *runs, "--push", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for name in ("one", "two"):
            assert f"On the Hub: {hub.url}/me/{name}\n" in done.stderr
            assert SECTION.search(on_the_hub(hub, f"me/{name}"))[0] in text_in(tmp_path / name)
        assert "| valid, T=1.0 | " in done.stdout and TOKEN not in done.stdout + done.stderr

    @pytest.mark.slow
    def test_commands_that_follow(self, runs, hub, tmp_path):
        def succeeds(*arguments):
            done = start(hub, *arguments, cwd=tmp_path)
            assert done.returncode == 0, done.stderr

        def refused():
            done = start(hub, "compare", *runs, "--push", cwd=tmp_path)
            assert done.returncode == 2 and TOKEN not in done.stdout + done.stderr
            return done.stderr

        succeeds("push", runs[0], "me/one")
        line = f"error: Nothing was sent: the card in {runs[1]} names no repository. Send that student first: "
        assert refused() == f"{line}`trl-bbkd push {runs[1]} me/student`.\n"
        succeeds("push", runs[1], "me/two")
        hub.refusals["me/two/commit/"] = 403
        error = refused()
        assert error.count("\n") == 1 and "the Hub answered 403" in error and "Done before: me/one." in error
        hub.refusals.clear()
        succeeds("compare", *runs, "--push")
        succeeds("push", runs[1], "me/two")
        assert on_the_hub(hub, "me/two").count("## Compared") == 1
        (tmp_path / "two/model.safetensors").write_text("trained anew")
        succeeds("push", runs[1], "me/two")
        assert "## Compared" not in on_the_hub(hub, "me/two") and "## Compared" in on_the_hub(hub, "me/one")

    def test_nothing_private_is_in_it(self, pushed, hub, tmp_path):
        push_comparison(Comparison(read_runs(pushed)))
        for repository in ("me/one", "me/two"):
            card = on_the_hub(hub, repository)
            assert '| discriminator | `"larger"` | `"***"` |' in card and "model_init_kwargs" in card
            for private in (SECRET, SETTING, TOKEN, str(tmp_path), "prompt</b>", "0 1 2"):
                assert private not in card

    def test_again_it_is_replaced_and_the_hubs_edits_stay(self, pushed, hub):
        main(["compare", *pushed, "--push"])
        edited = on_the_hub(hub, "me/one").replace("## Limits", "## Edited there\n\n## Limits")
        hub.commits[-2].files["README.md"] = edited.encode()
        main(["compare", *pushed, "--push"])
        assert len(hub.commits) == 4  # nothing new to say
        main(["compare", *reversed(pushed), "--push", "--metric", "valid"])
        card = on_the_hub(hub, "me/one")
        assert card.count("## Compared") == 1 and "less me/two" in card and "teacher NLL" not in card
        assert "## Edited there" in card and "## Edited there" not in text_in(pushed[0])

    def test_a_card_without_an_example_has_it_at_its_end(self, pushed, hub):
        card = on_the_hub(hub, "me/one").partition(f"{STANDS_BEFORE}\n")[0]
        hub.commits[0].files["README.md"] = card.encode()
        push_comparison(Comparison(read_runs(pushed)))
        found = on_the_hub(hub, "me/one")
        assert found.startswith(card.rstrip()) and found.endswith(f"{END}\n") and found.count("## Compared") == 1

    def test_a_folder_that_cannot_be_written_to_ends_nothing(self, pushed, hub, monkeypatch, caplog):
        def refuse(path, *arguments, **settings):
            raise PermissionError(13, "Permission denied")

        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_text", refuse)
            push_comparison(Comparison(read_runs(pushed)))
        assert [commit.repo_id for commit in hub.commits[2:]] == ["me/one", "me/two"]
        assert f"The card in {pushed[0]} cannot be written (Permission denied)." in caplog.text

    def test_it_stays_as_long_as_the_weights(self, pushed, hub, caplog):
        push_comparison(Comparison(read_runs(pushed)))
        write_new_card(pushed[0])
        assert "## Compared" in text_in(pushed[0]) and not caplog.text
        push_student(pushed[0], "me/one")
        assert "## Compared" in on_the_hub(hub, "me/one")
        with open(f"{pushed[0]}/model.safetensors", "a") as weights:
            weights.write("trained anew")
        push_student(pushed[0], "me/one")
        assert "## Compared" not in on_the_hub(hub, "me/one") and "## Compared" in text_in(pushed[0])
        write_new_card(pushed[0])
        assert "## Compared" not in text_in(pushed[0])
        assert "loses its comparison with other runs, which was of other weights" in caplog.text


class TestRefusals:
    def refused(self, *arguments):
        with pytest.raises(HubError) as error:
            push_comparison(Comparison(read_runs(arguments)))
        text = str(error.value)
        assert "\n" not in text and TOKEN not in text
        return text

    def test_not_pushed_yet(self, runs, hub):
        push_student(runs[0], "me/one")
        text = self.refused(*runs)
        assert f"Nothing was sent: the card in {runs[1]} names no repository." in text and len(hub.commits) == 1
        assert f"`trl-bbkd push {runs[1]} me/student`" in text

    def test_the_folder_of_a_run_is_no_repository(self, runs, hub, tmp_path, monkeypatch):
        """From another folder than that of its training, the name in its card is no path that is there."""
        write_card(StudentCard("GAD", PAPER, [], None, name="two", repo_id=f"{tmp_path.name}/two"), runs[1])
        push_student(runs[0], "me/one")
        monkeypatch.chdir(tmp_path)
        assert "the card in two names no repository. Send that" in self.refused("one", "two") and len(hub.commits) == 1

    def test_the_same_repository_twice(self, runs, hub):
        for folder in runs:
            push_student(folder, "me/one")
        assert "Two runs have the same repository" in self.refused(*runs)

    def test_no_such_repository(self, pushed, hub):
        del hub.repositories["me/two"]
        text = self.refused(*pushed)
        assert "Nothing was sent: the card of me/two cannot be changed: the Hub answered 404" in text
        assert f"`trl-bbkd push {pushed[1]} me/two`" in text and len(hub.commits) == 2

    def test_no_card_there(self, pushed, hub):
        del hub.commits[1].files["README.md"]
        assert "the card of me/two cannot be changed: it has no card." in self.refused(*pushed)

    # The client asks again, and waits, before it believes the last
    @pytest.mark.parametrize("status", [403, pytest.param(500, marks=pytest.mark.slow)])
    def test_a_card_that_cannot_be_read(self, pushed, hub, status):
        hub.refusals["me/two/resolve/"] = status
        text = self.refused(*pushed)
        assert f"the card of me/two cannot be changed: the Hub answered {status}" in text and "cache" not in text
        assert len(hub.commits) == 2

    def test_another_student_there(self, pushed, hub):
        metrics = json.loads(hub.commits[1].files["metrics.json"])
        metrics["results"]["GAD"]["valid@t1.0"] += 0.01
        hub.commits[1].files["metrics.json"] = json.dumps(metrics).encode()
        text = self.refused(*pushed)
        assert (
            f"the card of me/two cannot be changed: its student is another than that in {pushed[1]}. Send this" in text
        )
        del hub.commits[1].files["metrics.json"]  # as where only a checkpoint was sent
        assert f"Send this one first: `trl-bbkd push {pushed[1]} me/two`." in self.refused(*pushed)
        assert len(hub.commits) == 2

    def test_half_a_section(self, pushed, hub):
        push_comparison(Comparison(read_runs(pushed)))
        hub.commits[3].files["README.md"] = on_the_hub(hub, "me/two").replace(END, "").encode()
        assert "the card of me/two cannot be changed: it has a comparison whose first or last" in self.refused(*pushed)
        with open(f"{pushed[0]}/README.md", "a") as card:
            card.write(END)
        assert f"Nothing was sent: {pushed[0]}/README.md has a comparison whose first or last" in self.refused(*pushed)
        with open(f"{pushed[0]}/README.md", "wb") as card:
            card.write(b"\xff")
        assert f"Nothing was sent: {pushed[0]}/README.md cannot be read ('utf-8' codec" in self.refused(*pushed)
        os.remove(f"{pushed[0]}/README.md")
        assert f"the card in {pushed[0]} names no repository" in self.refused(*pushed) and len(hub.commits) == 4

    @pytest.mark.parametrize("token", ["hf_anotherTokenOfNobody", None])
    def test_not_logged_in(self, pushed, hub, monkeypatch, tmp_path, token):
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        text = self.refused(*pushed)
        assert "Nothing was sent: the card of me/one cannot be changed: the Hub answered 401" in text
        assert "hf auth login" in text and "anotherToken" not in text and len(hub.commits) == 2

    def test_no_write_access(self, pushed, hub):
        hub.refusals["me/two/auth-check/write"] = 403
        text = self.refused(*pushed)
        assert "the card of me/two cannot be changed: the Hub answered 403" in text and len(hub.commits) == 2
        hub.refusals.clear()
        hub.refusals["me/two/commit/"] = 500
        text = self.refused(*pushed)
        assert "The card of me/two could not be sent: the Hub answered 500" in text and "Done before: me/one." in text
        assert "## Compared" in text_in(pushed[0]) and "## Compared" not in text_in(pushed[1])
        hub.refusals.clear()
        push_comparison(Comparison(read_runs(pushed)))
        assert [commit.repo_id for commit in hub.commits[2:]] == ["me/one", "me/two"]

    def test_what_the_client_says_in_many_lines(self, pushed, monkeypatch):
        def fail(*arguments, **settings):
            raise ConnectionError(f"no route\nfor {TOKEN}")

        monkeypatch.setattr("huggingface_hub.HfApi.upload_file", fail)
        assert "could not be sent: ConnectionError: no route for ***. Nothing was sent." in self.refused(*pushed)

    def test_offline(self, pushed, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "Unset HF_HUB_OFFLINE" in self.refused(*pushed)


def test_results_are_of_the_repository_that_they_are_sent_to(runs, hub, tmp_path):
    """As the Hub's own client reads a card that was written for another repository, and has a comparison."""
    report = make_report(intervals={"valid@t1.0": (0.75, 0.8333)})
    for folder in runs:
        write_card(StudentCard("GAD", PAPER, [], None, name="old", repo_id="me/old", report=report), folder)
        push_student(folder, f"me/{os.path.basename(folder)}")
    push_comparison(Comparison(read_runs(runs)))
    (tmp_path / "README.md").write_text(on_the_hub(hub, "me/two"))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "two" and "## Compared" in card.text
    found = {result.metric_name: result for result in card.data.eval_results}
    assert {result.source_url for result in found.values()} == {"https://huggingface.co/me/two/blob/main/metrics.json"}
    valid = found["valid, T=1.0"]
    assert valid.metric_value == 0.792 and valid.metric_args == {"interval": 0.95, "low": 0.75, "high": 0.8333}
