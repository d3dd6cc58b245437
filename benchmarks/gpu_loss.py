"""Part b of `gpu.py`: time and memory of the loss on soft targets, forward and backward, beside what else computes it."""

import functools
import gc
import statistics
import time
from types import SimpleNamespace

import torch
from common.arguments import parser
from common.device import DEVICE, emit, synchronize
from kd_loss import full_logits, make_inputs, trl_functions

from trl_bbkd.soft_targets import kernel
from trl_bbkd.soft_targets.kernel import soft_target_loss
from trl_bbkd.soft_targets.loss import DenseTarget, LMHead


ROUNDS = 5
CHUNKS = [2**exponent for exponent in range(25, 30)]


def ours(inputs, kind, chunk_elements=None):
    target = (
        DenseTarget(inputs["proxy_hidden"], LMHead(inputs["proxy_weight"])) if kind == "dense" else inputs["sparse"]
    )
    tokens = len(inputs["hidden"])
    factor = torch.full((tokens,), 1.0 / tokens, device=inputs["hidden"].device)
    head = LMHead(inputs["weight"])
    return soft_target_loss(
        inputs["hidden"], head, inputs["labels"], [target], factor, factor[None], chunk_elements=chunk_elements
    ).loss


def liger(inputs, kind):
    """Liger's fused losses: cross-entropy, and for the whole distribution the JSD, one after the other."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    nll = LigerFusedLinearCrossEntropyLoss()(inputs["weight"], inputs["hidden"], inputs["labels"])
    if kind == "sparse":
        return nll
    # beta=0 is the forward KL
    kl = LigerFusedLinearJSD(jsd_beta=0.0)(
        inputs["hidden"], inputs["weight"], inputs["proxy_hidden"], inputs["proxy_weight"], inputs["labels"]
    )
    return nll + kl


def without_triton(inputs, kind):
    kernel.HAS_TRITON, known = False, kernel.HAS_TRITON
    try:
        return ours(inputs, kind)
    finally:
        kernel.HAS_TRITON = known


VARIANTS = {
    "full logits": full_logits,
    "TRL": trl_functions,
    "Liger": liger,
    "soft_target_loss without Triton": without_triton,
    "soft_target_loss": ours,
}


def measure(function, inputs) -> dict:
    """Median seconds of a forward and backward pass, and its peak beyond inputs and gradients."""
    seconds, peak, loss = [], 0, None
    for number in range(ROUNDS + 2):
        for name in ("hidden", "weight"):
            inputs[name].grad = None
        synchronize()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        value = function(inputs)
        value.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            gradients = sum(inputs[name].grad.nbytes for name in ("hidden", "weight"))
            peak = torch.cuda.max_memory_allocated() - before - gradients
        if number >= 2:
            seconds.append(time.perf_counter() - started)
        loss = value.item()
        del value
    row = {"ms": statistics.median(seconds) * 1e3, "peak_mib": peak / 2**20, "loss": loss}
    return row | {f"|grad {name}|": inputs[name].grad.float().norm().item() for name in ("hidden", "weight")}


def try_measure(function, inputs) -> dict:
    try:
        return measure(function, inputs)
    except (torch.OutOfMemoryError, RuntimeError, ImportError, TypeError) as error:
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"}


def parse_args(argv=None):
    found = parser(__doc__)
    found.add_argument("--smoke", action="store_true")
    return found.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    vocabularies, token_counts = ((512,), (64,)) if args.smoke else ((151936, 32000), (8192, 2048, 16384))
    chunks = [2**12, 2**14] if args.smoke else CHUNKS
    sizes = {"hidden": 32, "proxy_hidden": 48} if args.smoke else {"hidden": 896, "proxy_hidden": 3584}
    for tokens in token_counts:
        for vocab in vocabularies:
            for kind in ("sparse", "dense"):
                arguments = SimpleNamespace(dtype="bfloat16", device=DEVICE, kind=kind, k=10, **sizes)
                inputs = make_inputs(arguments, tokens, vocab)
                found = {
                    name: try_measure(functools.partial(function, kind=kind), inputs)
                    for name, function in VARIANTS.items()
                }
                base = {column: found["full logits"].get(column) for column in ("ms", "peak_mib")}
                for name, row in found.items():
                    if base["ms"] and "ms" in row:
                        row["ms / full logits"] = row["ms"] / base["ms"]
                        row["peak / full logits"] = row["peak_mib"] / base["peak_mib"] if base["peak_mib"] else None
                    emit(
                        "loss on soft targets, forward and backward",
                        tokens=tokens,
                        vocab=vocab,
                        target=kind,
                        variant=name,
                        **row,
                    )
                if tokens != 8192 and not args.smoke:
                    continue
                for chunk in chunks:
                    row = try_measure(functools.partial(ours, kind=kind, chunk_elements=chunk), inputs)
                    row = {key: row[key] for key in ("ms", "peak_mib", "error") if key in row}
                    emit(
                        "chunk sizes of soft_target_loss",
                        tokens=tokens,
                        vocab=vocab,
                        target=kind,
                        chunk_elements=chunk,
                        **row,
                    )
                del inputs


if __name__ == "__main__":
    main()
