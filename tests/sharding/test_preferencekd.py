"""PreferenceKD on processes that share the student and its reference ends as on one process."""

import pytest
import torch
from peft import LoraConfig

from tests.preferencekd.helpers import make_trainer
from tests.processes import on_processes
from tests.proxykd.helpers import LORA, make_rows
from tests.sharding.runs import EPSILON, FSDP2, share, start
from trl_bbkd.preferencekd.rounds import kept_table
from trl_bbkd.preferencekd.trainer import PreferenceKDTrainer


VARIANTS = {
    "full": {},
    "LoRA": {"lora": True},
    # TRL's NLL of the preferred answer is a mean over the tokens of a micro-batch
    "of the base": {"judge": "teacher", "samples_from": "base", "sft_weight": 0.0},
    "self": {"judge": "self"},
}


def preferred(engine, model, output_dir, lora=False, stops_in=None, **config) -> dict | None:
    """Warm-up and two rounds, in steps of 8 rows. It stops in the second step of round `stops_in`; the warm-up is round 0."""
    processes = start(engine)
    shares = []

    class MeasuringTrainer(PreferenceKDTrainer):
        def training_step(self, *arguments, **keywords):
            shares.append(share(self.model))
            if len(self.rounds) == stops_in and self.state.global_step == 1:
                raise KeyboardInterrupt
            return super().training_step(*arguments, **keywords)

    settings = {
        "per_device_train_batch_size": 8 // processes,
        "adam_epsilon": EPSILON,
        "learning_rate": 3e-3,
        "warmup_learning_rate": 3e-3,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = make_trainer(
        output_dir,
        model,
        rows=make_rows(36),
        trainer_class=MeasuringTrainer,
        trainer_kwargs={"peft_config": LoraConfig(**LORA) if lora else None},
        **settings | config,
    )
    try:
        trainer.train()
    except KeyboardInterrupt:
        return None
    with trainer._whole() as whole:
        weights = {name: value.detach().cpu() for name, value in whole.state_dict().items() if ".ref." not in name}
    return {
        "weights": weights,
        "shares": shares,
        "candidates": [
            kept_table(output_dir / f"round-{number}/candidates.parquet")["candidates"][:] for number in (1, 2)
        ],
        "nll": [entry["nll"] for entry in trainer.rounds],
    }


@pytest.mark.parametrize("variant", [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS])
@pytest.mark.parametrize("stops_in", [None, 0, 1])
def test_fsdp2_ends_as_one_process(variant, stops_in, other_model_dir, tmp_path):
    config = VARIANTS[variant]
    (alone,) = on_processes(1, preferred, "single", other_model_dir, tmp_path / "one", **config)
    if stops_in is not None:
        stopped = on_processes(2, preferred, "fsdp2", other_model_dir, tmp_path / "two", stops_in=stops_in, **config)
        assert stopped == [None, None]
    found, other = on_processes(2, preferred, "fsdp2", other_model_dir, tmp_path / "two", **config)
    assert found["shares"] == pytest.approx([0.5] * len(found["shares"]), abs=0.02) and found["shares"]
    assert found["candidates"] == other["candidates"] == alone["candidates"]
    assert found["nll"] == pytest.approx(alone["nll"], rel=1e-4)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, atol=1e-5, rtol=1e-4)


def test_a_discriminator_beside_a_sharded_student_is_refused(other_model_dir, tmp_path, monkeypatch):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="judge='discriminator' trains a model beside the student that FSDP"):
        make_trainer(tmp_path, other_model_dir, judge="discriminator")
