"""What is written in one piece, what is sent, and how large a pool may be."""

import json
import os

import pytest

from tests.selection.helpers import make_sft_trainer, selection_rows
from trl_bbkd.bayeskd import ngram_coding
from trl_bbkd.errors import LLKDDataError
from trl_bbkd.host.files import write_atomically
from trl_bbkd.hub.push import stage_student
from trl_bbkd.preference import rounds
from trl_bbkd.preference.sampling import sample_completions
from trl_bbkd.proxy.stage_folder import begin_stage, finish_stage
from trl_bbkd.soft_targets.store import TargetStoreWriter


def write_samples(folder):
    rows = [{"prompt": "a", "completion": "b"}]
    sample_completions(folder, rows, lambda prompts, seed: ([[1]], ["c"]), 1, 0, "proxy")


WRITERS = {
    "samples": (write_samples, "00000.jsonl"),
    "stage begun": (lambda folder: begin_stage(folder, {"k": 1}), "stage.json"),
    "stage finished": (lambda folder: finish_stage(folder, {"k": 1}, {}), "stage.json"),
    "store": (lambda folder: TargetStoreWriter(folder, 2, {"proxy": "p"}), "store.json"),
    "text": (lambda folder: write_atomically(folder / "a.json", "{}"), "a.json"),
    "round": (lambda folder: rounds._write(folder / "round.json", {}), "round.json"),
    "n-grams": (lambda folder: ngram_coding.write_description(folder / "table.json", {}, None), "table.json"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch, name):
    """It is given its name last: killed before, a process leaves a temporary file."""
    write, file = WRITERS[name]

    def killed(source, target):
        assert os.path.basename(target) == file and os.path.getsize(source) > 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].endswith(".tmp") and left[0] != file
    write(tmp_path)
    for line in (tmp_path / file).read_text().splitlines() if file.endswith("l") else [(tmp_path / file).read_text()]:
        json.loads(line)
    assert not list(tmp_path.glob("*.tmp"))


def test_of_a_folder_beside_the_student_weights_and_their_description_go(tmp_path):
    """Nothing else of it: neither what its owner keeps there, nor pickles, nor what lies beside it."""
    sent = {"discriminator/heads.safetensors", "discriminator/discriminator_config.json"}
    sent |= {"discriminator/backbone/model.safetensors", "discriminator/backbone/config.json"}
    kept = {".env", "optimizer.pt", "training_args.bin", "notes.txt", "key.pem", "scaler.pth", "log.jsonl", "a.pkl"}
    for folder in ("", "discriminator/", "discriminator/backbone/", "critic/", "checkpoint-1/", "seqkd/"):
        for name in kept:
            (tmp_path / f"out/{folder}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"out/{folder}{name}").write_text("secret")
    for name in {*sent, "model.safetensors", "critic/critic.safetensors", "checkpoint-1/model.safetensors"}:
        (tmp_path / "out" / name).write_text("{}")
    for folders in ([], ["discriminator"]):
        staged = tmp_path / f"staged {len(folders)}"
        staged.mkdir()
        stage_student(tmp_path / "out", staged, "me/student", folders)
        found = {str(file.relative_to(staged)) for file in staged.rglob("*") if file.is_file()}
        assert found == {"model.safetensors"} | (sent if folders else set())


def test_a_pool_is_of_all_processes(tmp_path, tiny_model_dir, monkeypatch):
    """Eight rows are one pool of one process, and half of one of two."""
    trainer = make_sft_trainer(tmp_path, tiny_model_dir, selection_rows(8))
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    with pytest.raises(LLKDDataError, match="A pool of 16 rows .*of all processes.* larger than the data set of 8"):
        trainer._start_selection()
