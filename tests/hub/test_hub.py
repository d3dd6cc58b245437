"""Pushing, with the real client in real subprocesses against a server of the Hub's protocol; and the card."""

import contextlib
import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from markdown_it import MarkdownIt
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.gad.helpers import make_trainer
from tests.hub_server import TOKEN, HubServer
from tests.pictures import is_drawn
from tests.reports.test_report import make_report
from trl_bbkd import BayesKDConfig, Discriminator
from trl_bbkd.errors import HubError
from trl_bbkd.hub.model_card import StudentCard, hub_id, render_card
from trl_bbkd.hub.push import push_student, stage_student
from trl_bbkd.hub.student import hyperparameters
from trl_bbkd.reports.redaction import public_text
from trl_bbkd.reports.report import render_markdown, without_secrets
from trl_bbkd.runs.job import dataset_names
from trl_bbkd.runs.recipe import load_recipe


STUDENT = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
STUDENT |= {"chat_template.jinja", "README.md"}
REPORT = {"report.md", "metrics.json", "curves.png", "recipe.yaml"}
SECRET = "a-password-of-somebody"
TEACHER = "GPT|5\nthe *second*"


COMMAND = [Path(sys.executable).parent / "trl-bbkd"]
# What `trl-bbkd train` starts, without its launcher
IN_ONE_PROCESS = [sys.executable, "-m", "trl_bbkd"]


