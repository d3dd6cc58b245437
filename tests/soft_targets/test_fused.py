"""The kernels of a GPU: run on one where there is one, interpreted elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_bbkd.soft_targets import kernel
from trl_bbkd.soft_targets.loss import DenseTarget, LMHead


SCRIPT = Path(__file__).parent / "fused_against_reference.py"


def test_the_fused_loss_and_its_gradient_are_those_of_float64():
    pytest.importorskip("triton", minversion="3.5", reason="the interpreter of older ones fails with NumPy 2.5")
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    process = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=os.environ | interpreted
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert len(process.stdout.splitlines()) == 7 * 2 * 2


@pytest.mark.parametrize("dense", [0, 2])
def test_what_the_fused_kernels_do_not_know_is_left_to_pytorch(monkeypatch, dense):
    """On a CPU, and with two dense targets, the loss is that of `chunk_losses_`."""
    monkeypatch.setattr(kernel, "HAS_TRITON", True)
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(11, 4)
    targets = [DenseTarget(torch.randn(5, 4), LMHead(torch.randn(11, 4))) for _ in range(dense)]
    hard, soft = torch.full((5,), 0.2), torch.full((dense, 5), 0.2)
    losses = kernel.soft_target_loss(hidden, LMHead(weight), torch.arange(5), targets, hard, soft)
    nll = torch.nn.functional.cross_entropy(hidden @ weight.t(), torch.arange(5), reduction="none")
    torch.testing.assert_close(losses.nll, nll)
