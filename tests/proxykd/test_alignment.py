import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from tests.processes import Moment, killed_at, on_processes, train
from trl_bbkd.errors import TeacherDataError
from trl_bbkd.host.model_files import load_model
from trl_bbkd.preference.sampling import read_samples
from trl_bbkd.proxykd.alignment_trainer import ProxyAlignmentTrainer

from .helpers import LORA, assert_same_weights, make_aligner, make_rows, weights
from .on_processes import aligned


def reference_weights(trainer):
    """Those of the reference, under the names of the proxy's."""
    if trainer.ref_model is not None:
        return weights(trainer.accelerator.unwrap_model(trainer.ref_model))
    parameters = trainer._unwrapped().named_parameters()
    return {name.replace(".ref.", ".default."): value.clone() for name, value in parameters if ".ref." in name}


def proxy_weights(trainer):
    if trainer.ref_model is not None:
        return weights(trainer._unwrapped())
    return {name: value.clone() for name, value in trainer._unwrapped().named_parameters() if ".default." in name}


class RecordingTrainer(ProxyAlignmentTrainer):
    """Keeps the reference at the start and at the end of each round, and the proxy when it ended."""

    def _begin_round(self, number):
        self.__dict__.setdefault("records", {})[number] = {"before": proxy_weights(self)}
        super()._begin_round(number)
        self.records[number]["reference at start"] = reference_weights(self)

    def _finish_round(self, number, *args):
        if number:
            self.records[number] |= {"reference at end": reference_weights(self), "after": proxy_weights(self)}
        super()._finish_round(number, *args)


@pytest.fixture(params=["full", "lora"])
def trainer_kwargs(request):
    return {} if request.param == "full" else {"peft_config": LoraConfig(**LORA)}


def test_the_reference_of_a_round_is_the_proxy_at_the_end_of_the_round_before(
    tmp_path, other_model_dir, trainer_kwargs
):
    trainer = make_aligner(
        tmp_path, other_model_dir, trainer_class=RecordingTrainer, trainer_kwargs=trainer_kwargs, num_rounds=3
    )
    start = proxy_weights(trainer)
    trainer.train()
    assert sorted(trainer.records) == [1, 2, 3]
    for number, record in trainer.records.items():
        expected = start if number == 1 else trainer.records[number - 1]["after"]
        assert_same_weights(record["reference at start"], expected)
        assert_same_weights(record["reference at end"], expected)
        moved = [name for name, value in record["after"].items() if not torch.equal(value, record["before"][name])]
        assert moved, "the proxy was not trained"


def test_each_round_starts_at_log_2_and_margin_0(tmp_path, other_model_dir, trainer_kwargs):
    trainer = make_aligner(
        tmp_path,
        other_model_dir,
        trainer_kwargs=trainer_kwargs,
        sft_weight=0.0,
        num_train_epochs=4.0,
        learning_rate=5e-3,
    )
    trainer.train()
    losses = [line for line in trainer.log_history if "loss" in line]
    for number in (1, 2):
        first = next(line for line in losses if line["round"] == number)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["rewards/margins"] == pytest.approx(
            0, abs=1e-6
        )
        last = [line for line in losses if line["round"] == number][-1]
        assert last["rewards/margins"] > 1e-3
    assert [line["step"] for line in losses] == list(range(1, len(losses) + 1))


