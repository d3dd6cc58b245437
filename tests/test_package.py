import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import trl_bbkd


ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "peft", "matplotlib"}


def heavy_imports(code: str) -> set[str]:
    """Top-level packages of `HEAVY` that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


class TestLazyImport:
    def test_import_loads_nothing_heavy(self):
        assert heavy_imports("import trl_bbkd; assert trl_bbkd.launch and trl_bbkd.__version__") == set()

    @pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
    def test_help_loads_nothing_heavy(self, arguments):
        code = (
            f"from trl_bbkd.cli import main\ntry: main({arguments})\nexcept SystemExit as exit: assert exit.code == 0"
        )
        assert heavy_imports(code) == set()

    def test_module_help_loads_nothing_heavy(self):
        code = "from trl_bbkd.__main__ import main\ntry: main(['--help'])\nexcept SystemExit as exit: assert not exit.code"
        assert heavy_imports(code) == set()

    def test_public_names_resolve(self):
        for name in trl_bbkd.__all__:
            assert getattr(trl_bbkd, name).__name__ == name
        assert set(trl_bbkd.__all__) <= set(dir(trl_bbkd))

    def test_type_checkers_see_what_is_resolved(self):
        source = Path(trl_bbkd.__file__).read_text()
        imports = re.findall(r"^    from (\S+) import (\w+)$", source, re.MULTILINE)
        assert {name: module for module, name in imports} == trl_bbkd._LAZY_NAMES

    def test_unknown_name(self):
        with pytest.raises(AttributeError, match="GADTrainr"):
            trl_bbkd.GADTrainr  # noqa: B018


class TestPackaging:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    constraints = {
        name.lower(): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    }

    @pytest.mark.parametrize("requirement", pyproject["project"]["dependencies"])
    def test_tested_versions_lie_in_the_ranges(self, requirement):
        requirement = Requirement(requirement)
        assert requirement.specifier.contains(self.constraints[requirement.name])

    def test_constraints_name_versions_only(self):
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        assert len([line for line in lines if not line.startswith("#")]) == len(self.constraints)
        assert self.constraints["torch"] == "2.13.0"

    def test_ci_runs_the_command_of_the_readme(self):
        command = 'pip install -c constraints.txt -e ".[test]" && pytest'
        assert command in (ROOT / "README.md").read_text()
        assert f"command='{command}'" in (ROOT / ".ci" / "run").read_text()
        subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
