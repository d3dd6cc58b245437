"""What a project is expected to have: version, changelog, citation, workflows, forms; and that they agree."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import trl_bbkd
from trl_bbkd.runs.shipped import recipe_list, shipped_recipes


ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(file for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps(workflow):
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


def test_the_version_is_said_once_and_repeated():
    assert f"\n## {trl_bbkd.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == trl_bbkd.__version__
    assert "version" in PROJECT["dynamic"] and re.fullmatch(r"\d+\.\d+\.\d+", trl_bbkd.__version__)


def test_the_package_is_typed():
    assert (Path(trl_bbkd.__file__).parent / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_every_python_that_is_claimed_is_tested():
    claimed = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tested-versions"]["strategy"]
    assert matrix["matrix"]["python-version"] == claimed
    assert PROJECT["requires-python"] == f">={claimed[0]}"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_are_pinned_and_install_what_there_is(workflow):
    extras = {*PROJECT["optional-dependencies"]}
    for step in steps(workflow):
        assert "@" in step.get("uses", "@"), step
        for command in step.get("run", "").splitlines():
            assert set(re.findall(r'-e "?\.\[(\w+)\]', command)) <= extras, command
    assert any("pytest" in step.get("run", "") for step in steps(workflow))
    text = workflow.read_text()
    # Registries are pip's to know, tokens the platform's
    assert "://" not in text.replace("git+https://github.com/huggingface/trl", "") and "secrets." not in text


def test_a_commit_is_checked_as_a_pull_request_is():
    """By the versions that pip installed, so that no hook is fetched from elsewhere."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"] for hook in repository["hooks"]]
    style = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["style"]["steps"]
    commands = [step["run"] for step in style if not step.get("run", "pip").startswith("pip")]
    assert [" ".join(entry.split()[:2]) for entry in entries] == ["ruff check", "ruff format", "mypy"]
    assert [command.removesuffix(" .").removesuffix(" --check") for command in commands] == [
        "ruff check",
        "ruff format",
        "mypy",
    ]


def test_every_dependency_has_a_lower_bound():
    """`uv --resolution lowest-direct` takes version 0 of what has none."""
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["test"], *extras["quantization"]]:
        requirement = Requirement(line)
        assert requirement.name == "trl-bbkd" or any(part.operator == ">=" for part in requirement.specifier), line


@pytest.mark.parametrize("form", FORMS, ids=lambda file: file.stem)
def test_issue_forms_are_whole(form):
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    ids = [part["id"] for part in content["body"] if part["type"] != "markdown"]
    assert ids and len(set(ids)) == len(ids)
    assert all(part["attributes"].get("label") for part in content["body"] if part["type"] != "markdown")


def test_security_names_what_is_so():
    """No file of the package reads a pickle, builds objects from YAML or runs a model's code by itself."""
    for file in Path(trl_bbkd.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"torch\.load\(|import pickle|allow_pickle=True|yaml\.(unsafe_|full_)?load\(", text), file
        assert not re.search(r"trust_remote_code\w*\W+True", text), file
        assert not re.search(r"^\s*(import|from) (requests|urllib\.request|httpx|socket)\b", text, re.MULTILINE), file


def test_the_list_of_recipes_has_a_line_for_each():
    lines = recipe_list().splitlines()
    for name, file in shipped_recipes().items():
        (line,) = (line for line in lines if line.split()[0] == name)
        assert line.split(maxsplit=1)[1] == file.read_text().splitlines()[0].removeprefix("# ")
        assert line.endswith(".") and len(line) < 160
    assert list(shipped_recipes())[:6] == ["bayeskd", "gad", "llkd", "preferencekd", "proxykd-on-policy", "proxykd"]
    assert "qwen2.5-7b-lmsys/gad" in shipped_recipes() and not any("accelerate" in name for name in shipped_recipes())
