"""
Time and memory of the loss on soft targets, forward and backward, against full logits and against TRL's functions.

    OMP_NUM_THREADS=2 python benchmarks/kd_loss.py

NLL and KL of a proxy's distribution to a student's, from both models' last hidden states, with gradients of the
student's hidden states and output layer. Two groups, each with the ratios to its members:

- the proxy's whole distribution ("dense"): full logits with autograd; TRL's `ChunkedLogProbFunction` and
  `ChunkedDivergenceFunction` (beta=0.0), one after the other; `soft_target_loss`.
- its k most likely tokens ("sparse"): full logits with autograd; `soft_target_loss`; and TRL's `ChunkedLogProbFunction`
  alone, which is the NLL without any KL (TRL has no function of a sparse target).

Every measurement is one pass in a process of its own, and the variants take turns. Peak memory is what the pass adds
to the inputs, less the gradients it leaves (`ru_maxrss`, or `torch.cuda.max_memory_allocated`). Time is the clock's
and, on a CPU, the seconds of all threads as well, which another program running beside changes less. Of the rounds the
medians are printed, and of ratios the median of each round's ratio; a ratio of times is one of seconds of threads on a
CPU.
"""

import argparse
import json
import os
import resource
import statistics
import time

import torch
from common.arguments import parser
from common.device import DEVICE
from common.processes import peak_bytes, printed_json, run_again
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_bbkd.soft_targets.kernel import soft_target_loss
from trl_bbkd.soft_targets.loss import DenseTarget, LMHead, sparse_target


# How SFTTrainer calls it
TRL_VOCAB_CHUNK = 32768
BASELINES = ("full logits", "TRL")


def full_logits(inputs, kind):
    # Float32 for the losses, as models do it that return logits
    log_probs = (inputs["hidden"] @ inputs["weight"].t()).float().log_softmax(-1)
    nll = -log_probs.gather(1, inputs["labels"][:, None]).squeeze(1)
    if kind == "dense":
        with torch.no_grad():
            target = (inputs["proxy_hidden"] @ inputs["proxy_weight"].t()).float().log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_probs, target, log_target=True, reduction="none").sum(-1)
    else:
        target = inputs["sparse"]
        kl = (torch.xlogy(target.probs, target.probs) - target.probs * log_probs.gather(1, target.ids)).sum(-1)
    return (nll + kl).mean()


def trl_functions(inputs, kind):
    hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"]
    log_probs, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, TRL_VOCAB_CHUNK, None, 1.0, ())
    if kind == "sparse":
        return -log_probs.mean()
    kl, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, inputs["proxy_hidden"], inputs["proxy_weight"], None, 0.0
    )
    return (kl - log_probs).mean()


def ours(inputs, kind):
    targets = [
        DenseTarget(inputs["proxy_hidden"], LMHead(inputs["proxy_weight"])) if kind == "dense" else inputs["sparse"]
    ]
    tokens = len(inputs["hidden"])
    factor = torch.full((tokens,), 1.0 / tokens, device=inputs["hidden"].device)
    head = LMHead(inputs["weight"])
    return soft_target_loss(inputs["hidden"], head, inputs["labels"], targets, factor, factor[None]).loss


FUNCTIONS = {"full logits": full_logits, "TRL": trl_functions, "soft_target_loss": ours}
LABELS = {
    ("dense", "TRL"): "TRL: log-prob + divergence",
    ("sparse", "TRL"): "TRL: log-prob only, no KL",
}


