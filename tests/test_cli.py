"""Every way in, through real subprocesses of the installed commands."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from trl_bbkd import launch
from trl_bbkd.cli import main
from trl_bbkd.commands.train import _say_how_to_go_on, find_accelerate_config, run_recipe, train_with_accelerate
from trl_bbkd.runs import text_job


COMMANDS = Path(sys.executable).parent
RECIPE = """\
if __import__("trl_bbkd").launch(__name__, __file__): r'''
method: gad
dataset_name: teacher.jsonl
num_generations: 2
per_device_train_batch_size: 4
max_steps: 2
num_train_epochs: 2
discriminator_only_steps: 0
max_completion_length: 8
seqkd_baseline: false
use_cpu: true
bf16: false
report_to: none
gradient_checkpointing: false
save_strategy: "no"
"""


@pytest.fixture
def recipe(tmp_path, tiny_model_dir, standard_rows):
    """A recipe that Python can start, of two steps, in a folder that is not the current directory."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    rows = [json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) for row in standard_rows]
    (folder / "teacher.jsonl").write_text("\n".join(rows))
    (folder / "tiny.yaml").write_text(f"{RECIPE}model_name_or_path: {tiny_model_dir}\n# '''\n")
    return folder / "tiny.yaml"


def start(command: list, cwd: Path) -> subprocess.CompletedProcess:
    command = [COMMANDS / command[0], *command[1:]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


class TestWaysIn:
    @pytest.mark.parametrize(
        "command",
        [
            ["accelerate", "launch", "RECIPE"],
            pytest.param(["accelerate", "launch", "-m", "trl_bbkd", "RECIPE"], marks=pytest.mark.slow),
            pytest.param(["trl-bbkd", "train", "RECIPE", "--num_processes", "1"], marks=pytest.mark.slow),
            [
                "torchrun",
                "--nproc_per_node",
                "2",
                "--rdzv_backend",
                "c10d",
                "--rdzv_endpoint",
                "localhost:0",
                "RECIPE",
            ],
        ],
        ids=["accelerate-recipe", "accelerate-module", "trl-bbkd-train", "torchrun-recipe"],
    )
    def test_recipe_leaves_a_student(self, recipe, tmp_path, command):
        command = [recipe if word == "RECIPE" else word for word in command]
        done = start([*command, "--output_dir", "out", "--learning_rate", "2e-6"], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert (tmp_path / "out" / "discriminator").is_dir()
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())

    def test_spawned_workers_start_nothing(self, recipe):
        assert launch("__mp_main__", str(recipe)) is False


class TestErrors:
    @pytest.mark.parametrize("command", [["python"], ["trl-bbkd", "train"]], ids=["recipe", "train"])
    def test_typo_is_one_line_and_status_2(self, recipe, tmp_path, command):
        recipe.write_text(recipe.read_text().replace("max_steps", "max_step"))
        done = start([*command, recipe], cwd=tmp_path)
        assert done.returncode == 2
        assert f"error: {recipe}, line 6: unknown key 'max_step'; did you mean 'max_steps'?" in done.stderr
        assert "Traceback" not in done.stderr

    def test_bad_data_is_one_line_and_status_2(self, recipe, tmp_path):
        (recipe.parent / "teacher.jsonl").write_text('{"prompt": "Hi", "output": "Hello!"}')
        done = start(["python", recipe], cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: The teacher data has no column `completion`")
        assert "Traceback" not in done.stderr

    def test_status_reaches_the_shell_through_the_launcher(self, recipe, tmp_path):
        done = start(["trl-bbkd", "train", recipe, "--dataset_name", "nowhere.jsonl"], cwd=tmp_path)
        assert done.returncode == 2
        assert "nowhere.jsonl` does not exist" in done.stderr
        assert "Traceback" not in done.stderr

    def test_unknown_flag_names_the_nearest(self, recipe, tmp_path):
        done = start(["trl-bbkd", "train", recipe, "--num_proces", "2"], cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.strip() == "error: unknown option --num_proces; did you mean '--num_processes'?"

    def test_deepspeed_that_is_not_installed_names_our_extra(self, recipe, tmp_path, monkeypatch, capsys):
        def launch(arguments):
            raise ImportError("DeepSpeed is not installed => run `pip3 install deepspeed` or build it from source.")

        monkeypatch.setattr("accelerate.commands.launch.launch_command", launch)
        with pytest.raises(SystemExit) as stopped:
            train_with_accelerate(str(recipe), ["--accelerate_config", "zero2"])
        assert stopped.value.code == 2
        assert 'With our extra: `pip install "trl-bbkd[deepspeed]"`.' in capsys.readouterr().err

    def test_unknown_accelerate_config_lists_ours(self, recipe, capfd):
        with pytest.raises(SystemExit) as stopped:
            main(["train", str(recipe), "--accelerate_config", "zero9"])
        assert stopped.value.code == 2
        message = "'zero9' is neither a file nor one of ddp, fsdp2, hsdp, zero2, zero3"
        assert capfd.readouterr().err.strip() == f"error: argument --accelerate_config/--accelerate-config: {message}"


class TestQuickly:
    """What is wrong with a recipe's keys is told before anything heavy is imported."""

    @pytest.mark.parametrize(
        ("text", "arguments", "message"),
        [
            ("learning_rat: 1e-3", [], "line 2: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
            ("", ["--learning_rat", "1"], "unknown option --learning_rat; did you mean '--learning_rate'?"),
            ("", ["--num_proces=2"], "launcher: unknown option --num_proces; did you mean '--num_processes'?"),
        ],
    )
    @pytest.mark.parametrize(
        "entry",
        ["trl_bbkd.__main__.main(arguments)", "trl_bbkd.cli.main(['train', *arguments])"],
        ids=["module", "train"],
    )
    def test_a_typo_loads_no_torch(self, tmp_path, entry, text, arguments, message):
        (tmp_path / "recipe.yaml").write_text(f"method: gad\n{text}\n")
        program = (
            "import sys, trl_bbkd.__main__, trl_bbkd.cli\n"
            f"arguments = ['recipe.yaml', *{arguments}]\n"
            f"try:\n    {entry}\n"
            "except SystemExit as error:\n"
            "    assert error.code == 2 and not {'torch', 'accelerate'} & set(sys.modules)\n"
            "    print('refused')"
        )
        done = start(["python", "-c", program], cwd=tmp_path)
        assert done.stdout == "refused\n", done.stderr
        # Only `train` has the launcher's options
        message = message.partition(";")[0] if "launcher" in message and "__main__" in entry else message
        assert done.stderr.startswith("error: ") and message.removeprefix("launcher: ") in done.stderr


class TestPlan:
    """What a recipe takes, from configurations alone."""

    def test_prints_tables_and_the_command(self, recipe, capsys):
        main(["plan", str(recipe), "--gpus", "2", "--rows", "100", "--max_completion_length", "16"])
        printed = capsys.readouterr().out
        assert "GiB on each of 2 GPUs" in printed and "FSDP2" in printed and "What fits" in printed
        assert "2 steps of the student: " in printed and "assumed" in printed
        overrides = "--max_completion_length 16"
        assert f"trl-bbkd train {recipe} {overrides} --accelerate_config ddp --num_processes 2" in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--gpus", "0"], "argument --gpus: '0' is no number above 0"),
            (["--gpus", "two"], "argument --gpus: 'two' is no number above 0"),
            (["--gpu_memory", "-1"], "argument --gpu_memory: '-1' is no number above 0"),
            (["--utilization", "40"], "argument --utilization: 40 is more than all, which is 1"),
            (["--gpu", "2"], "unknown option --gpu; did you mean '--gpus'?"),
            (["--learning_rat", "1"], "unknown option --learning_rat; did you mean '--learning_rate'?"),
            (["more"], "unexpected argument 'more'; overrides are written `--key value`."),
        ],
    )
    def test_what_is_wrong_is_one_line(self, recipe, capsys, arguments, message):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", str(recipe), *arguments])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"error: {message}\n"

    def test_a_typo_in_the_recipe_is_one_line(self, recipe, capsys):
        recipe.write_text(recipe.read_text().replace("max_steps", "max_step"))
        with pytest.raises(SystemExit):
            main(["plan", str(recipe)])
        message = f"{recipe}, line 6: unknown key 'max_step'; did you mean 'max_steps'?"
        assert capsys.readouterr().err == f"error: {message}\n"

    def test_other_commands_take_no_overrides(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(["recipes", "--rows", "3"])
        assert stopped.value.code == 2
        assert "unrecognized arguments: --rows 3" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [["--help"], ["gad", "--learning_rat", "1"]], ids=["help", "typo"])
    def test_help_and_typos_load_no_torch(self, tmp_path, arguments):
        program = (
            "import sys, trl_bbkd.cli\n"
            f"try:\n    trl_bbkd.cli.main(['plan', *{arguments}])\n"
            "except SystemExit:\n    print({'torch', 'transformers', 'accelerate'} & set(sys.modules))"
        )
        done = start(["python", "-c", program], cwd=tmp_path)
        assert done.stdout.endswith("set()\n"), done.stderr


class TestInterrupted:
    """Ctrl-C is one line with the command that goes on."""

    @pytest.fixture
    def interrupted(self, recipe, monkeypatch, capsys):
        def start(*overrides, checkpoint=False):
            def stop(job):
                if checkpoint:
                    folder = Path(job.args.output_dir, "checkpoint-1")
                    folder.mkdir(parents=True)
                    (folder / "trainer_state.json").write_text("{}")
                raise KeyboardInterrupt

            monkeypatch.setattr(text_job.TextJob, "distil", stop)
            monkeypatch.setattr(sys, "argv", [str(recipe), *overrides])
            with pytest.raises(SystemExit) as stopped:
                run_recipe(str(recipe), list(overrides))
            assert stopped.value.code == 130
            return capsys.readouterr().err.splitlines()[-1]

        return start

    def test_after_a_checkpoint(self, interrupted, recipe, tmp_path):
        folder = str(tmp_path / "out")
        assert interrupted("--output_dir", folder, checkpoint=True) == (
            f"Stopped. To go on: trl-bbkd train {recipe} --output_dir {folder} --resume_from_checkpoint true"
        )

    def test_what_goes_on_by_itself(self, recipe, monkeypatch, capsys):
        """The stages of a proxy are no checkpoints of the student, and not lost."""
        monkeypatch.setattr(sys, "argv", [str(recipe)])
        stopped = SimpleNamespace(method="proxykd", path=recipe, training_args=SimpleNamespace(output_dir="nowhere"))
        _say_how_to_go_on(stopped)
        assert capsys.readouterr().err.splitlines()[-1] == f"Stopped. To go on: trl-bbkd train {recipe}"

    def test_before_one(self, interrupted, recipe, tmp_path):
        folder = str(tmp_path / "out")
        assert interrupted("--output_dir", folder) == (
            f"Stopped before the first checkpoint. To start again: trl-bbkd train {recipe} --output_dir {folder}"
        )


class TestAccelerateConfig:
    @pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2", "hsdp"])
    def test_accelerate_reads_ours(self, name):
        from accelerate.commands.config.config_args import load_config_from_file

        kinds = {"ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP", "hsdp": "FSDP"}
        config = load_config_from_file(find_accelerate_config(name))
        assert config.distributed_type == kinds[name]
        if name.startswith("zero"):
            assert config.deepspeed_config["zero_stage"] == int(name[-1])
        if name == "hsdp":
            sizes = [config.parallelism_config[f"parallelism_config_dp_{key}_size"] for key in ("replicate", "shard")]
            assert sizes[0] == config.num_machines and sizes[0] * sizes[1] == config.num_processes

    def test_path(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.touch()
        assert find_accelerate_config(str(file)) == str(file)

    def test_unknown(self):
        with pytest.raises(argparse.ArgumentTypeError, match="ddp, fsdp2, hsdp, zero2, zero3"):
            find_accelerate_config("zero9")

    def test_machines_that_have_no_address(self, recipe, capfd):
        for words in (["--accelerate_config", "hsdp"], ["--num_machines", "2"]):
            with pytest.raises(SystemExit) as stopped:
                main(["train", str(recipe), *words])
            assert stopped.value.code == 2
            assert "2 machines need an address to meet at. Add --main_process_ip" in capfd.readouterr().err

    def test_it_reaches_the_training_process(self, recipe, tmp_path, monkeypatch, capfd):
        config = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "NO",
            "use_cpu": True,
            "num_processes": 1,
        }
        (tmp_path / "debug.yaml").write_text(yaml.safe_dump({**config, "debug": True}))
        # what a user's file raises is told, which shows what the launcher passed on
        (tmp_path / "rewards.py").write_text("import os\nraise RuntimeError(os.environ['ACCELERATE_DEBUG_MODE'])")
        monkeypatch.chdir(tmp_path)
        command = ["train", str(recipe), "--accelerate_config", "debug.yaml"]
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--reward_funcs", "rewards.py:reward"])
        assert stopped.value.code == 2
        assert "rewards.py cannot be imported: RuntimeError: true." in capfd.readouterr().err
