"""Part a of `gpu.py`: is it right on this device? The loss on soft targets, and a run and resume of every method."""

import concurrent.futures
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common.arguments import parser
from common.device import DEVICE, emit
from safetensors.torch import load_file

from trl_bbkd.soft_targets.kernel import soft_target_loss
from trl_bbkd.soft_targets.loss import DenseTarget, LMHead, sparse_target


ROOT = Path(__file__).parents[1]
FAST = ["--max_steps", "20", "--save_strategy", "steps", "--save_steps", "10", "--logging_steps", "5"]
RECIPES = {
    "gad": [*FAST, "--seqkd_baseline", "false", "--per_device_train_batch_size", "64"],
    "proxykd": [*FAST, "--seqkd_baseline", "false", "--proxy_warmup_epochs", "1", "--alignment_rounds", "1"],
    "bayeskd": [*FAST, "--seqkd_baseline", "false", "--proxy_warmup_epochs", "1"],
    "llkd": [*FAST, "--baselines", "false"],
}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def reference_loss(hidden, weight, labels, probs, tail_ids, hard, soft):
    """`hard · NLL + soft · KL` from full logits; `tail_ids` lump all other tokens together."""
    log_probs = (hidden @ weight.t()).log_softmax(-1)
    nll = -log_probs.gather(1, labels[:, None]).squeeze(1)
    if tail_ids is not None:
        rest = torch.ones_like(log_probs).scatter(1, tail_ids, 0.0)
        tail = (log_probs.exp() * rest).sum(-1, keepdim=True).log()
        log_probs = torch.cat([log_probs.gather(1, tail_ids), tail], dim=-1)
    kl = (torch.xlogy(probs, probs) - probs * log_probs).sum(-1)
    return (hard * nll + soft * kl).sum()


def kernel_against_float64(tokens: int, vocab: int, size: int, k: int = 10) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    options = {"device": DEVICE, "dtype": torch.float64, "generator": generator}
    hidden, weight = torch.randn(tokens, size, **options), torch.randn(vocab, size, **options) * 3 * size**-0.5
    proxy_hidden, proxy_weight = (
        torch.randn(tokens, size, **options),
        torch.randn(vocab, size, **options) * 3 * size**-0.5,
    )
    labels = torch.randint(0, vocab, (tokens,), device=DEVICE, generator=generator)
    hard, soft = (torch.rand(tokens, device=DEVICE, generator=generator).double() / tokens for _ in range(2))
    kinds, dtypes = ("dense", "top k", "top k and tail"), (torch.float32, torch.bfloat16)
    for kind, dtype in itertools.product(kinds, dtypes):
        # Both sides start from the same rounded numbers: what is measured is the computation
        h, w, ph, pw = (value.to(dtype) for value in (hidden, weight, proxy_hidden, proxy_weight))
        teacher = (ph.double() @ pw.double().t()).log_softmax(-1)
        top, ids = teacher.topk(k)
        if kind == "dense":
            target, probs, tail_ids = DenseTarget(ph, LMHead(pw)), teacher.exp(), None
        else:
            target = sparse_target(ids, top.float(), "bucket" if "tail" in kind else "renormalize")
            if "tail" in kind:
                tail_ids, probs = ids, torch.cat([top.exp(), 1 - top.exp().sum(-1, keepdim=True)], dim=-1)
            else:
                tail_ids, probs = None, torch.zeros_like(teacher).scatter(1, ids, top.softmax(-1))
        rh, rw = (value.double().requires_grad_() for value in (h, w))
        expected = reference_loss(rh, rw, labels, probs, tail_ids, hard, soft)
        expected.backward()
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        found = soft_target_loss(
            h, LMHead(w), labels, [target], hard.float(), soft.float()[None], chunk_elements=vocab * 300
        )
        found.loss.backward()
        emit(
            f"loss on soft targets against float64, {tokens} tokens, vocabulary {vocab:,}, hidden size {size}",
            target=kind,
            dtype=str(dtype).removeprefix("torch."),
            loss_error=relative_error(found.loss, expected.detach()),
            hidden_gradient_error=relative_error(h.grad, rh.grad),
            weight_gradient_error=relative_error(w.grad, rw.grad),
        )


def train(recipe: str, output_dir: Path, *overrides: str) -> tuple[int, str, float]:
    precision = ["--use_cpu", "false", "--bf16", "true"] if DEVICE == "cuda" else ["--use_cpu", "true"]
    command = [
        sys.executable,
        "-m",
        "trl_bbkd",
        str(ROOT / "recipes" / f"{recipe}.yaml"),
        *RECIPES[recipe],
        *precision,
    ]
    started = time.perf_counter()
    process = subprocess.run(
        [*command, "--output_dir", str(output_dir), *overrides],
        capture_output=True,
        text=True,
        # Bit for bit as far as the device can: what a resumed run differs in is then its own fault
        env=os.environ
        | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    return process.returncode, process.stdout + process.stderr, time.perf_counter() - started


def difference(first: Path, second: Path) -> float:
    """Largest difference of two students' weights, relative to the largest weight."""
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    return max(((a[name].double() - b[name].double()).abs().max() / a[name].double().abs().max()).item() for name in a)


def run_and_resume(recipe: str, folder: Path) -> dict:
    row = {"recipe": recipe}
    straight, again, resumed = (folder / f"{recipe}_{name}" for name in ("straight", "again", "resumed"))
    code, output, seconds = train(recipe, straight)
    row |= {"exit": code, "seconds": round(seconds, 1)}
    if code != 0:
        return row | {"error": _last_line(output)}
    log = json.loads((straight / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    row |= {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoint-20")
    code, output, _ = train(recipe, again)
    row["run_again_differs"] = difference(straight, again) if code == 0 else _last_line(output)
    arguments = ["--resume_from_checkpoint", "true"]
    code, output, _ = train(recipe, resumed, *arguments)
    row["resumed_differs"] = difference(straight, resumed) if code == 0 else _last_line(output)
    return row


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if re.search("rror", line)] or output.splitlines()[-1:]
    return " ".join(lines[-2:])[:400]


def parse_args(argv=None):
    found = parser(__doc__)
    found.add_argument("--smoke", action="store_true")
    found.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    return found.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    sizes = {"tokens": 33, "vocab": 512, "size": 32} if args.smoke else {"tokens": 1500, "vocab": 32000, "size": 512}
    kernel_against_float64(**sizes)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(len(RECIPES)) as pool:
        for row in pool.map(lambda recipe: run_and_resume(recipe, Path(folder)), args.recipes):
            emit("20 steps of a recipe, in bfloat16 on a GPU; largest difference of the student's weights", **row)


if __name__ == "__main__":
    main()
