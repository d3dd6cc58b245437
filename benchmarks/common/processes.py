"""Measuring in a process of its own, whose peak memory is nobody else's. Imports no torch: a child inherits its parent's peak."""

import json
import resource
import subprocess
import sys


def peak_bytes(device: str = "cpu") -> int:
    """Most memory so far: resident on a CPU, allocated on a GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_again(*arguments: str) -> subprocess.CompletedProcess:
    """This script, with other arguments."""
    return subprocess.run([sys.executable, sys.argv[0], *arguments], stdout=subprocess.PIPE, text=True)


def printed_json(process: subprocess.CompletedProcess) -> dict:
    """Its last line."""
    process.check_returncode()
    return json.loads(process.stdout.splitlines()[-1])