def test_a_proxy_in_memory_is_its_own_reference(tmp_path, other_model_dir):
    """TRL reads a reference from disk, whatever the weights in memory."""
    model = AutoModelForCausalLM.from_pretrained(other_model_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    scaled = weights(model)
    trainer = make_aligner(tmp_path, model, trainer_class=RecordingTrainer, num_rounds=1)
    trainer.train()
    assert_same_weights(trainer.records[1]["reference at start"], scaled)


def test_pairs_are_the_teachers_answer_over_the_proxys_sample(tmp_path, other_model_dir):
    rows = make_rows(20)
    trainer = make_aligner(tmp_path, other_model_dir, rows=rows)
    trainer.train()
    tokenizer = trainer.processing_class
    samples = [line for path in sorted((tmp_path / "round-2/samples").iterdir()) for line in read_samples(path)]
    assert [line["prompt"] for line in samples] == [row["prompt"] for row in rows[12:]]  # the second shard
    for pair, line, row in zip(trainer.train_dataset, samples, rows[12:], strict=True):
        assert tokenizer.decode(pair["chosen_ids"], skip_special_tokens=True) == row["completion"] == line["teacher"]
        assert pair["rejected_ids"] == line["proxy_ids"] and len(line["proxy_ids"]) <= 16
        assert tokenizer.decode(pair["prompt_ids"]) == row["prompt"]


def test_agreement_is_measured_before_and_after_every_round(tmp_path, other_model_dir):
    trainer = make_aligner(tmp_path, other_model_dir, num_train_epochs=4.0, learning_rate=3e-3)
    trainer.train()
    saved = json.loads((tmp_path / "alignment.json").read_text())["rounds"]
    assert [entry["round"] for entry in saved] == [0, 1, 2] and saved == trainer.rounds
    assert saved[2]["nll"] < saved[1]["nll"] < saved[0]["nll"]

    # Slowly: one row at a time, all logits
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), trainer.processing_class
    nll = correct = count = 0
    for row in make_rows(20)[:4]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = (tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id])[:16]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        labels = torch.tensor(answer)
        nll -= logits.log_softmax(-1).gather(1, labels[:, None]).sum().item()
        correct += (logits.argmax(-1) == labels).sum().item()
        count += len(answer)
    assert saved[2]["nll"] == pytest.approx(nll / count, rel=1e-5)
    assert saved[2]["top1_agreement"] == pytest.approx(correct / count)


def test_what_is_left_on_disk(tmp_path, other_model_dir, trainer_kwargs):
    trainer = make_aligner(
        tmp_path, other_model_dir, trainer_kwargs=trainer_kwargs, save_strategy="steps", save_steps=1
    )
    trainer.train()
    proxy = load_model(str(tmp_path))
    assert isinstance(proxy, PeftModel) == bool(trainer_kwargs)
    final = proxy_weights(trainer)
    found = {name: value for name, value in weights(proxy).items() if name in final}
    assert_same_weights(found, {name: final[name] for name in found})
    assert len(found) == len(final)
    assert not (tmp_path / "round-1/proxy").exists() and (tmp_path / "round-2/proxy").is_dir()
    assert not list(tmp_path.glob("round-*/checkpoint-*")) and not (tmp_path / "ref").exists()


