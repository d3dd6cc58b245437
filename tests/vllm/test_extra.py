"""The extra `vllm`: one version, which TRL drives and which installs beside what this package was tested with."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from .stand_in import VERSION


ROOT = Path(__file__).parents[2]
EXTRA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
CONSTRAINTS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
# Of its metadata, what the constraints name as well. mistral-common, which it needs, wants numpy below 2.4 before Python 3.13
REQUIRES = {"0.29.0": ["torch==2.13.0", "transformers>=5.10.4", "tokenizers>=0.21.1"]}


def test_trl_drives_the_version_that_is_pinned():
    (pinned,) = (Requirement(each).specifier for each in EXTRA if Requirement(each).name == "vllm")
    assert str(pinned) == f"=={VERSION}"
    (range_of_trl,) = (
        requirement.specifier
        for requirement in map(Requirement, importlib.metadata.requires("trl"))
        if requirement.name == "vllm" and requirement.marker.evaluate({"extra": "vllm"})
    )
    assert range_of_trl.contains(VERSION)
    # TRL talks to the server in one of two ways, by its version
    assert Version(VERSION) >= Version("0.28.0")


@pytest.mark.parametrize("requirement", REQUIRES[VERSION])
def test_it_takes_what_was_tested(requirement):
    requirement = Requirement(requirement)
    assert requirement.specifier.contains(CONSTRAINTS[requirement.name])


@pytest.mark.slow
def test_it_resolves(tmp_path):
    """With every version of `constraints.txt` but numpy's. Some versions of pip download gigabytes to learn that."""
    constraints = [f"{name}=={version}" for name, version in CONSTRAINTS.items() if name != "numpy"]
    (tmp_path / "constraints.txt").write_text("\n".join(constraints) + "\n")
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "-c", tmp_path / "constraints.txt", f"{ROOT}[vllm]"], capture_output=True, text=True, cwd=tmp_path
    )
    if "NewConnectionError" in done.stderr or "No matching distribution found" in done.stderr:
        pytest.skip("no package index")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"vllm-{VERSION}" in done.stdout
