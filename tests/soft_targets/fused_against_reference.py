"""The Triton kernels against the loss in float64: on a GPU, or (TRITON_INTERPRET=1) interpreted on a CPU. Prints the cases."""

import itertools

import torch

from trl_bbkd.soft_targets.fused import fused_chunk_losses_
from trl_bbkd.soft_targets.loss import SparseTarget, chunk_losses_, sparse_target


ROWS, VOCAB, K = 3, 5001, 10  # more than a block of either kernel
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = ("no target", "top k", "tail", "two", "dense", "smaller dense", "top k and dense")
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def targets_of(case: str, temperature: float) -> list:
    wide, narrow = (torch.randn(ROWS, size, device=DEVICE) * 4 - 7 for size in (VOCAB, VOCAB - 100))
    log_probs, ids = wide.log_softmax(-1).topk(K)
    top_k = sparse_target(ids, log_probs, "renormalize", temperature)
    tail = sparse_target(ids, log_probs, "bucket")
    return {
        "no target": [],
        "top k": [top_k],
        "tail": [tail],
        "two": [top_k, tail],
        "dense": [wide],
        "smaller dense": [narrow],
        "top k and dense": [top_k, narrow],
    }[case]


def in_float64(target):
    if not isinstance(target, SparseTarget):
        return target.double()
    return SparseTarget(target.ids, target.probs.double(), None if target.tail is None else target.tail.double())


def relative_error(found, expected) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def compare(case: str, temperature: float, dtype: torch.dtype) -> None:
    logits = torch.randn(ROWS, VOCAB, device=DEVICE) * 4 + 20
    labels = torch.randint(0, VOCAB, (ROWS,), device=DEVICE)
    targets = targets_of(case, temperature)
    for target in targets:
        if isinstance(target, SparseTarget):
            labels[0] = target.ids[0, 0]  # a label that a target lists as well
    labels[1] = logits[1].argmax()  # and one that is the student's most likely token
    hard, soft = torch.rand(ROWS, device=DEVICE), torch.rand(len(targets), ROWS, device=DEVICE)
    expected, gradient = chunk_losses_(
        logits.double(), labels, list(map(in_float64, targets)), hard.double(), soft.double(), temperature
    )
    found, fused_gradient = fused_chunk_losses_(logits, labels, targets, hard, soft, temperature, True, dtype)
    assert fused_gradient.dtype == dtype
    for name in ("nll", "kl", "entropy"):
        error = relative_error(getattr(found, name), getattr(expected, name))
        assert error < 2e-6, (case, temperature, dtype, name, error)
    error = relative_error(fused_gradient, gradient)
    assert error < TOLERANCES[dtype], (case, temperature, dtype, "gradient", error)
    # Where the label's probability is nearly 1 the gradient is the small rest, which must not drown in rounding
    listed = relative_error(fused_gradient.gather(1, labels[:, None]), gradient.gather(1, labels[:, None]))
    assert listed < TOLERANCES[dtype], (case, temperature, dtype, "gradient of the label", listed)
    assert torch.equal(found.is_top1, expected.is_top1) and found.is_top1[1]


if __name__ == "__main__":
    torch.manual_seed(0)
    for each in itertools.product(CASES, (1.0, 2.0), TOLERANCES):
        compare(*each)
        print(*each)
