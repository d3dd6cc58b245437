"""docs/plan.md shows what the command prints, and what shipped recipes say of their hardware is so."""

import re

import pytest
from transformers import LlamaConfig, Qwen2Config, RobertaConfig

from tests.code_blocks import code, commands
from trl_bbkd.cli import main
from trl_bbkd.plan.memory import GIB
from trl_bbkd.plan.plan import Machine, Plan
from trl_bbkd.plan.reading import read_recipe
from trl_bbkd.runs.shipped import recipes_folder, shipped_recipes


PAGE = "docs/plan.md"
HARDWARE = re.compile(r"meant for 1 (?:GPU|node of (\d+) GPUs) with (\d+) GB")
STATED = {name: HARDWARE.search(file.read_text()) for name, file in shipped_recipes().items()}
# The header says that the proxy of 70 billion parameters is not divided over the GPUs yet
TOO_LARGE = {"llama-2-7b-gpt4/proxykd"}
WIDTH = "100"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of each model that a large recipe or the page names, a folder with its configuration."""
    folder = tmp_path_factory.mktemp("models")
    qwen = {"vocab_size": 152064}
    layers = lambda count: {"num_hidden_layers": count}  # noqa: E731
    heads = lambda count, kv: {"num_attention_heads": count, "num_key_value_heads": kv}  # noqa: E731
    configs = {
        "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
            **qwen, hidden_size=3584, intermediate_size=18944, **layers(28), **heads(28, 4)
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
    return folder


def on_disk(recipe, models, keys=("model_name_or_path", "proxy_model")) -> list[str]:
    """Overrides with the folders of the models that a recipe names."""
    text = recipe.read_text()
    found = ((key, re.search(rf"^{key}: (\S+)", text, flags=re.MULTILINE)) for key in keys)
    return [word for key, name in found if name for word in (f"--{key}", str(models / name[1]))]


@pytest.mark.parametrize("place", [0, 1], ids=["7B on 8", "72B on 64"])
def test_the_page_shows_what_is_printed(place, models, monkeypatch, capsys):
    command, printed = code(PAGE, "bash")[place], code(PAGE, "text")[place]
    ((program, *words),) = commands(command)
    assert program == "trl-bbkd"
    words = [str(models / word) if (models / word).is_dir() else word for word in words]
    monkeypatch.chdir(recipes_folder().parent)
    monkeypatch.setenv("COLUMNS", WIDTH)
    main(words)
    found = capsys.readouterr().out.replace(f"{models}/", "")
    assert [line.strip() for line in found.splitlines()] == [line.strip() for line in printed.splitlines()]


@pytest.mark.parametrize("name", [name for name, found in STATED.items() if found])
def test_a_recipe_fits_the_hardware_that_it_states(name, models):
    gpus, memory = int(STATED[name][1] or 1), float(STATED[name][2])
    file = shipped_recipes()[name]

    def plan(*overrides):
        return Plan(read_recipe(file, [*on_disk(file, models), *overrides], gpus), Machine(gpus, memory, 989, 0.4))

    if name in TOO_LARGE:
        assert plan().recommended is None
        smaller = str(models / "meta-llama/Llama-2-13b-hf")
        assert plan("--proxy_model", smaller).recommended.fits
    else:
        assert plan().recommended.fits


def test_hardware_is_stated():
    assert sorted(name for name, found in STATED.items() if found) == sorted(name for name in STATED if "/" in name)


def test_the_page_s_table_of_measurements():
    """Its columns agree with each other; `test_measured.py` compares them with the formulas."""
    page = (recipes_folder().parent / PAGE).read_text()
    rows = re.findall(r"^\| (.+?) \| ([\d,.]+) (GiB|MiB) \| ([\d,.]+) (?:GiB|MiB) \| ([+−-][\d.]+) % \|$", page, re.M)
    assert len(rows) >= 14
    for name, measured, _, planned, difference in rows:
        measured, planned = (float(number.replace(",", "")) for number in (measured, planned))
        stated = float(difference.replace("−", "-"))
        assert 100 * (planned / measured - 1) == pytest.approx(stated, abs=0.4), name
        assert abs(stated) <= 15
    assert GIB == 2**30
