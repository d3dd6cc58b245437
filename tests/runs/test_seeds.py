"""`trl-bbkd train RECIPE --seeds 0 1 2`: real runs, one after the other, and what they come to together."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.llkd.test_classifier_run import data as classifier_data  # noqa: F401
from tests.llkd.test_classifier_run import student as classifier  # noqa: F401
from tests.llkd.test_classifier_run import write_recipe as write_classifier_recipe
from tests.recipes import write_recipe
from trl_bbkd.cli import main
from trl_bbkd.commands import seeds as command
from trl_bbkd.runs.progress import can_go_on
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run
from trl_bbkd.runs.seeds import SeveralSeeds, taken_out


TINY = {"max_steps": 1, "eval_prompts": 2, "eval_samples": 2, "num_train_epochs": None, "warmup_epochs": 0}


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs without the seconds in which a process imports: what was started, as `trl-bbkd` is."""
    started = []

    def status_of(words):
        started.append(words)
        assert words[0] == "train"
        run(load_recipe(words[1], words[2:]))
        return 0

    monkeypatch.setattr(command, "_status_of", status_of)
    return started


def files(folder):
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def changed(file, content):
    """A file with other content, or none, for a while."""
    before = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_text(content)
    yield
    file.write_bytes(before)


def tables(folder):
    return [line for line in (folder / "seeds.md").read_text().splitlines() if line.startswith("|")]


class TestThreeSeeds:
    @pytest.fixture
    def recipe(self, tmp_path, recipe_folder, tiny_model_dir):
        return write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **TINY)

    def test_each_is_trained_once_and_they_are_summed_up(self, tmp_path, recipe, in_this_process, capsys):
        main(["train", str(recipe), "--seeds", "0", "1"])
        folder = tmp_path / "out"
        assert [words[2:] for words in in_this_process] == [
            ["--seed", seed, "--output_dir", f"{folder}/seed-{seed}"] for seed in "01"
        ]
        assert "two seeds do not tell" in capsys.readouterr().out and "over seeds |" not in tables(folder)[0]
        before = files(folder / "seed-0")

        main(["train", str(recipe), "--seeds", "0", "1", "2", "--learning_rate=0.001"])
        printed = capsys.readouterr().out
        assert len(in_this_process) == 3 and in_this_process[2][-3:-1] == ["2", "--output_dir"]
        assert files(folder / "seed-0") == before
        assert (folder / "seeds.md").read_text() in printed
        found = json.loads((folder / "seeds.json").read_text())
        assert found["seeds"] == found["finished"] == [0, 1, 2]
        metrics = [json.loads((folder / f"seed-{seed}/metrics.json").read_text()) for seed in range(3)]
        for student in ("undistilled", "SeqKD", "GAD"):
            values = [each["results"][student]["teacher_nll"] for each in metrics]
            kept = found["results"][student]["teacher_nll"]
            assert kept["of_each_seed"] == values and kept["mean"] == pytest.approx(np.mean(values))
            # The held-out rows and the draws are the same, and so is what was not trained
            assert (kept["standard_deviation"] == 0) == (student == "undistilled")
        for other in ("undistilled", "SeqKD"):
            apart = [each["differences"][other]["teacher_nll"]["difference"] for each in metrics]
            kept = found["differences"][other]["teacher_nll"]
            assert kept["of_each_seed"] == apart
            low, high = kept["over_seeds"]
            reach = 4.3027 * np.std(apart, ddof=1) / 3**0.5
            assert (low, high) == pytest.approx((np.mean(apart) - reach, np.mean(apart) + reach), rel=1e-4)
            # Of two prompts there is no interval
            assert kept["over_prompts"] == [None, None]
        # A second time nothing is trained, and a seed by which another was not measured is no matter
        main(["train", str(recipe), "--seeds", "0", "1", "2", "--logging_steps", "3"])
        assert len(in_this_process) == 3

        with pytest.raises(SystemExit) as stopped:
            main(["train", str(recipe), "--seeds", "0", "1", "--learning_rate", "0.5"])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        assert (
            f"output_dir: {folder} holds seeds of other settings (learning_rate: 0.001; now learning_rate: 0.5)"
            in error
        )

        # What is broken or gone
        for name, content, message in (
            ("metrics.json", "{}", "seed-1 cannot be read (KeyError: 'method')"),
            ("metrics.json", "[]", "seed-1 cannot be read (TypeError: "),
            ("held_out.jsonl", "{", "seed-1 cannot be read (JSONDecodeError: "),
            ("held_out.jsonl", None, "seed-1 cannot be read (ValueError: held_out.jsonl has other prompts than "),
            ("progress.json", "{}", "seed-1 cannot be read (KeyError: 'settings')"),
        ):
            with changed(folder / "seed-1" / name, content), pytest.raises(SystemExit):
                main(["train", str(recipe), "--seeds", "0", "1"])
            assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
        (folder / "seeds.md").unlink()
        (folder / "seeds.md").mkdir()
        with pytest.raises(SystemExit):
            main(["train", str(recipe), "--seeds", "0", "1"])
        assert f"{folder}/seeds.md cannot be read or written: Is a directory." in capsys.readouterr().err

        # One that was trained otherwise, by hand
        progress = folder / "seed-1/progress.json"
        progress.write_text(progress.read_text().replace('"learning_rate": 0.001', '"learning_rate": 0.002'))
        with pytest.raises(SystemExit):
            main(["train", str(recipe), "--seeds", "0", "1"])
        assert "seed-0 and " in (error := capsys.readouterr().err) and "more than their seed: learning_rate." in error

    @pytest.mark.slow
    def test_a_classifier(self, tmp_path, classifier_data, classifier, in_this_process):  # noqa: F811
        recipe = write_classifier_recipe(classifier_data, classifier, tmp_path / "out", num_train_epochs=1)
        main(["train", str(recipe), "--seeds", "3", "4", "5"])
        text = (tmp_path / "out/seeds.md").read_text()
        assert "| LLKD less all rows | mean | over seeds | of each seed |" in text and "over prompts" not in text
        assert "macro F1, mean of seeds 3, 4, 5: " in text and "on these rows" in text


