"""
The README of each folder of large recipes: what `trl-bbkd plan` prints for the command in a recipe's header. And what
docs/plan.md shows.

    python -m tests.plan.recipe_pages

writes them; `test_docs.py` compares.
"""

import contextlib
import io
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from transformers import LlamaConfig, Qwen2Config, RobertaConfig

from trl_bbkd.cli import main
from trl_bbkd.plan import show
from trl_bbkd.plan.plan import Plan
from trl_bbkd.runs.shipped import recipes_folder, shipped_recipes


WIDTH = "100"
LARGE = {name: file for name, file in shipped_recipes().items() if "/" in name}
PLAN = re.compile(r"^# Plan: +(.+)$", re.MULTILINE)
KEYS_OF_MODELS = ("model_name_or_path", "proxy_model")
INTRODUCTION = """\
What `trl-bbkd plan` prints for the recipes of this folder, on the hardware that their headers name: from the models' configurations,
without a run. [How to read it, and how far it can be trusted](../../docs/plan.md). Written by `python -m tests.plan.recipe_pages`.
"""


PAGE = recipes_folder().parent / "docs" / "plan.md"
SHOWN = re.compile(r"```bash\n(trl-bbkd plan .*?)```\n\n```text\n(.*?)```", re.DOTALL)


class Planned(NamedTuple):
    """What the command in a recipe's header prints, and the plan that it prints."""

    command: str
    printed: str
    plan: Plan


def write_models(folder: Path) -> None:
    """Of each model that a large recipe or a page names, a folder with its configuration."""
    qwen = {"vocab_size": 152064}
    layers = lambda count: {"num_hidden_layers": count}  # noqa: E731
    heads = lambda count, kv: {"num_attention_heads": count, "num_key_value_heads": kv}  # noqa: E731
    configs = {
        "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            tie_word_embeddings=True,
            **layers(24),
            **heads(14, 2),
        ),
        "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
            **qwen, hidden_size=3584, intermediate_size=18944, **layers(28), **heads(28, 4)
        ),
        "Qwen/Qwen2.5-14B-Instruct": Qwen2Config(
            **qwen, hidden_size=5120, intermediate_size=13824, **layers(48), **heads(40, 8)
        ),
        "Qwen/Qwen2.5-72B-Instruct": Qwen2Config(
            **qwen, hidden_size=8192, intermediate_size=29568, **layers(80), **heads(64, 8)
        ),
        "meta-llama/Llama-2-7b-hf": LlamaConfig(),
        "meta-llama/Llama-2-13b-hf": LlamaConfig(
            hidden_size=5120, intermediate_size=13824, **layers(40), **heads(40, 40)
        ),
        "meta-llama/Llama-2-70b-hf": LlamaConfig(
            hidden_size=8192, intermediate_size=28672, **layers(80), **heads(64, 8)
        ),
        "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            tie_word_embeddings=True,
            **layers(30),
            **heads(9, 3),
        ),
        "FacebookAI/roberta-base": RobertaConfig(vocab_size=50265, max_position_embeddings=514),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)


def plan_of(name: str, models: Path) -> Planned:
    """The plan of a large recipe, whose models are read from folders."""
    text = LARGE[name].read_text()
    command = PLAN.search(text)[1]
    added = []
    for key in KEYS_OF_MODELS:
        model = re.search(rf"^{key}: (\S+)", text, flags=re.MULTILINE)
        if model and f"--{key}" not in command:
            added += [f"--{key}", str(models / model[1])]
    plans = []
    printing = mock.patch.object(show, "print_plan", side_effect=_kept_by(plans, show.print_plan))
    with printing:
        printed = printed_by(f"{command} {shlex.join(added)}", models)
    return Planned(command, printed.replace(f" {shlex.join(added)}".replace(f"{models}/", ""), ""), plans[0])


def printed_by(command: str, models: Path) -> str:
    """What a command prints, whose models are read from folders."""
    words = shlex.split(command.replace("\\\n", ""))[1:]
    words = [str(models / word) if (models / word).is_dir() else word for word in words]
    root = recipes_folder().parent
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.chdir(root):
        with mock.patch.dict(os.environ, {"COLUMNS": WIDTH}):
            main(words)
    return "\n".join(line.strip() for line in printed.getvalue().replace(f"{models}/", "").splitlines())


def _kept_by(plans: list, print_plan):
    def keeping(plan, *arguments):
        plans.append(plan)
        print_plan(plan, *arguments)

    return keeping


def page(folder: str, found: dict[str, Planned]) -> str:
    """The README of a folder, from its recipes' plans."""
    parts = [f"# {folder}\n", INTRODUCTION]
    for name, each in found.items():
        title = LARGE[name].read_text().partition("\n")[0].removeprefix("# ")
        parts += [f"## {LARGE[name].name}\n", f"{title}\n"]
        parts += [f"```bash\n{each.command}\n```\n", f"```text\n{each.printed}\n```\n"]
    return "\n".join(parts)


def write_pages() -> None:
    with tempfile.TemporaryDirectory() as models:
        write_models(Path(models))
        for folder in dict.fromkeys(name.partition("/")[0] for name in LARGE):
            found = {name: plan_of(name, Path(models)) for name in LARGE if name.startswith(f"{folder}/")}
            (recipes_folder() / folder / "README.md").write_text(page(folder, found), encoding="utf-8")
        show_again = lambda shown: f"```bash\n{shown[1]}```\n\n```text\n{printed_by(shown[1], Path(models))}\n```"  # noqa: E731
        PAGE.write_text(SHOWN.sub(show_again, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_pages()
