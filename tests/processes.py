"""Scripts on one process, or with torchrun on several."""

import os
import socket
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_processes(num_processes, script, *arguments, check=True, timeout=600):
    """Run a script, given by its path in the repository."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
        launcher += ["--master_port", str(free_port())]
    process = subprocess.run(
        [*launcher, str(ROOT / script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert not check or process.returncode == 0, process.stderr[-3000:]
    return process