def start(server, *arguments, cwd, token=TOKEN, command=COMMAND):
    environment = {**os.environ, **server.environment(token), "OMP_NUM_THREADS": "1", "MY_API_KEY": SECRET}
    command = [*command, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def write_recipe(folder, student, rows, **changes):
    folder.mkdir(exist_ok=True)
    for split, part in (("train", rows[:12]), ("test", rows[12:])):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in part) + "\n")
    values = {
        "method": "gad",
        "model_name_or_path": student,
        "dataset_name": str(folder),
        "teacher_name": TEACHER,
        "hub_token": TOKEN,
        "env": {"OTHER_TOKEN": SECRET},
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        **changes,
    }
    path = folder / "tiny.yaml"
    values = {name: value for name, value in values.items() if value is not None}
    path.write_text(f"# mail me at home: {SECRET}\n" + yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, tiny_model_dir, conversational_rows):
    """A run that pushes its two checkpoints and, at the end, the student with its discriminator."""
    folder = tmp_path_factory.mktemp("pushed")
    recipe = write_recipe(
        folder / "recipes",
        tiny_model_dir,
        conversational_rows,
        save_steps=1,
        hub_always_push=True,
        seqkd_baseline=True,
    )
    with HubServer() as server:
        arguments = ["--output_dir", "out", "--hub_model_id", "me/student", "--push_discriminator", "true"]
        done = start(server, "train", recipe, "--push_to_hub", "true", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return server, folder / "out", server.checkout(folder / "received"), done


@pytest.fixture(scope="module")
def card(pushed):
    return ModelCard.load(pushed[2] / "README.md")


class TestPushedRun:
    def test_each_checkpoint_and_the_end_are_one_commit(self, pushed):
        server, *_ = pushed
        messages = ["Training in progress, step 1", "Training in progress, step 2", "End of training"]
        assert [commit.message for commit in server.commits] == messages
        assert {commit.repo_id for commit in server.commits} == {"me/student"}

    def test_student_and_discriminator_and_nothing_else(self, pushed):
        server, output_dir, *_ = pushed
        discriminator = {str(f.relative_to(output_dir)) for f in (output_dir / "discriminator").rglob("*.*")}
        assert set(server.commits[-1].files) == STUDENT | REPORT | discriminator
        # While it trains there is nothing to report
        assert set(server.commits[0].files) == STUDENT | discriminator | {"recipe.yaml"}
        for name in ("checkpoint-2", "warmed_up_student", "seqkd", "training_args.bin"):
            assert (output_dir / name).exists(), name

    def test_student_loads(self, pushed):
        _, output_dir, received, _ = pushed
        model, saved = (AutoModelForCausalLM.from_pretrained(folder) for folder in (received, output_dir))
        for name, value in saved.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert AutoTokenizer.from_pretrained(received).chat_template

    def test_discriminator_loads(self, pushed):
        _, output_dir, received, _ = pushed
        model, saved = (Discriminator.from_pretrained(folder / "discriminator") for folder in (received, output_dir))
        for name, value in saved.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

    def test_no_secret_and_no_local_path_leaves(self, pushed):
        server, output_dir, received, done = pushed
        assert TOKEN.encode() in (output_dir / "training_args.bin").read_bytes()
        for secret in (TOKEN, SECRET):
            assert secret not in done.stdout + done.stderr
            for commit in server.commits:
                for name, content in commit.files.items():
                    assert secret.encode() not in content, name
        for commit in server.commits:
            for name, content in commit.files.items():
                assert str(output_dir.parent).encode() not in content, name
                assert b"/tmp/" not in content and os.path.expanduser("~/").encode() not in content, name

    def test_card_answers_whose_how_much_how_good(self, pushed, card):
        received = pushed[2]
        metrics = json.loads((received / "metrics.json").read_text())
        assert r"**GPT\|5 the \*second\***" in card.text
        counts = metrics["counts"]
        assert f"| rows kept | {counts['train']['kept']} | {counts['test']['kept']} |" in card.text
        assert "| duplicate prompts (kept) | 8 | 0 |" in card.text
        results = metrics["results"]
        columns = ["undistilled", "SeqKD", "GAD", "teacher"]
        nll = [f"{results[name]['teacher_nll']:.3f}" if name != "teacher" else "–" for name in columns]
        assert f"|  | {' | '.join(columns)} |" in card.text
        assert f"| teacher NLL | {' | '.join(nll)} |" in card.text
        assert metrics["summary"] in card.text
        assert "![Curves of the run](curves.png)" in card.text and is_drawn(received / "curves.png")
        assert f"{metrics['evaluation']['samples']} samples each" in card.text and "with seed 0" in card.text

    def test_card_has_the_recipe_and_the_command(self, pushed, card):
        received = pushed[2]
        recipe = yaml.safe_load((received / "recipe.yaml").read_text())
        assert recipe == yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
        assert recipe["learning_rate"] == 1e-3 and recipe["dataset_name"] == "recipes"
        assert recipe["method"] == "gad" and not {"hub_token", "env"} & set(recipe)
        assert "trl-bbkd train recipes/tiny.yaml" in card.text and "--hub_model_id me/student" in card.text
        assert "eprint       = {arXiv:2511.10643}" in card.text

    def test_metadata(self, pushed, card):
        results = json.loads((pushed[2] / "metrics.json").read_text())["results"]["GAD"]
        found = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert found.keys() == {"distinct_share", "teacher_nll", "truncated"}
        assert found["teacher_nll"] == round(results["teacher_nll"], 4)
        data = card.data.to_dict()
        assert data["tags"] == ["trl", "trl-bbkd", "gad"] and data["library_name"] == "transformers"
        assert data["pipeline_tag"] == "text-generation" and data["model-index"][0]["name"] == "student"
        assert not {"base_model", "datasets", "license"} & set(data)

    def test_card_of_a_checkpoint_has_no_empty_sections(self, pushed):
        text = pushed[0].commits[0].files["README.md"].decode()
        headings = re.findall("^## (.*)", text, re.MULTILINE)
        assert headings == [
            "Whose text, and how much",
            "How to use it",
            "How it was made",
            "Method and citation",
            "Limits",
        ]
        assert r"GPT\|5" in text and "| rows kept | 12 | 4 |" in text
        assert "curves.png" not in text and "None" not in text

    def test_its_example_works(self, pushed, card):
        example = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
        assert 'student = "me/student"' in example
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(example.replace("me/student", str(pushed[2])), {})
        assert "apply_chat_template" in example and output.getvalue()


class TestRefusals:
    @pytest.fixture
    def output_dir(self, pushed):
        return pushed[1]

    @pytest.mark.parametrize("path, status", [("/commit/", 500), ("/lfs/objects/batch", 403), ("/repos/create", 401)])
    def test_says_what_to_do_and_says_no_token(self, output_dir, tmp_path, path, status):
        with HubServer(refusals={path: status}) as server:
            done = start(server, "push", output_dir, "me/student", "--with", "discriminator", cwd=tmp_path)
        assert done.returncode == 2 and not server.commits
        assert f"{status}" in done.stderr and "Refused: Bearer ***" in done.stderr
        assert f"`trl-bbkd push {output_dir} me/student --with=discriminator`" in done.stderr
        assert ("hf auth login" in done.stderr) == (status != 500)
        assert "Traceback" not in done.stderr and TOKEN not in done.stdout + done.stderr

    def test_pushed_again_without_the_discriminator(self, output_dir, tmp_path):
        with HubServer() as server:
            done = start(server, "push", output_dir, "other", "--private", "--revision", "v1", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"On the Hub: {server.url}/somebody/other"
        (commit,) = server.commits
        assert set(commit.files) == STUDENT | REPORT and commit.revision == "v1"
        assert server.repositories["somebody/other"]["visibility"] == "private"
        assert b'student = "somebody/other"' in commit.files["README.md"]

    def test_no_student(self, tmp_path):
        with pytest.raises(HubError, match="holds no student"):
            push_student(tmp_path, "me/student")

    def test_no_such_folder(self, output_dir):
        with pytest.raises(HubError, match="holds no folder `critic`"):
            push_student(output_dir, "me/student", folders=["critic"])

    def test_offline(self, output_dir):
        with pytest.raises(HubError, match="Unset HF_HUB_OFFLINE"):
            push_student(output_dir, "me/student")


@pytest.mark.slow
class TestTrainingWithoutAHub:
    @pytest.fixture
    def recipe(self, tmp_path, tiny_model_dir, standard_rows):
        values = {"seqkd_baseline": False, "push_to_hub": True, "output_dir": "out", "hub_model_id": "me/student"}
        return write_recipe(tmp_path / "recipes", tiny_model_dir, standard_rows, save_steps=1, **values)

    def test_refused_repository_ends_it_before_training(self, recipe, tmp_path):
        with HubServer(refusals={"/repos/create": 401}) as server:
            done = start(server, "train", recipe, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        assert "The repository me/student cannot be created on the Hub: the Hub answered 401" in done.stderr
        assert "hf auth login" in done.stderr and "`push_to_hub: false` trains without the Hub" in done.stderr
        assert not (tmp_path / "out" / "model.safetensors").exists() and "train_runtime" not in done.stdout

    def test_refused_commits_lose_nothing(self, recipe, tmp_path):
        with HubServer(refusals={"/commit/": 500}) as server:
            done = start(server, "train", recipe, cwd=tmp_path)
        assert done.returncode == 2 and not server.commits
        assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr
        assert "Training goes on. The student could not be pushed to me/student: the Hub answered 500" in done.stderr
        assert "It is complete on disk, in out. Push it again with `trl-bbkd push out me/student`." in done.stderr
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert "teacher NLL" in done.stdout and (tmp_path / "out" / "metrics.json").is_file()

    def test_adapter_and_whole_checkpoints(self, recipe, tmp_path, tiny_model_dir):
        options = "--use_peft true --lora_target_modules all-linear --hub_strategy checkpoint --hub_always_push true"
        with HubServer() as server:
            done = start(server, "train", recipe, *options.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        received = server.checkout(tmp_path / "received")
        assert not list(received.rglob("training_args.bin")) and TOKEN not in done.stdout + done.stderr
        assert all(TOKEN.encode() not in file.read_bytes() for file in received.rglob("*") if file.is_file())
        assert {"optimizer.pt", "discriminator"} <= {file.name for file in (received / "last-checkpoint").iterdir()}
        assert set(server.commits[-1].files) == STUDENT - {
            "config.json",
            "generation_config.json",
            "model.safetensors",
        } | (REPORT | {"adapter_config.json", "adapter_model.safetensors"})
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model, saved = (
            PeftModel.from_pretrained(copy.deepcopy(base), folder) for folder in (received, tmp_path / "out")
        )
        for name, value in saved.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert ModelCard.load(received / "README.md").data.library_name == "peft"


class TestTrainer:
    def test_python_use(self, tmp_path, tiny_model_dir, standard_rows, caplog):
        trainer = make_trainer(tmp_path / "out", tiny_model_dir, standard_rows, max_steps=1, push_discriminator=True)
        trainer.train()
        with pytest.raises(HubError, match="cannot be created on the Hub: OfflineModeIsEnabled.*Unset HF_HUB_OFFLINE"):
            trainer.push_to_hub(dataset_name="someone/questions", teacher_name="GPT-5", tags="stories")
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        trainer.create_model_card(dataset_name="someone/questions", teacher_name="GPT-5", tags="stories")
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert card.data.datasets == ["someone/questions"] and card.data.tags == ["trl", "trl-bbkd", "gad", "stories"]
        assert "**GPT-5** in [`someone/questions`](https://huggingface.co/datasets/someone/questions)" in card.text
        assert "| rows kept | 12 |" in card.text and "| optimizer steps | `1` |" in card.text
        assert "| learning_rate | `0.001` |" in card.text and "| discriminator_head | `scalar` |" in card.text
        assert "push_discriminator" not in card.text and "recipe" not in card.text and "How good" not in card.text

        # In the background nobody waits for the error
        trainer._save_hub_folders()
        job = trainer._upload(HfApi(), folder_path=tmp_path / "out", repo_id="me/student", run_as_future=True)
        assert isinstance(job.exception(), HubError)
        assert "Training goes on. The student could not be pushed to me/student: OfflineModeIsEnabled" in caplog.text

    def test_a_checkpoint_asked_for_goes_without_the_pickled_arguments(self, tmp_path, tiny_model_dir, standard_rows):
        trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows)
        sent = {}
        client = HfApi()
        client.upload_folder = lambda **kwargs: sent.update(kwargs)
        trainer._upload(client, folder_path="x", path_in_repo="last-checkpoint", ignore_patterns=None, repo_id="a/b")
        assert sent["ignore_patterns"] == ["training_args.bin"] and sent["path_in_repo"] == "last-checkpoint"

    def test_a_checkpoint_whose_push_fails_is_told(self, tmp_path, tiny_model_dir, standard_rows, caplog):
        trainer = make_trainer(tmp_path, tiny_model_dir, standard_rows)
        client = HfApi()

        def fail(**kwargs):
            raise ConnectionError("no route for hf_abcdefgh123")

        client.upload_folder = fail
        job = trainer._upload(client, folder_path="x", path_in_repo="last", run_as_future=True, repo_id="a/b")
        assert isinstance(job.exception(), ConnectionError)
        assert "Training goes on. ConnectionError: no route for ***" in caplog.text and "hf_abc" not in caplog.text


class TestStage:
    @pytest.fixture
    def output_dir(self, tmp_path):
        folder = tmp_path / "out"
        for name in (
            "model.safetensors",
            "optimizer.pt",
            "notes.txt",
            ".env",
            "credentials.json",
            "discriminator/heads.safetensors",
        ):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_text("x")
        return folder

    def stage(self, output_dir, **kwargs):
        staged = output_dir.parent / "staged"
        staged.mkdir()
        stage_student(output_dir, staged, "me/student", **kwargs)
        return staged, {str(file.relative_to(staged)) for file in staged.rglob("*") if file.is_file()}

    def test_what_its_owner_keeps_there_stays(self, output_dir):
        assert self.stage(output_dir)[1] == {"model.safetensors"}

    def test_shards_and_templates(self, output_dir):
        names = [
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "additional_chat_templates/tool.jinja",
        ]
        for name in names:
            (output_dir / name).parent.mkdir(exist_ok=True)
            (output_dir / name).write_text("{}")
        assert self.stage(output_dir)[1] == {"model.safetensors", *names}

    def test_an_earlier_runs_report_stays(self, output_dir):
        (output_dir / "report.md").write_text("# earlier")
        (output_dir / "recipe.yaml").write_text("a: 1")
        assert self.stage(output_dir, report_files=["recipe.yaml"])[1] == {"model.safetensors", "recipe.yaml"}

    def test_local_base_of_an_adapter(self, output_dir):
        (output_dir / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base", "r": 8}')
        staged, _ = self.stage(output_dir)
        assert json.loads((staged / "adapter_config.json").read_text()) == {"base_model_name_or_path": "base", "r": 8}


def make_card(**changes):
    paper = {"title": "Black-Box", "id": "2511.10643", "citation": "@article{gad}"}
    values = {"base_model": "Qwen/Qwen2.5-0.5B", "name": "student", "repo_id": "me/student"}
    return StudentCard("GAD", paper, ["gad"], **{**values, **changes})


def html(card):
    return MarkdownIt().enable("table").render(render_card(card).split("---\n", 2)[2])


@pytest.mark.parametrize(
    ("method", "settings", "stage"),
    [
        ("proxykd", {"stages": ["cache", "distil"]}, "soft targets"),
        pytest.param("bayeskd", {}, "estimate of the teacher", marks=pytest.mark.slow),
    ],
)
def test_a_student_of_a_proxy_goes_alone(
    tmp_path, tiny_model_dir, other_model_dir, conversational_rows, method, settings, stage
):
    """Neither the proxy nor its targets are sent; the card says how the proxy fared."""
    changes = {"method": method, "proxy_model": other_model_dir, "seqkd_baseline": False, "save_strategy": "no"}
    changes |= {"num_generations": None, **settings}
    path = write_recipe(tmp_path / "recipes", tiny_model_dir, conversational_rows, **changes)
    with HubServer() as server:
        arguments = ["--output_dir", "out", "--hub_model_id", "me/student", "--push_to_hub", "true"]
        done = start(server, path, *arguments, cwd=tmp_path, command=IN_ONE_PROCESS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [commit.message for commit in server.commits] == ["End of training"]
    assert set(server.commits[0].files) == STUDENT | REPORT and (tmp_path / "out/proxy/targets").is_dir()
    card = server.commits[0].files["README.md"].decode()
    assert f"- {method}\n" in card and f"| {stage} | " in card
    assert AutoModelForCausalLM.from_pretrained(server.checkout(tmp_path / "received")).num_parameters()


class TestHyperparameters:
    def test_what_decides_nothing_is_left_out(self, tmp_path):
        found = hyperparameters(BayesKDConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=5), 5)
        assert found["optimizer steps"] == 5 and found["posterior_draws"] == 50
        assert not {"num_train_epochs", "selection", "pool_factor", "selection_rule"} & found.keys()

    def test_of_a_selection(self, tmp_path):
        config = BayesKDConfig(str(tmp_path), use_cpu=True, bf16=False, selection="llkd", num_train_epochs=2)
        found = hyperparameters(config, 5)
        assert found["selection"] == "llkd" and found["selection_rule"] == "maxnorm" and found["num_train_epochs"] == 2


class TestCard:
    def test_values_break_nothing(self, tmp_path):
        name = "a|b\n# not a heading\n<script>`*x*"
        report = make_report(teacher=name, settings={"note": "```\n# out of the fence\n"})
        for metrics in report.results.values():
            metrics["va|id@t1.0"] = 0.5
        card = make_card(
            teacher=name, datasets=[name], hyperparameters={name: name}, report=report, settings=report.settings
        )
        for page in (html(card), MarkdownIt().enable("table").render(render_markdown(report))):
            headings = re.findall("<h[12]>(.*?)</h", page)
            assert not [heading for heading in headings if heading.startswith(("not a", "out of"))]
            assert "<script>" not in page and "a|b # not a heading &lt;script&gt;`*x*" in page
            for row in re.findall("<tr>(.*?)</tr>", page, re.DOTALL):
                assert len(re.findall("<t[hd]", row)) in (2, 3, 5)
        assert yaml.safe_load(re.search(r"<code class=\"language-yaml\">(.*?)</code>", html(card), re.DOTALL)[1])

    def test_metadata_of_hub_ids(self):
        data = ModelCard(render_card(make_card(datasets=["someone/questions", "teacher/train.jsonl/x"]))).data
        assert data.base_model == "Qwen/Qwen2.5-0.5B" and data.datasets == ["someone/questions"]

    def test_warnings_are_not_hidden(self):
        report = make_report(warnings=[{"step": 7, "text": "The discriminator is inverted."}])
        assert "Warnings during training: 1, the first at step 7" in render_card(make_card(report=report))

    def test_without_anything_known(self):
        text = render_card(make_card(base_model=None))
        assert "None" not in text and "Whose text" not in text and "an unnamed teacher" in text

    def test_adapter_of_a_local_base(self, tmp_path):
        text = render_card(make_card(is_adapter=True, base_model=str(tmp_path)))
        assert "PeftModel.from_pretrained(base, student)" in text and str(tmp_path) not in text
        assert ModelCard(text).data.library_name == "peft" and ModelCard(text).data.base_model is None
        assert "PeftModel" not in render_card(make_card(is_adapter=True))

    def test_hub_ids(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "local").mkdir()
        assert hub_id("gpt2") == "gpt2" and hub_id("a/b") == "a/b"
        assert [hub_id(name) for name in ("local", "./x", "/a/b", "a/b/c", "", None)] == [None] * 6

    def test_data_set_names(self, tmp_path):
        mixture = [
            {"path": "me/data"},
            {"path": "json", "data_files": "a.jsonl"},
            {"path": "csv", "data_files": ["b", "c"]},
        ]
        mixture.append({"path": "json", "data_files": {"train": "d"}})
        path = tmp_path / "r.yaml"
        path.write_text(
            yaml.safe_dump({"method": "gad", "output_dir": "out", "use_cpu": True, "bf16": False, "datasets": mixture})
        )
        assert dataset_names(load_recipe(path)) == ["me/data", "a.jsonl", "b", "c", "d"]


class TestRedaction:
    def test_tokens(self, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
        text = public_text('--x \'{"token": "hf_abcdefgh123"}\' 0123456789abcdef mine-mine', "mine-mine")
        assert text == '--x \'{"token": "***"}\' *** ***'

    def test_paths(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        text = f'`{tmp_path}/data/t.jsonl` --out=/home/me/out judge: \'/srv/x/judge.py:has\' {{"a": "/home/me/"}}'
        assert public_text(text) == '`data/t.jsonl` --out=out judge: \'judge.py:has\' {"a": "me"}'
        assert (
            public_text("base_url: http://10.0.0.5:8000/v1, https://gpu.lan/v1")
            == "base_url: http://***/v1, https://***/v1"
        )
        assert public_text("https://api.openai.com/v1") == "https://api.openai.com/v1"
        assert public_text("file:///home/me/x a:/home/me/y /a/b:/home/me/z") == "x a:y b:z"
        for kept in ("https://huggingface.co/papers/2511.10643", *"1/2/3 /think a/b/c ~/x/y ../x/y".split(), "T / U"):
            assert public_text(kept) == kept

    def test_secrets_in_lists(self):
        assert without_secrets({"datasets": [{"path": "a", "token": "x"}]}) == {"datasets": [{"path": "a"}]}
