"""The wheel, built and installed in an environment that does not know the repository."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import trl_bbkd


ROOT = Path(__file__).parents[1]
SMALL = {
    "gad": ["--max_steps", "2", "--discriminator_batch_size", "16", "--per_device_train_batch_size", "16"],
    "proxykd": [
        "--max_steps",
        "2",
        "--proxy_warmup_epochs",
        "1",
        "--alignment_rounds",
        "1",
        "--alignment_epochs",
        "1",
    ],
    "bayeskd": ["--max_steps", "2", "--proxy_warmup_epochs", "1"],
    "llkd": ["--max_steps", "6", "--selection_warmup_steps", "2"],
}
# Names whoever a process speaks to, other than itself
WATCH = """
import os, sys

def watch(event, arguments, path=os.environ.get("WATCHED_CONNECTIONS")):
    if path and event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        address = arguments[0 if event.startswith("socket.get") else 1]
        host = address[0] if isinstance(address, tuple) else address
        if str(host) not in ("127.0.0.1", "::1", "localhost", "None"):
            with open(path, "a") as file:
                print(event, host, file=file)

sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new virtual environment with the wheel, and with this one's libraries, but not its trl_bbkd, which is a link."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=300)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, capture_output=True, timeout=300)
    (site,) = (folder / "lib").glob("python*/site-packages")
    paths = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    (site / "others.pth").write_text("\n".join([*paths, "import watch_connections\n"]))
    (site / "watch_connections.py").write_text(WATCH)
    return folder


@pytest.fixture
def run(environment, tmp_path):
    def run(*command, status=0):
        variables = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "VIRTUAL_ENV", "HF_HUB_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
        }
        variables |= {
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(tmp_path / "huggingface"),
            "WATCHED_CONNECTIONS": str(tmp_path / "connections"),
        }
        done = subprocess.run(
            [environment / "bin" / command[0], *map(str, command[1:])],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
        return done

    return run


def connections(tmp_path):
    file = tmp_path / "connections"
    return file.read_text().splitlines() if file.exists() else []


def test_it_holds_the_package_its_recipes_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"trl_bbkd-{trl_bbkd.__version__}-py3-none-any.whl"
    assert {name.partition("/")[0] for name in names} == {"trl_bbkd", f"trl_bbkd-{trl_bbkd.__version__}.dist-info"}
    tracked = {file.relative_to(ROOT).as_posix() for file in (ROOT / "recipes").rglob("*") if file.is_file()}
    assert {f"trl_bbkd/{name}" for name in tracked if "__pycache__" not in name} <= {*names}
    assert {"trl_bbkd/py.typed", "trl_bbkd/gad/template.yaml"} <= {*names}
    assert not [name for name in names if "__pycache__" in name or "test_" in name]


def test_a_recipe_is_found_by_name(run, environment, tmp_path):
    """Two steps of LLKD on tinytopics, whose model and rows come from the wheel, without a word to another machine."""
    (tmp_path / "trl_bbkd").mkdir()  # what lies in the current directory is not taken for the package
    done = run("trl-bbkd", "train", "llkd", *SMALL["llkd"], "--output_dir", "out")
    assert "LLKD: " in done.stdout
    assert json.loads((tmp_path / "out/metrics.json").read_text())["results"]["LLKD"]
    card = (tmp_path / "out/README.md").read_text()
    assert "trl-bbkd train llkd --max_steps 6" in card and str(environment) not in card
    assert connections(tmp_path) == []
    listed = run("trl-bbkd", "recipes").stdout
    assert f"Files: {environment}" in listed and "\n  gad " in listed and "qwen2.5-7b-lmsys/gad" in listed


def test_the_watch_sees(run, tmp_path):
    code = "import socket\ntry: socket.getaddrinfo('host.invalid', 80)\nexcept OSError: pass"
    run("python", "-c", code)
    assert connections(tmp_path) == ["socket.getaddrinfo host.invalid"]


def test_every_recipe_finds_its_inputs_in_the_wheel(run, environment):
    code = """
from pathlib import Path
from trl_bbkd.commands.train import find_accelerate_config
from trl_bbkd.runs.recipe import import_callable, load_recipe
from trl_bbkd.runs.shipped import shipped_recipes
for name, file in shipped_recipes().items():
    recipe = load_recipe(file, ["--use_cpu", "true", "--bf16", "false"])
    if "/" not in name:
        script, args = recipe.script_args, recipe.training_args
        inputs = [recipe.model_args.model_name_or_path, script.dataset_name]
        inputs += [getattr(args, key) for key in ("discriminator", "proxy_model") if hasattr(args, key)]
        assert all(Path(path).is_dir() for path in inputs), inputs
        if getattr(script, "sample_metrics", None):
            assert callable(import_callable(script.sample_metrics))
    print(name, file)
print(find_accelerate_config("ddp"))
"""
    lines = run("python", "-c", code).stdout.splitlines()
    assert len(lines) == 16 and all(str(environment) in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gad", "proxykd", "bayeskd"])
def test_every_world_runs(run, tmp_path, method):
    samples = ["--eval_prompts", "16", "--eval_samples", "1"]
    run("trl-bbkd", "train", method, *SMALL[method], *samples, "--output_dir", "out")
    assert (tmp_path / "out/report.md").is_file() and (tmp_path / "out/model.safetensors").is_file()
    assert connections(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "gda"], "there is no recipe gda; did you mean 'gad'?"),
        (["train", "recipes/proxykd.yaml"], "there is no recipe recipes/proxykd.yaml; did you mean 'proxykd'?"),
        (["init", "gda", "--student", "a/b", "--data", "c/d"], "there is no method 'gda'; did you mean 'gad'?"),
    ],
)
def test_names_that_are_none(run, command, message):
    done = run("trl-bbkd", *command, status=2)
    assert done.stderr.startswith(f"error: {message}") and len(done.stderr.splitlines()) == 1
