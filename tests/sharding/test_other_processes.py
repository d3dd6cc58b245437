"""Runs that go on with another number of processes, or another division of a step's rows, end as if they had begun with it."""

import pytest
import torch
from accelerate.utils import is_torch_version
from datasets import Dataset

from tests.gad.helpers import FixedSamplesTrainer, make_config
from tests.llkd.helpers import build_encoder, save_student
from tests.llkd.helpers import make_trainer as make_llkd_trainer
from tests.processes import on_processes
from tests.sharding import test_gad as gad_tests
from tests.sharding import test_llkd, test_soft_targets
from tests.sharding.runs import ROWS, bayeskd, gad, llkd, proxykd
from trl_bbkd.host.sharding import AVERAGES_ON_CPUS


needs_averages = pytest.mark.skipif(
    is_torch_version("<", AVERAGES_ON_CPUS), reason="this torch does not average gradients on CPU processes"
)
# Engine, processes before, and after
CHANGES = [
    pytest.param("single", 2, 1, id="DDP, 2 to 1", marks=pytest.mark.slow),
    pytest.param("single", 1, 4, id="DDP, 1 to 4", marks=pytest.mark.slow),
    pytest.param("fsdp2", 2, 4, id="FSDP2, 2 to 4", marks=[needs_averages, pytest.mark.slow]),
    pytest.param("fsdp2", 4, 2, id="FSDP2, 4 to 2", marks=[needs_averages, pytest.mark.slow]),
]


@pytest.fixture(scope="module")
def alone(tiny_model_dir, tmp_path_factory):
    (found,) = on_processes(1, gad, "single", tiny_model_dir, tmp_path_factory.mktemp("alone"))
    return found


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize(("engine", "before", "after"), CHANGES)
def test_gad(engine, before, after, step, alone, tiny_model_dir, tmp_path):
    """From the warm-up's last step, and from the first that has a reference. Each step is saved, also those of D alone."""
    on_processes(before, gad, engine, tiny_model_dir, tmp_path, save_steps=1)
    resume = str(tmp_path / f"checkpoint-{step}")
    found, *_ = on_processes(after, gad, engine, tiny_model_dir, tmp_path, resume=resume, save_steps=100)
    gad_tests.assert_same_run(alone, found)
    share = 1.0 if engine == "single" else 1 / after
    assert found["shares"]["discriminator"] == pytest.approx(share, abs=0.02)


def llkd_run(engine, folder, student, proxy, **config):
    return llkd(engine, save_student(folder / "student", build_encoder()), folder, **config)


def proxykd_run(engine, folder, student, proxy, **config):
    return proxykd(engine, student, proxy, folder, **config)


def bayeskd_run(engine, folder, student, proxy, **config):
    return bayeskd(engine, student, proxy, folder, **config)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "before", "after"), CHANGES)
@pytest.mark.parametrize(
    ("run", "assert_same_run"),
    [
        (llkd_run, test_llkd.assert_same_run),
        (proxykd_run, test_soft_targets.assert_same_run),
        (bayeskd_run, test_soft_targets.assert_same_run),
    ],
    ids=["LLKD", "Proxy-KD", "Bayes-KD"],
)
def test_others(run, assert_same_run, engine, before, after, tiny_model_dir, other_model_dir, tmp_path):
    models = (tiny_model_dir, other_model_dir)
    (alone,) = on_processes(1, run, "single", tmp_path / "alone", *models)
    on_processes(before, run, engine, tmp_path, *models)
    found, *_ = on_processes(after, run, engine, tmp_path, *models, resume=str(tmp_path / "checkpoint-3"))
    assert_same_run(alone, found)
    assert found["shares"]["student"] == pytest.approx(1.0 if engine == "single" else 1 / after, abs=0.03)


def make_gad(output_dir, model, rows=ROWS, **config):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, **config}
    return FixedSamplesTrainer(
        model=model, args=make_config(output_dir, **settings), train_dataset=Dataset.from_list(rows)
    )


def replayed(output_dir, model, resume=None, **config):
    """Of a run of GAD on this process, the pairs that it began with and its number of steps."""
    trainer = make_gad(output_dir, model, discriminator_replay_size=24, **config)
    began = []
    load = trainer._load_optimizer_and_scheduler
    trainer._load_optimizer_and_scheduler = lambda checkpoint: (
        load(checkpoint),
        began.extend(trainer.discriminator_trainer.replay.pairs),
    )
    trainer.train(resume)
    return {"began": began, "ended": trainer.discriminator_trainer.replay.pairs, "steps": trainer.state.global_step}


