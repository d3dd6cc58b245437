"""Pushing, with the real client in real subprocesses against a server of the Hub's protocol; and the card."""

import contextlib
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
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hub_server import TOKEN, HubServer
from tests.test_report import make_report
from trl_bbkd import Discriminator
from trl_bbkd.gad.gad_trainer import GADTrainer
from trl_bbkd.hub import HubError, push_student, stage_student
from trl_bbkd.model_card import StudentCard, hub_id, render_card
from trl_bbkd.redaction import public_text
from trl_bbkd.teacher_data import TeacherDataCounts


STUDENT = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
STUDENT |= {"chat_template.jinja", "README.md"}
REPORT = {"report.md", "metrics.json", "curves.png", "recipe.yaml"}
SECRET = "a-password-of-somebody"
TEACHER = "GPT|5\nthe *second*"


def start(server, *arguments, cwd, token=TOKEN):
    environment = {**os.environ, **server.environment(token), "OMP_NUM_THREADS": "1", "MY_API_KEY": SECRET}
    command = [Path(sys.executable).parent / "trl-bbkd", *map(str, arguments)]
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
        # What lies there while it trains is of no finished run
        assert set(server.commits[0].files) == STUDENT | discriminator
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
        ids = [[5, 6, 7]], [[8, 9]]
        model, saved = (Discriminator.from_pretrained(folder / "discriminator") for folder in (received, output_dir))
        for name, value in saved.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert ids

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
        assert "![Curves of the run](curves.png)" in card.text and (received / "curves.png").stat().st_size > 10_000
        assert f"{metrics['evaluation']['samples']} samples each" in card.text and "with seed 0" in card.text

    def test_card_has_the_recipe_and_the_command(self, pushed, card):
        received = pushed[2]
        recipe = yaml.safe_load((received / "recipe.yaml").read_text())
        assert recipe == yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
        assert recipe["learning_rate"] == 1e-3 and recipe["dataset_name"] == "recipes"
        assert recipe["method"] == "gad" and not {"hub_token", "env"} & set(recipe)
        assert "trl-bbkd train recipes/tiny.yaml" in card.text and "--hub_model_id me/student" in card.text
        assert "eprint       = {arXiv:2511.10643}" in card.text

    def test_metadata(self, card):
        data = card.data.to_dict()
        assert data["tags"] == ["trl", "trl-bbkd", "gad"] and data["library_name"] == "transformers"
        assert data["pipeline_tag"] == "text-generation" and data["model_name"] == "student"
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

    def test_its_example_works(self, pushed, card, monkeypatch):
        example = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
        assert 'student = "me/student"' in example
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(example.replace("me/student", str(pushed[2])), {})
        assert "apply_chat_template" in example and output.getvalue()


class TestRefusals:
    @pytest.fixture
    def output_dir(self, tmp_path, pushed):
        """A copy of the finished run, as a server that failed at the last moment would leave it."""
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


@pytest.fixture
def recipe(tmp_path, tiny_model_dir, standard_rows):
    values = {"save_strategy": "no", "seqkd_baseline": False, "push_to_hub": True, "output_dir": "out"}
    return write_recipe(tmp_path / "recipes", tiny_model_dir, standard_rows, **values)


class TestTrainingWithoutAHub:
    def test_refused_repository_ends_it_before_training(self, recipe, tmp_path):
        with HubServer() as server:
            done = start(server, "train", recipe, cwd=tmp_path, token="hf_another_token_of_no_use")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "hf_another" not in done.stdout + done.stderr
