"""Small guards of the alignment, each of which something here notices the loss of."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.sharding.runs import FSDP2
from trl_bbkd.errors import StageError
from trl_bbkd.host.model_files import load_model
from trl_bbkd.preference.sampling import read_samples
from trl_bbkd.proxykd.alignment_trainer import ProxyAlignmentTrainer

from .helpers import LORA, assert_same_weights, make_aligner, make_rows, weights
from .test_alignment import RecordingTrainer, proxy_weights


DORA = {**LORA, "use_dora": True}


class StoppedBeforeRound2(ProxyAlignmentTrainer):
    def training_step(self, *args, **kwargs):
        if len(self.rounds) == 2 and self.state.global_step == 0:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


def test_stopped_before_the_first_step_of_a_round_it_ends_as_if_it_had_not_been(tmp_path, other_model_dir):
    """Adam's moments, and the schedule, begin anew with every round: the one before leaves nothing but the proxy."""
    config = {"learning_rate": 5e-3, "lr_scheduler_type": "linear"}
    whole = make_aligner(tmp_path / "whole", other_model_dir, **config)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_aligner(tmp_path / "stopped", other_model_dir, trainer_class=StoppedBeforeRound2, **config).train()
    resumed = make_aligner(tmp_path / "stopped", other_model_dir, **config)
    resumed.train()
    assert [entry["round"] for entry in resumed.rounds] == [0, 1, 2]
    assert_same_weights(weights(resumed.model), weights(whole.model))
    steps = {int(state["step"]) for state in whole.optimizer.optimizer.state.values()}
    assert steps == {whole.state.max_steps} == {2}


def test_a_resumed_adapter_keeps_its_precision(tmp_path, other_model_dir):
    """PEFT loads an adapter in float32."""

    def aligner(**kwargs):
        proxy = AutoModelForCausalLM.from_pretrained(other_model_dir, dtype=torch.float32)
        proxy = get_peft_model(proxy, LoraConfig(**LORA))
        generator = torch.Generator().manual_seed(0)
        for parameter in proxy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16).normal_(0, 0.02, generator=generator)
        return make_aligner(tmp_path, proxy, save_strategy="steps", save_steps=1, num_rounds=1, max_steps=3, **kwargs)

    class Stopped(ProxyAlignmentTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        aligner(trainer_class=Stopped).train()
    resumed = aligner()
    resumed.train()
    assert resumed._initial_global_step == 2
    assert {p.dtype for p in resumed.model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_no_two_files_of_samples_have_one_seed(tmp_path, other_model_dir, monkeypatch):
    """Else the rows of one file would get, at their places, the random numbers of another's: over files and rounds."""
    seeds = []

    class Sampler:
        def __init__(self, *args, **kwargs):
            pass

        def __call__(self, prompts, seed):
            seeds.append(seed)
            return [[7, 8]] * len(prompts), ["x"] * len(prompts)

    monkeypatch.setattr("trl_bbkd.preference.trainer.ModelSampler", Sampler)
    for number, seed in enumerate((42, 43)):
        make_aligner(tmp_path / str(number), other_model_dir, sample_batch_size=1, seed=seed).train()
    assert len(seeds) == len(set(seeds)) == 8  # two runs of two rounds with two files each


def test_samples_of_one_prompt_in_two_files_differ(tmp_path, other_model_dir):
    rows = [row | {"prompt": "Say"} for row in make_rows(20)]
    make_aligner(tmp_path, other_model_dir, rows=rows, sample_batch_size=1, num_rounds=1).train()
    files = sorted((tmp_path / "round-1/samples").iterdir())
    texts = [[line["proxy_ids"] for line in read_samples(path)] for path in files]
    assert len(texts) == 4 and all(texts[0] != other for other in texts[1:])


def test_dora_is_aligned_saved_and_the_reference(tmp_path, other_model_dir):
    config = {"learning_rate": 1e-2, "trainer_kwargs": {"peft_config": LoraConfig(**DORA)}}
    trainer = make_aligner(tmp_path, other_model_dir, trainer_class=RecordingTrainer, **config)
    start = proxy_weights(trainer)
    magnitudes = [name for name in start if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 14
    trainer.train()
    for number, record in trainer.records.items():
        expected = start if number == 1 else trainer.records[number - 1]["after"]
        assert_same_weights(record["reference at start"], expected)
        assert_same_weights(record["reference at end"], expected)
        assert any(not torch.equal(record["after"][name], record["before"][name]) for name in magnitudes)
    losses = [line for line in trainer.log_history if "loss" in line]
    for number in (1, 2):
        first, last = [line for line in losses if line["round"] == number]
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-6) and last["rewards/margins"] > 1e-3

    saved = load_model(str(tmp_path))
    final = proxy_weights(trainer)
    assert_same_weights({name: value for name, value in weights(saved).items() if name in final}, final)
    again = make_aligner(tmp_path, other_model_dir, **config)
    again._sample = None  # would be called
    again.train()
    assert_same_weights(proxy_weights(again), final)
    with pytest.raises(StageError, match="holds another alignment .*adapter: "):
        config["trainer_kwargs"] = {"peft_config": LoraConfig(**LORA)}
        make_aligner(tmp_path, other_model_dir, **config).train()


def test_sharded_it_takes_no_proxy_in_memory_and_measures_none_that_is_not_on_disk(
    tmp_path, other_model_dir, monkeypatch
):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="a model in memory may be in parts.*Hand in the proxy's path"):
        make_aligner(tmp_path, AutoModelForCausalLM.from_pretrained(other_model_dir))
    with pytest.raises(ValueError, match="Call `train` first"):
        make_aligner(tmp_path, other_model_dir).evaluate()


@pytest.mark.parametrize(
    "dtype", [None, torch.float32, torch.bfloat16], ids=["full", "adapter", "adapter in bfloat16"]
)
def test_made_anew_for_each_round_it_ends_as_in_memory(tmp_path, other_model_dir, monkeypatch, dtype):
    """As where it is sharded, on one process."""

    def align(folder):
        proxy = other_model_dir
        if dtype is not None:
            proxy = get_peft_model(
                AutoModelForCausalLM.from_pretrained(proxy, dtype=torch.float32), LoraConfig(**LORA)
            )
            generator = torch.Generator().manual_seed(0)
            for parameter in proxy.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype).normal_(0, 0.02, generator=generator)
        trainer = make_aligner(tmp_path / folder, proxy, num_rounds=3)
        trainer.train()
        return trainer

    kept = align("kept")
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    anew = align("anew")
    assert_same_weights(proxy_weights(anew), proxy_weights(kept))
    assert {p.dtype for p in anew.model.parameters() if p.requires_grad} == {dtype or torch.float32}
    metrics = [[{**entry, "seconds": 0} for entry in trainer.rounds] for trainer in (kept, anew)]
    assert metrics[0] == metrics[1]
    assert [line["loss"] for line in anew.log_history if "loss" in line] == [
        line["loss"] for line in kept.log_history if "loss" in line
    ]
