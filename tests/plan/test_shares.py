"""What each of several processes keeps of a run's models, against the formulas."""

import pytest
import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor

from tests.conftest import build_model
from tests.gad.helpers import FixedSamplesTrainer, make_config
from tests.processes import on_processes
from tests.sharding.runs import GAD_RUN, ROWS, start
from trl_bbkd.plan.footprint import footprint
from trl_bbkd.plan.memory import Setting
from trl_bbkd.plan.models import ModelSizes
from trl_bbkd.runs.held_models import HeldModel, Phase, reference_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Weights, not activations, are what it takes."""
    return build_model(tmp_path_factory.mktemp("wide"), hidden_size=128)


def kept_bytes(model, output_dir, engine):
    """Of each model, the bytes of weights and of its optimizer's state that this process keeps."""
    processes = start(engine)
    torch.manual_seed(0)
    settings = {**GAD_RUN, "per_device_train_batch_size": 16 // processes, "max_steps": 2, "save_strategy": "no"}
    rows = Dataset.from_list(ROWS)
    trainer = FixedSamplesTrainer(model=model, args=make_config(output_dir, **settings), train_dataset=rows)
    trainer.train()
    engine = trainer.discriminator_trainer.engine
    models = {"student": trainer.model, "reference": trainer.ref_model, "discriminator": engine.module}
    found = {(name, "weights"): own_bytes(module.parameters()) for name, module in models.items()}
    for name, optimizer in (("student", trainer.optimizer), ("discriminator", engine.optimizer)):
        states = (value for state in optimizer.state.values() for value in state.values())
        found[name, "optimizer"] = own_bytes(value for value in states if value.dim())
    return found


def own_bytes(tensors) -> int:
    parts = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize(("processes", "engine"), [(1, "single"), (2, "fsdp2"), (4, "fsdp2")])
def test_each_process_keeps_what_the_plan_says(processes, engine, model, tmp_path):
    student = HeldModel("student", model, "model_name_or_path")
    beside = HeldModel("discriminator", model, "discriminator", kind="trunk", has_own_engine=True)
    models = (student, reference_of(student), beside)
    measure = ModelSizes()
    setting = Setting("ddp" if engine == "single" else engine, processes, 2**30, compute_bytes=4)
    planned = footprint(Phase("training", models, 32, 16), {each.name: measure(each) for each in models}, setting).kept
    planned["reference", "weights"] = planned.pop(("reference", "frozen weights"))
    for found in on_processes(processes, kept_bytes, model, tmp_path, engine):
        assert found.keys() == planned.keys()
        for key, value in found.items():
            assert value == pytest.approx(planned[key], rel=0.1), key
