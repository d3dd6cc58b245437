"""DeepSpeed on a CPU: what its processes talk through is compiled before there are several."""

import os
from pathlib import Path

import pytest

from tests.processes import on_processes


def build_extension() -> None:
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


@pytest.fixture(scope="module")
def deepspeed_on_cpus(tmp_path_factory):
    """
    The environment of processes under DeepSpeed, with a folder of extensions that no other worker builds in.

    Processes that find none build at once, and wait for the lock of one that was killed.
    """
    pytest.importorskip("deepspeed")
    given = os.environ.get("TORCH_EXTENSIONS_DIR") or tmp_path_factory.getbasetemp() / "extensions"
    folder = Path(given, os.environ.get("PYTEST_XDIST_WORKER", ""))
    folder.mkdir(parents=True, exist_ok=True)
    for lock in folder.rglob("lock"):
        lock.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setenv("DS_ACCELERATOR", "cpu")
        on_processes(1, build_extension)
        yield
