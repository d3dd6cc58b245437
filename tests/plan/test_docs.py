"""docs/plan.md shows what the command prints, and what shipped recipes say of their hardware is so."""

import functools
import re

import pytest

from tests.code_blocks import code, commands
from tests.plan.recipe_pages import KEYS_OF_MODELS, LARGE, page, plan_of, printed_by, write_models
from trl_bbkd.plan.memory import GIB
from trl_bbkd.plan.plan import Machine, Plan
from trl_bbkd.plan.reading import read_recipe
from trl_bbkd.runs.shipped import recipes_folder


PAGE = "docs/plan.md"
HARDWARE = re.compile(r"meant for (?:1 GPU|(\d+) nodes? of (\d+) GPUs) with (\d+) GB")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of each model that a large recipe or the page names, a folder with its configuration."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def plans(models):
    """What the command in each large recipe's header prints."""
    return functools.cache(lambda name: plan_of(name, models))


@pytest.mark.parametrize("place", [0, 1], ids=["7B on 8", "72B on 64"])
def test_the_page_shows_what_is_printed(place, models):
    command, printed = code(PAGE, "bash")[place], code(PAGE, "text")[place]
    ((program, *_),) = commands(command)
    assert program == "trl-bbkd"
    found = printed_by(command, models)
    assert [line.strip() for line in found.splitlines()] == [line.strip() for line in printed.splitlines()]


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_fits_the_hardware_that_it_states(name, plans):
    plan, header = plans(name).plan, LARGE[name].read_text()
    machine = plan.machine
    nodes, gpus, memory = HARDWARE.search(header).groups(default="1")
    assert (machine.gpus, machine.gpu_memory) == (int(nodes) * int(gpus), float(memory))
    assert plan.recommended.fits
    # And so does what its first command starts
    command = re.search(rf"^#\s+(?:Command:\s+)?(trl-bbkd train \S*{name}\.yaml.*)$", header, re.MULTILINE)[1]
    engine = re.search(r"--accelerate_config (\w+)", command)
    assert plan.own[engine[1] if engine else "ddp"].fits


@pytest.mark.parametrize("folder", sorted({name.partition("/")[0] for name in LARGE}))
def test_the_readme_of_recipes_is_their_plan(folder, plans):
    found = {name: plans(name) for name in LARGE if name.startswith(f"{folder}/")}
    readme = (recipes_folder() / folder / "README.md").read_text(encoding="utf-8")
    assert readme == page(folder, found), "write it again: python -m tests.plan.recipe_pages"


def test_a_proxy_of_70_billion_parameters_fits_nowhere(models):
    """As the header says, which names a smaller one."""
    file = LARGE["llama-2-7b-gpt4/proxykd"]
    named = {key: re.search(rf"^{key}: (\S+)", file.read_text(), re.MULTILINE)[1] for key in KEYS_OF_MODELS}
    overrides = [word for key, model in named.items() for word in (f"--{key}", str(models / model))]
    assert Plan(read_recipe(file, overrides, 8), Machine(8, 80, 989, 0.4)).recommended is None


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
