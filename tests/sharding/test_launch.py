"""Each of `recipes/accelerate_configs`, through `trl-bbkd train` on processes of a CPU, from the command to report and card."""

import json
import os

import pytest
from accelerate.utils import is_torch_version

from tests.code_blocks import code, commands
from tests.processes import free_port, on_processes
from tests.sharding.runs import slow_but
from trl_bbkd.cli import main
from trl_bbkd.host.sharding import AVERAGES_ON_CPUS
from trl_bbkd.runs.shipped import ACCELERATE_CONFIGS, recipes_folder


pytestmark = pytest.mark.skipif(
    is_torch_version("<", AVERAGES_ON_CPUS), reason="this torch does not average gradients on CPU processes"
)
PAGE = "docs/multi_gpu.md"
SMALL = (
    "--mixed_precision no --max_steps 2 --per_device_train_batch_size 8 --discriminator_batch_size 16 --warmup_steps 0 "
    "--eval_prompts 4 --eval_samples 1 --seqkd_baseline false --save_strategy no --disable_tqdm true"
).split()
TWO_PROCESSES = ["--num_processes", "2"]
# Two copies of two parts
FOUR_PROCESSES = ["--num_processes", "4", "--parallelism_config_dp_shard_size", "2"]
CONFIGURATIONS = {
    "ddp": TWO_PROCESSES,
    "fsdp2": TWO_PROCESSES,
    "hsdp": [*FOUR_PROCESSES, "--num_machines", "1"],
    "zero2": TWO_PROCESSES,
    "zero3": TWO_PROCESSES,
}
WRAPPERS = {
    "ddp": ["DistributedDataParallel"],
    "fsdp2": ["a mesh of [2]"],
    "hsdp": ["a mesh of [2, 2]"],
    "zero2": ["DeepSpeedEngine"],
    "zero3": ["DeepSpeedEngine", "partitions"],
}
# What a user's reward sees of the process that it is called in
PROBE = """
import gc, json, os
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

WRAPPERS = ("DistributedDataParallel", "DeepSpeedEngine")

def reward(completions, **kwargs):
    found = set()
    for each in gc.get_objects():
        kind = type(each)
        if kind.__name__ in WRAPPERS:
            found.add(kind.__name__)
        if issubclass(kind, DTensor):
            found.add(f"a mesh of {list(each.device_mesh.shape)}")
        if issubclass(kind, torch.nn.Parameter) and "ds_tensor" in vars(each):
            found.add("partitions")
    seen = {"processes": torch.distributed.get_world_size(), "wrappers": sorted(found)}
    Path(__file__).with_name(f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    return [0.0] * len(completions)
"""


def launch(arguments):
    main(["train", str(recipes_folder() / "gad.yaml"), *arguments])


def machine(arguments):
    rank = os.environ["RANK"]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    launch([*arguments, "--machine_rank", rank])


def command(folder, name, arguments):
    (folder / "probe.py").write_text(PROBE)
    output = ["--output_dir", str(folder / "out"), "--reward_funcs", f"{folder / 'probe.py'}:reward"]
    return ["--accelerate_config", name, *arguments, *SMALL, *output]


def assert_trained(folder, name, processes):
    seen = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(processes)]
    assert seen == [{"processes": processes, "wrappers": WRAPPERS[name]}] * processes
    report = json.loads((folder / "out" / "metrics.json").read_text())
    assert set(report["results"]) >= {"undistilled", "GAD"}
    assert (folder / "out" / "README.md").is_file() and (folder / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", slow_but(CONFIGURATIONS, "fsdp2"))
def test_a_recipe_is_trained(name, tmp_path, request):
    if name.startswith("zero"):
        request.getfixturevalue("deepspeed_on_cpus")
    port = ["--main_process_port", str(free_port())]
    on_processes(1, launch, command(tmp_path, name, [*CONFIGURATIONS[name], *port]))
    assert_trained(tmp_path, name, 4 if name == "hsdp" else 2)


@pytest.mark.slow
def test_two_machines(tmp_path):
    """As the page says: each has its own launcher, and they meet at the first one's address."""
    (line,) = (words for text in code(PAGE, "bash") for words in commands(text) if "--machine_rank" in words)
    assert line[:4] == ["trl-bbkd", "train", "my.yaml", "--accelerate_config"]
    here = {"--main_process_ip": "127.0.0.1", "--main_process_port": str(free_port())}
    documented = dict(zip(line[3::2], line[4::2], strict=True)) | here
    name, _ = documented.pop("--accelerate_config"), documented.pop("--machine_rank")
    meeting = [word for option in documented.items() for word in option]
    on_processes(2, machine, command(tmp_path, name, [*FOUR_PROCESSES, *meeting]))
    assert_trained(tmp_path, "hsdp", 4)


def test_each_configuration_is_launched():
    files = (recipes_folder() / ACCELERATE_CONFIGS).glob("*.yaml")
    assert sorted(file.stem for file in files) == sorted(CONFIGURATIONS)
