"""The list of what only a GPU can tell, on tiny models: the same code, so that it runs when there is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "parts", [["b"], pytest.param(["a", "c", "d"], marks=pytest.mark.slow)], ids=["loss", "everything else"]
)
def test_the_list_runs_in_small(tmp_path, parts):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--smoke", "--output_dir", str(tmp_path)]
    subprocess.run([*command, "--seconds", "900", "--parts", *parts], check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert list(found) == parts
    for part in found.values():
        assert part["commands"] and all(each["exit"] == 0 for each in part["commands"]), part["notes"]
    assert not [
        row for part in found.values() for row in part["rows"] if "error" in row and row.get("variant") != "Liger"
    ]
    if parts == ["b"]:
        losses = {
            row["variant"]: row["loss"] for row in found["b"]["rows"] if row.get("target") == "dense" and "loss" in row
        }
        assert losses["soft_target_loss"] == pytest.approx(losses["full logits"], rel=1e-3)
    assert "| tokens |" in (tmp_path / "results.md").read_text() or parts != ["b"]