class TestStopped:
    """What goes on, and how the command ends."""

    @pytest.fixture
    def recipe(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"method: gad\noutput_dir: {tmp_path / 'out'}\n")
        return path

    def ended(self, recipe, capsys, *, status=None, raises=None, monkeypatch):
        def status_of(words):
            if raises:
                raise raises
            return status

        monkeypatch.setattr(command, "_status_of", status_of)
        with pytest.raises(SystemExit) as stopped:
            main(["train", str(recipe), "--seeds", "0", "1"])
        return stopped.value.code, capsys.readouterr().err

    def test_a_seed_that_failed_ends_the_command_with_its_status(self, recipe, capsys, monkeypatch):
        code, error = self.ended(recipe, capsys, status=2, monkeypatch=monkeypatch)
        assert (code, error) == (2, "Seed 0 ended with status 2. The same command goes on.\n")
        assert self.ended(recipe, capsys, status=-9, monkeypatch=monkeypatch)[0] == 137

    def test_ctrl_c_is_one_line(self, recipe, capsys, monkeypatch):
        for end in ({"raises": KeyboardInterrupt}, {"status": 130}):
            code, error = self.ended(recipe, capsys, monkeypatch=monkeypatch, **end)
            assert (code, error) == (130, "Stopped. The same command goes on.\n")

    def test_the_run_itself_says_nothing_then(self, monkeypatch, capsys):
        from trl_bbkd.commands.train import _say_how_to_go_on

        monkeypatch.setenv(command.ONE_OF_SEVERAL, "1")
        _say_how_to_go_on(None)
        assert capsys.readouterr().err == ""

    def test_one_that_left_no_report(self, recipe, capsys, monkeypatch):
        code, error = self.ended(recipe, capsys, status=0, monkeypatch=monkeypatch)
        assert code == 2 and "seed-0 has no metrics.json: the recipe leaves the student's training out" in error

    def test_what_is_finished_has_a_report_and_came_to_its_end(self, recipe, tmp_path):
        """A run that is killed after its first report is not finished."""
        several = SeveralSeeds(str(recipe), ["0", "1"], [])
        several.folder(0).mkdir(parents=True)
        (several.folder(0) / "metrics.json").write_text("{}")
        assert not several.is_finished(0)
        several.finish(0)
        again = SeveralSeeds(str(recipe), ["0", "1"], [])
        assert again.is_finished(0) and not again.is_finished(1)
        (several.folder(0) / "metrics.json").unlink()
        assert not again.is_finished(0)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"settings": 1, "finished": [0]}', "\xff"])
    def test_a_list_of_what_is_finished_that_is_broken(self, recipe, tmp_path, text):
        """Each run says itself what it has."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out/seeds.json").write_text(text, encoding="latin-1")
        assert SeveralSeeds(str(recipe), ["0", "1"], []).finished == set()

    def test_it_goes_on_where_something_is_left(self, recipe, tmp_path):
        several = SeveralSeeds(str(recipe), ["0", "1"], [])
        folder = tmp_path / "out/seed-0"
        folder.mkdir(parents=True)
        assert several.run_of(0)[-1] == str(folder)
        (folder / "progress.json").write_text(json.dumps({"settings": {}, "parts": {"trained": {}}}))
        assert can_go_on(str(folder)) and several.run_of(0)[-2:] == ["--resume_from_checkpoint", "true"]
        # Proxy-KD does without being asked
        recipe.write_text(recipe.read_text().replace("gad", "proxykd"))
        assert SeveralSeeds(str(recipe), ["0", "1"], []).run_of(0)[-1] == str(folder)


def test_an_option_that_is_given_twice_has_all_its_values():
    assert taken_out("--seeds", ["--seeds", "0", "1", "--x", "2", "--seeds=3"]) == (["0", "1", "3"], ["--x", "2"])


class TestBadInput:
    @pytest.mark.parametrize(
        ("seeds", "arguments", "message"),
        [
            ("0", "", "--seeds takes at least two, as in --seeds 0 1 2. One is set by --seed."),
            ("", "", "--seeds takes at least two"),
            ("0 1 0", "", "--seeds names 0 twice. Name each once."),
            ("0 one", "", "--seeds one: a seed is a whole number from 0 to 2**32 - 1, as in --seeds 0 1 2."),
            ("0 -1", "", "--seeds -1: a seed is a whole number"),
            ("0 4294967296", "", "--seeds 4294967296: a seed is a whole number"),
            ("0 1", "--seed 3", "--seed stands beside --seeds, which sets it. Take --seed out."),
            (
                "0 1",
                "--resume_from_checkpoint true",
                "take resume_from_checkpoint out, and start the same command again.",
            ),
            ("0 1", "--push_to_hub true", "push_to_hub names one repository: take it out"),
            ("0 1", "--push_to_hub", "push_to_hub names one repository: take it out"),
            ("0 1", "--learning_rat 1", "unknown option --learning_rat; did you mean '--learning_rate'?"),
            ("0 1", "--output_dir FOLDER/single", "single holds a single run (metrics.json)"),
            ("0 1", "--output_dir FOLDER/recipe.yaml", "recipe.yaml is a file. Name another folder."),
            ("0 1", "--output_dir=", "--seeds needs `output_dir`: each seed's run has a folder in it."),
        ],
    )
    def test_it_is_one_line_before_anything_runs(self, tmp_path, monkeypatch, capsys, seeds, arguments, message):
        (tmp_path / "recipe.yaml").write_text(f"method: gad\noutput_dir: {tmp_path / 'out'}\n")
        (tmp_path / "single").mkdir()
        (tmp_path / "single/metrics.json").write_text("{}")
        monkeypatch.setattr(command, "_status_of", None)
        words = arguments.replace("FOLDER", str(tmp_path)).split()
        with pytest.raises(SystemExit) as stopped:
            main(["train", str(tmp_path / "recipe.yaml"), "--seeds", *seeds.split(), *words])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert message in error and not (tmp_path / "out").exists()

    def test_options_are_taken_out(self):
        assert taken_out("--seeds", ["--a", "1", "--seeds", "0", "1", "--b=2"]) == (["0", "1"], ["--a", "1", "--b=2"])
        assert taken_out("--seeds", ["--seeds=0", "1", "2"]) == (["0", "1", "2"], [])
        assert taken_out("--output_dir", ["--output-dir", "x", "--b"]) == (["x"], ["--b"])
        assert taken_out("--seeds", ["--seed", "0"]) == (None, ["--seed", "0"])


def start(recipe, *arguments):
    words = [*command.PROGRAM, "train", str(recipe), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_killed_in_the_second_seed(tmp_path, recipe_folder, tiny_model_dir):
    settings = {**TINY, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_prompts": 8}
    whole, killed = (
        write_recipe(recipe_folder, tiny_model_dir, tmp_path / name, **settings) for name in ("whole", "out")
    )
    process = start(whole, "--seeds", "0", "1", "--num_processes", "1")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (tmp_path / "whole/seeds.md").read_text() in printed

    process = start(killed, "--seeds", "0", "1", "--num_processes", "1")
    end = time.monotonic() + 200
    while not (tmp_path / "out/seed-1/checkpoint-2/trainer_state.json").is_file():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    first = files(tmp_path / "out/seed-0")
    assert not (tmp_path / "out/seeds.md").exists()
    process = start(killed, "--seeds", "0", "1", "--num_processes", "1")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "Seed 0 is finished" in printed and "--resume_from_checkpoint true" in printed
    assert files(tmp_path / "out/seed-0") == first
    assert tables(tmp_path / "out") == tables(tmp_path / "whole")


def test_a_seed_is_a_process_through_the_launcher(tmp_path, recipe_folder, tiny_model_dir, capfd):
    """The launcher is real, and so is what it says of a value that only it reads."""
    recipe = write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **TINY)
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(recipe), "--seeds", "0", "1", "--learning_rate", "fast"])
    assert stopped.value.code == 2
    error = capfd.readouterr().err
    assert "error: " in error and "learning_rate" in error and "Seed 0 ended with status 2. The same command" in error
    assert "Traceback" not in error and sys.executable in command.PROGRAM