def test_patience_keeps_the_best_proxy_and_stops(tmp_path, other_model_dir, monkeypatch):
    agreement = iter([0.2, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(
        ProxyAlignmentTrainer, "_measure", lambda self: {"top1_agreement": next(agreement), "nll": 1.0}
    )
    trainer = make_aligner(
        tmp_path, other_model_dir, trainer_class=RecordingTrainer, num_rounds=4, alignment_patience=2
    )
    trainer.train()
    assert [entry["round"] for entry in trainer.rounds] == [0, 1, 2, 3] and trainer.best_round == 1
    assert_same_weights(weights(AutoModelForCausalLM.from_pretrained(tmp_path)), trainer.records[1]["after"])


def killed_settings(lora, save_steps):
    return {
        "trainer_kwargs": {"peft_config": LoraConfig(**LORA) if lora else None},
        "sample_batch_size": 1,
        "num_train_epochs": 2.0,
        "save_strategy": "steps",
        "save_steps": save_steps,
    }


def is_in_round_2(trainer, *args, **kwargs):
    return len(trainer.rounds) == 2


@pytest.mark.parametrize("in_memory", [True, False])
def test_back_to_the_proxy_that_was_handed_in(tmp_path, other_model_dir, monkeypatch, in_memory, trainer_kwargs):
    """No round is better than none. It is the proxy as it was, not what lies on disk under its name."""
    agreement = iter([0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr(
        ProxyAlignmentTrainer, "_measure", lambda self: {"top1_agreement": next(agreement), "nll": 1.0}
    )
    proxy = (
        AutoModelForCausalLM.from_pretrained(other_model_dir, dtype=torch.float32) if in_memory else other_model_dir
    )
    if in_memory:
        with torch.no_grad():
            proxy.get_input_embeddings().weight.mul_(0.5)
    config = {"trainer_kwargs": trainer_kwargs, "num_rounds": 3, "alignment_patience": 1}
    trainer = make_aligner(tmp_path, proxy, **config)
    start = proxy_weights(trainer)
    trainer.train()
    assert trainer.best_round == 0 and len(trainer.rounds) == 2
    assert_same_weights(proxy_weights(trainer), start)
    if not in_memory:
        saved = weights(load_model(str(tmp_path)))
        assert all(torch.equal(saved[name], value) for name, value in start.items())


@pytest.mark.parametrize(("lora", "save_steps"), [(False, 1), (True, 2)], ids=["full", "lora"])
def test_killed_inside_a_round_it_ends_as_if_it_had_not_been(tmp_path, other_model_dir, lora, save_steps):
    """SIGKILL in the second round; the same call then goes on."""
    make_aligner(tmp_path / "whole", other_model_dir, **killed_settings(lora, save_steps)).train()
    third_step_of_round_2 = Moment(
        "trl_bbkd.proxykd.alignment_trainer.ProxyAlignmentTrainer.training_step", call=3, counts=is_in_round_2
    )
    arguments = (make_aligner, tmp_path / "killed", other_model_dir)
    killed_at(third_step_of_round_2, train, *arguments, **killed_settings(lora, save_steps))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("round-*/samples/*")}
    assert stamps and not (tmp_path / "killed/round-2/round.json").exists()
    resumed = make_aligner(tmp_path / "killed", other_model_dir, **killed_settings(lora, save_steps))
    resumed.train()
    assert resumed._initial_global_step > 0, "the round was begun again"
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "samples were made twice"


def test_killed_while_sampling_it_makes_the_same_samples(tmp_path, other_model_dir):
    make_aligner(tmp_path / "whole", other_model_dir, **killed_settings(False, 1)).train()
    second_file = Moment("trl_bbkd.preference.sampling._write", call=2)
    arguments = (make_aligner, tmp_path / "killed", other_model_dir)
    killed_at(second_file, train, *arguments, **killed_settings(False, 1))
    kept = sorted((tmp_path / "killed/round-1/samples").iterdir())
    stamp = kept[0].stat().st_mtime_ns
    assert len(kept) == 1 and len(list((tmp_path / "whole/round-1/samples").iterdir())) == 2
    make_aligner(tmp_path / "killed", other_model_dir, **killed_settings(False, 1)).train()
    assert kept[0].stat().st_mtime_ns == stamp
    for path in (tmp_path / "whole").glob("round-*/samples/*"):
        assert (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_a_finished_alignment_is_not_run_again(tmp_path, other_model_dir):
    make_aligner(tmp_path, other_model_dir).train()
    saved = (tmp_path / "model.safetensors").read_bytes()
    again = make_aligner(tmp_path, other_model_dir)
    again._sample = None  # would be called
    again.train()
    assert (tmp_path / "model.safetensors").read_bytes() == saved


class TestRefused:
    def test_another_run(self, tmp_path, other_model_dir, tiny_model_dir):
        make_aligner(tmp_path, other_model_dir).train()
        with pytest.raises(ValueError, match=r"holds another alignment \(beta: 0.1 there, 0.5 here\)"):
            make_aligner(tmp_path, other_model_dir, beta=0.5).train()
        with pytest.raises(ValueError, match=r"holds another alignment \(proxy: "):
            make_aligner(tmp_path, tiny_model_dir).train()
        with pytest.raises(ValueError, match=r"holds another alignment \(rows: "):
            make_aligner(tmp_path, other_model_dir, rows=make_rows(19)).train()

    def test_an_empty_shard(self, tmp_path, other_model_dir):
        with pytest.raises(TeacherDataError, match="Round 17 of 20 has an empty shard: there are only 16 rows"):
            make_aligner(tmp_path, other_model_dir, num_rounds=20)

    def test_patience_without_held_out_rows(self, tmp_path, other_model_dir):
        with pytest.raises(ValueError, match="alignment_patience needs eval_dataset"):
            make_aligner(tmp_path, other_model_dir, held_out=0, alignment_patience=1)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
            ({"preference_weight": -1.0}, "preference_weight must be at least 0, got -1.0"),
            ({"preference_weight": 0.0, "sft_weight": 0.0}, "both 0: there is no loss"),
            ({"sample_temperature": 0.0}, "sample_temperature must be positive, got 0.0"),
            ({"sample_top_p": 1.5}, r"sample_top_p must lie in \(0, 1\], got 1.5"),
            ({"alignment_patience": 0}, "alignment_patience must be at least 1"),
            ({"sync_ref_model": True}, "sync_ref_model=True is not possible here"),
            ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True is not possible here"),
            ({"eval_strategy": "steps"}, "eval_strategy.*is not possible here"),
        ],
    )
    def test_settings(self, tmp_path, other_model_dir, config, message):
        with pytest.raises(ValueError, match=message):
            make_aligner(tmp_path, other_model_dir, **config)


def test_two_processes_align_alike(tmp_path, other_model_dir):
    ranks = on_processes(2, aligned, other_model_dir, tmp_path / "two", 2)
    (one,) = on_processes(1, aligned, other_model_dir, tmp_path / "one", 4)
    assert_same_weights(ranks[0]["proxy"], ranks[1]["proxy"])
    assert ranks[0]["samples"] == ranks[1]["samples"] == one["samples"]
    assert ranks[0]["rounds"] == ranks[1]["rounds"]
    for found, expected in zip(ranks[0]["rounds"], one["rounds"], strict=True):
        # TRL's NLL is a mean over the tokens of a micro-batch, so that two halves of a batch weigh alike
        assert found == pytest.approx(expected, abs=1e-2)


def test_conversational_rows_and_log_completions(tmp_path, other_model_dir, conversational_rows, capsys):
    rows = [dict(row) for row in conversational_rows[:8]]
    trainer = make_aligner(
        tmp_path, other_model_dir, rows=rows, held_out=2, log_completions=True, num_completions_to_print=2
    )
    trainer.train()
    assert "teacher" in capsys.readouterr().out
    pair = trainer.train_dataset[0]
    assert trainer.processing_class.decode(pair["prompt_ids"]).endswith("<|im_start|>assistant\n")


def test_vllm_gets_the_proxy_on_disk_and_the_settings(tmp_path, other_model_dir, monkeypatch):
    """vLLM is not there: a module in its place takes down what it is asked for."""
    import sys
    import types
    from importlib.machinery import ModuleSpec

    asked = []

    class LLM:
        def __init__(self, model, enable_lora, **kwargs):
            saved = weights(AutoModelForCausalLM.from_pretrained(model))
            asked.append({"weights": saved, "enable_lora": enable_lora, **kwargs})

        def generate(self, inputs, parameters, use_tqdm):
            asked[-1] |= {"prompts": [item["prompt_token_ids"] for item in inputs], "parameters": parameters}
            output = types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=(5, 6))])
            return [output] * len(inputs)

    fake = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **kwargs: kwargs, __spec__=ModuleSpec("vllm", None))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    trainer = make_aligner(
        tmp_path,
        other_model_dir,
        trainer_class=RecordingTrainer,
        use_vllm=True,
        vllm_kwargs={"gpu_memory_utilization": 0.4},
        sample_temperature=0.7,
        sample_top_p=0.9,
        num_rounds=1,
    )
    trainer.train()
    (call,) = asked
    assert_same_weights(call["weights"], trainer.records[1]["before"])
    assert call["gpu_memory_utilization"] == 0.4 and call["enable_lora"] is False
    assert call["parameters"][0]["temperature"] == 0.7 and call["parameters"][0]["top_p"] == 0.9
    assert call["parameters"][0]["max_tokens"] == 16 and call["parameters"][0]["seed"] != call["parameters"][1]["seed"]
    assert trainer.train_dataset["rejected_ids"][:] == [[5, 6]] * 16
    assert not (tmp_path / "round-1/sampler").exists()


def test_trl_arguments_pass_through(tmp_path, other_model_dir):
    trainer = make_aligner(
        tmp_path, other_model_dir, beta=0.3, max_steps=1, gradient_accumulation_steps=2, optim="sgd"
    )
    trainer.train()
    assert trainer.beta == 0.3 and trainer.state.max_steps == 1