def make_inputs(arguments, tokens: int, vocab: int) -> dict:
    dtype = getattr(torch, arguments.dtype)
    options = {"device": arguments.device, "dtype": dtype}
    torch.manual_seed(0)
    # Filled in place, so that nothing larger than what stays was ever allocated; logits of standard deviation 3
    inputs = {
        "hidden": torch.empty(tokens, arguments.hidden, **options).normal_(),
        "weight": torch.empty(vocab, arguments.hidden, **options).normal_(std=3 * arguments.hidden**-0.5),
        "labels": torch.randint(0, vocab, (tokens,), device=arguments.device),
    }
    if arguments.kind == "dense":
        inputs["proxy_hidden"] = torch.empty(tokens, arguments.proxy_hidden, **options).normal_()
        inputs["proxy_weight"] = torch.empty(vocab, arguments.proxy_hidden, **options)
        inputs["proxy_weight"].normal_(std=3 * arguments.proxy_hidden**-0.5)
    else:
        # Different ids within a row, without a permutation of the vocabulary
        ids = torch.randint(0, vocab, (tokens, 1)) + torch.arange(arguments.k) * (vocab // arguments.k)
        log_probs = torch.randn(tokens, arguments.k).log_softmax(-1)
        inputs["sparse"] = sparse_target((ids % vocab).to(arguments.device), log_probs.to(arguments.device))
    for name in ("hidden", "weight"):
        inputs[name].requires_grad_()
    return inputs


def check_baseline(device: str) -> None:
    """`ru_maxrss` tells what a pass adds only if nothing before was larger than what is there now."""
    if device == "cpu" and os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * resource.getpagesize()
        if peak_bytes(device) - resident > 2**25:
            raise RuntimeError(
                f"making the inputs took {(peak_bytes(device) - resident) / 2**20:.0f} MiB more than they keep"
            )


def one_pass(arguments, inputs) -> tuple[float, float, float]:
    started, started_cpu = time.perf_counter(), time.process_time()
    loss = FUNCTIONS[arguments.variant](inputs, arguments.kind)
    loss.backward()
    loss = loss.item()
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    return loss, time.perf_counter() - started, time.process_time() - started_cpu


def measure(arguments) -> dict:
    """What a process of its own does."""
    # Threads and libraries start on a tiny problem
    one_pass(arguments, make_inputs(arguments, tokens=4, vocab=512))
    inputs = make_inputs(arguments, arguments.tokens, arguments.vocab)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    check_baseline(arguments.device)
    before = peak_bytes(arguments.device)
    loss, seconds, cpu_seconds = one_pass(arguments, inputs)
    gradients = sum(inputs[name].grad.nbytes for name in ("hidden", "weight"))
    peak = peak_bytes(arguments.device) - before - gradients
    norms = [inputs[name].grad.norm().item() for name in ("hidden", "weight")]
    work = seconds if arguments.device == "cuda" else cpu_seconds
    return {"seconds": seconds, "work": work, "peak": peak / 2**20, "loss": loss, "norms": norms}


def in_own_process(arguments, kind: str, variant: str) -> dict:
    sizes = [
        f"--{name}={getattr(arguments, name)}"
        for name in ("hidden", "proxy_hidden", "vocab", "tokens", "k", "dtype", "device")
    ]
    return printed_json(run_again("--kind", kind, "--variant", variant, *sizes))


def report(kind: str, rounds: list[dict]) -> None:
    print(
        f"\n| {kind} | s | s of threads | / full logits | / TRL | peak, MiB | / full logits | / TRL | loss | gradients |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for name in FUNCTIONS:
        cells = [LABELS.get((kind, name), name)]
        for value, digits in (("seconds", 2), ("work", 2), ("peak", 0)):
            cells.append(f"{statistics.median(found[name][value] for found in rounds):,.{digits}f}")
            if value != "seconds":
                cells += [
                    f"{statistics.median(found[name][value] / found[baseline][value] for found in rounds):.2f}"
                    for baseline in BASELINES
                ]
        last = rounds[-1][name]
        cells += [f"{last['loss']:.5f}", ", ".join(f"{norm:.5f}" for norm in last["norms"])]
        print("| " + " | ".join(cells) + " |", flush=True)


def parse_args(argv=None):
    found = parser(__doc__)
    found.add_argument("--hidden", type=int, default=896, help="the student's hidden size")
    found.add_argument("--proxy_hidden", type=int, default=1024, help="the proxy's")
    found.add_argument("--vocab", type=int, default=151936)
    found.add_argument("--tokens", type=int, default=1024)
    found.add_argument("--k", type=int, default=10, help="tokens of a sparse target")
    found.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    found.add_argument("--device", default=DEVICE)
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--kind", choices=["dense", "sparse"], help="measure only this group")
    found.add_argument("--variant", choices=list(FUNCTIONS), help=argparse.SUPPRESS)
    return found.parse_args(argv)


def main(argv=None) -> None:
    arguments = parse_args(argv)
    if arguments.variant is not None:
        print(json.dumps(measure(arguments)))
        return
    threads = f", {torch.get_num_threads()} threads" if arguments.device == "cpu" else ""
    print(
        f"{arguments.tokens:,} tokens, vocabulary {arguments.vocab:,}, hidden size {arguments.hidden} (proxy "
        f"{arguments.proxy_hidden}), {arguments.dtype}, {arguments.device}{threads}; {arguments.rounds} rounds"
    )
    for kind in [arguments.kind] if arguments.kind else ["dense", "sparse"]:
        report(
            kind,
            [{name: in_own_process(arguments, kind, name) for name in FUNCTIONS} for _ in range(arguments.rounds)],
        )


if __name__ == "__main__":
    main()