def test_replayed_pairs_are_dealt_out(tiny_model_dir, tmp_path):
    batches = {"per_device_train_batch_size": 4, "num_generations": 4}
    two = on_processes(2, replayed, tmp_path, tiny_model_dir, **batches, max_steps=2)
    pairs = [pair for process in two for pair in process["ended"]]
    assert len(pairs) == 16
    (one,) = on_processes(
        1,
        replayed,
        tmp_path,
        tiny_model_dir,
        resume=str(tmp_path / "checkpoint-2"),
        **batches | {"per_device_train_batch_size": 8},
    )
    assert sorted(one["began"]) == sorted(pairs) and one["steps"] == 4


def test_a_step_divided_into_other_micro_batches(tiny_model_dir, tmp_path):
    """On the same processes: memory was short, or is not any more."""
    straight = make_gad(tmp_path, tiny_model_dir, beta=0.1, adam_epsilon=1e-3)
    straight.train()
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    resumed = make_gad(tmp_path, tiny_model_dir, beta=0.1, adam_epsilon=1e-3, **smaller)
    resumed.train(str(tmp_path / "checkpoint-2"))
    for (name, expected), found in zip(
        straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(
            found, expected, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


HALVES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            {"steps_per_generation": 2},
            HALVES | {"steps_per_generation": 4},
            r"checkpoint-1 lies amid a generation batch.*steps_per_generation=2\), or from a checkpoint at whose step",
        ),
        (
            {},
            {"per_device_train_batch_size": 4},
            "belongs to another run.*per_device_train_batch_size: 8 there, 4 here",
        ),
    ],
    ids=["amid a generation batch", "another batch"],
)
def test_what_cannot_be_divided_anew(before, after, message, tiny_model_dir, tmp_path):
    make_gad(tmp_path, tiny_model_dir, **before).train()
    with pytest.raises(ValueError, match=message):
        make_gad(tmp_path, tiny_model_dir, **after).train(str(tmp_path / "checkpoint-1"))


def test_rows_that_are_ordered_by_the_batch_of_a_process(tmp_path):
    config = {"train_sampling_strategy": "group_by_length", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_llkd_trainer(tmp_path, **config).train()
    other = make_llkd_trainer(tmp_path, **config, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    with pytest.raises(
        ValueError, match="cannot go on with.*steps=2: train_sampling_strategy='group_by_length' orders"
    ):
        other.train(str(tmp_path / "checkpoint-1"))


def test_another_number_of_processes_and_another_batch(tiny_model_dir, tmp_path):
    make_gad(tmp_path, tiny_model_dir).train()
    state = tmp_path / "checkpoint-1" / "gad_state.json"
    state.write_text(state.read_text().replace('"num_processes": 1', '"num_processes": 3'))
    with pytest.raises(
        ValueError, match="num_processes: 3 there, 1 here.*keep per_device_train_batch_size × processes"
    ):
        make_gad(tmp_path, tiny_model_dir).train(str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["optimizer.bin"],
            r"written under FSDP \(FULL_STATE_DICT\), and DDP cannot read its optimizer's state. Resume under FSDP",
        ),
        (["optimizer_0/.metadata"], r"written under FSDP \(SHARDED_STATE_DICT\), and DDP cannot read"),
        (["global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "written under DeepSpeed, and DDP cannot read"),
    ],
)
def test_another_engine(files, message, tiny_model_dir, tmp_path):
    """Trainer would go on with an optimizer that has forgotten all."""
    make_gad(tmp_path, tiny_model_dir).train()
    for file in files:
        path = tmp_path / "checkpoint-1" / file
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(ValueError, match=message):
        make_gad(tmp_path, tiny_model_dir).train(str(tmp_path / "checkpoint-1"))


def test_what_is_random_is_drawn_anew(tiny_model_dir, tmp_path, monkeypatch, caplog):
    """Of two processes each has left its own random numbers, and one begins."""
    make_gad(tmp_path, tiny_model_dir).train()
    state = tmp_path / "checkpoint-2" / "gad_state.json"
    divided = {'"num_processes": 1': '"num_processes": 2', '_train_batch_size": 8': '_train_batch_size": 4'}
    text = state.read_text()
    for own, other in divided.items():
        assert own in text
        text = text.replace(own, other)
    state.write_text(text)
    seeds = []
    monkeypatch.setattr("trl_bbkd.host.resume.set_seed", lambda *args, **kwargs: seeds.append((args, kwargs)))
    resumed = make_gad(tmp_path, tiny_model_dir)
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert seeds == [((resumed.args.seed + 2,), {"device_specific": True})]
    assert "was written by 2 processes, and goes on with 1. What is random is drawn anew." in caplog.text
