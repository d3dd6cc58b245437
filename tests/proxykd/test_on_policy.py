import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.processes import Moment, killed_at, on_processes, train
from trl_bbkd import ProxyKDConfig
from trl_bbkd.errors import TeacherDataError
from trl_bbkd.evaluation.student import generate_completion_ids
from trl_bbkd.proxykd.on_policy import OWN_SAMPLES, OnPolicyMixin, prompts_of, sampling_seed
from trl_bbkd.proxykd.trainer import ProxyKDTrainer

from .helpers import LORA, ON_CPU, assert_same_weights, make_kd_trainer, make_rows, weights
from .on_processes import one_step


ON_POLICY = {
    "target_source": "on_policy",
    "stages": ["distil"],
    "sample_weighting": "none",
    "warmup_share": 0.0,
    "alignment_share": 0.0,
}
ENDS = list(range(2, 12))  # the tokenizer's own among them
# Of the likeliest token alone: samples that no seed changes
GREEDY = {"on_policy_top_p": 1e-9}


def make_trainer(output_dir, student, proxy, **config):
    return make_kd_trainer(output_dir, student, proxy, **ON_POLICY | config)


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_model_dir):
    """One whose answers end with any of many tokens, so that they are of different lengths."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("ending") / "student"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ENDS}))
    return str(folder)


@pytest.fixture
def batches(monkeypatch):
    """The batches of teacher rows that were sampled for, each with its samples."""
    found, original = [], OnPolicyMixin.get_batch_samples

    def keep(self, *arguments):
        made, num_items = original(self, *arguments)
        found.extend({**batch, OWN_SAMPLES: dict(batch[OWN_SAMPLES])} for batch in made)
        return made, num_items

    monkeypatch.setattr(OnPolicyMixin, "get_batch_samples", keep)
    return found


def log_probs_of(model, batch):
    """Of all rows' answers, token after token: slowly, row by row, without padding."""
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        found.append((model(ids[None]).logits[0, :-1].log_softmax(-1)[labels[1:] != -100], labels[labels != -100]))
    return found


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradient_is_that_of_the_formula(batches, tmp_path, student, other_model_dir, direction):
    """Means over the tokens of the whole step, of the teacher's answers and of the samples; with equation 9's weights."""
    settings = {"stages": ["cache", "distil"], "sample_weighting": "mean", "kl_direction": direction}
    found = one_step(
        make_trainer,
        student,
        other_model_dir,
        tmp_path,
        2,
        4,
        ("loss", "nll", "kl", "completions/mean_length", "completions/clipped_ratio"),
        hard_weight=0.5,
        kl_weight=3.0,
        max_grad_norm=0.0,
        **settings,
    )
    model, proxy = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (student, other_model_dir)
    )
    nll, weighted, kl, tokens, sampled, lengths, cut = 0.0, 0.0, 0.0, 0, 0, [], 0
    for batch in batches:
        for log_probs, labels in log_probs_of(model, batch):
            nll -= log_probs.gather(1, labels[:, None]).sum()
            tokens += len(labels)
        own, others = (log_probs_of(each, batch[OWN_SAMPLES]) for each in (model, proxy))
        for weight, (log_s, labels), (log_t, _) in zip(batch["sample_weight"], own, others, strict=True):
            log_t = log_t.detach()
            each = {"forward": log_t.exp() * (log_t - log_s), "reverse": log_s.exp() * (log_s - log_t)}[direction]
            weighted, kl, sampled = weighted + weight * each.sum(), kl + each.sum(), sampled + len(labels)
            lengths.append(len(labels))
            cut += int(labels[-1]) not in ENDS
    loss = 0.5 * nll / tokens + 3.0 * weighted / sampled
    loss.backward()
    assert len(batches) == 4 and len(set(lengths)) > 1 and 0 < batches[0]["sample_weight"].std()
    expected = {"loss": loss, "kl": kl / sampled, "completions/mean_length": sampled / 8}
    expected["completions/clipped_ratio"] = cut / 8
    assert 0 < cut < 8
    for name, value in expected.items():
        # A mean over micro-batches is another where they differ in tokens
        assert found["log"][name] == pytest.approx(float(value), rel=1e-4 if name != "kl" else 0.05), name
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found["gradient"][name].double(), parameter.grad, atol=2e-6, rtol=1e-4)


def test_samples_are_the_students_answers_to_the_rows_prompts(batches, tmp_path, tiny_model_dir, other_model_dir):
    trainer = make_trainer(tmp_path, tiny_model_dir, other_model_dir, max_steps=2, learning_rate=0.0, **GREEDY)
    trainer.train()
    batch = batches[0]
    prompts = prompts_of(batch)
    texts = trainer.processing_class.batch_decode(prompts)
    assert set(texts) <= {row["prompt"] for row in make_rows()} and len(set(texts)) == 4
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    expected = generate_completion_ids(
        student, trainer.processing_class, texts, max_new_tokens=16, temperature=0, prompt_ids=prompts
    )
    samples = batch[OWN_SAMPLES]
    for ids, mask, labels, prompt, (answer,) in zip(
        samples["input_ids"], samples["attention_mask"], samples["labels"], prompts, expected, strict=True
    ):
        assert ids[mask.bool()].tolist() == prompt + answer
        assert labels[mask.bool()].tolist() == [-100] * len(prompt) + answer


def test_every_step_has_samples_of_its_own(batches, tmp_path, tiny_model_dir, other_model_dir):
    """Of the same prompts, by the same student: a rate of 0."""
    trainer = make_trainer(tmp_path, tiny_model_dir, other_model_dir, max_steps=16, learning_rate=0.0, held_out=36)
    trainer.train()
    samples = {tuple(sorted(map(tuple, batch[OWN_SAMPLES]["labels"].tolist()))) for batch in batches}
    assert len(samples) == len(batches) == 16
    seeds = {sampling_seed(seed, step, process) for seed in range(5) for step in range(20) for process in range(4)}
    assert len(seeds) == 400


def test_a_proxy_like_the_student_has_nothing_to_say(tmp_path, tiny_model_dir):
    proxy = shutil.copytree(tiny_model_dir, tmp_path / "proxy")
    for direction in ("forward", "reverse"):
        settings = {"hard_weight": 0.0, "kl_direction": direction, "max_steps": 1}
        trainer = make_trainer(tmp_path / direction, tiny_model_dir, str(proxy), **settings)
        trainer.train()
        log = trainer.state.log_history[0]
        assert abs(log["kl"]) < 1e-6 and log["grad_norm"] < 1e-6
        # Without a hard loss the teacher's answers are not read
        assert "nll" not in log and log["completions/entropy"] > 0


def test_batch_shapes_change_nothing(tmp_path, student, other_model_dir):
    step = functools.partial(one_step, make_trainer, student, other_model_dir, logged=("loss", "num_tokens"))
    whole = step(tmp_path / "8", 8, 1)
    for per_device, accumulation in ((4, 2), (1, 8)):
        other = step(tmp_path / str(per_device), per_device, accumulation)
        assert other["log"] == pytest.approx(whole["log"], rel=1e-6)
        for name, gradient in whole["gradient"].items():
            torch.testing.assert_close(other["gradient"][name], gradient, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, student, other_model_dir):
    step = functools.partial(one_step, make_trainer, student, other_model_dir, logged=("loss", "num_tokens"), **GREEDY)
    whole = step(tmp_path / "1", 8, 1)
    ranks = on_processes(2, step, tmp_path / "2", 2, 2)
    assert_same_weights(ranks[0]["student"], ranks[1]["student"])
    assert ranks[0]["log"] == pytest.approx(whole["log"], rel=1e-6)
    for name, gradient in whole["gradient"].items():
        torch.testing.assert_close(ranks[0]["gradient"][name], gradient, atol=1e-6, rtol=0)


def test_a_killed_run_goes_on_with_the_samples_it_would_have_had(tmp_path, tiny_model_dir, other_model_dir):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = make_trainer(tmp_path / "whole", tiny_model_dir, other_model_dir, **settings)
    whole.train()
    # Steps 1 and 2 have samples, and so has step 3, before its backward pass
    moment = Moment("trl_bbkd.proxykd.on_policy.OnPolicyMixin.training_step", call=3)
    killed_at(moment, train, make_trainer, tmp_path / "run", tiny_model_dir, other_model_dir, **settings)
    resumed = make_trainer(tmp_path / "run", tiny_model_dir, other_model_dir, **settings)
    resumed.train()
    assert resumed._initial_global_step == 2
    assert_same_weights(weights(resumed.model), weights(whole.model))
    with pytest.raises(ValueError, match="on_policy_temperature: 1.0 there, 0.5 here"):
        make_trainer(tmp_path / "run", tiny_model_dir, other_model_dir, on_policy_temperature=0.5, **settings).train()


def test_lora(batches, tmp_path, tiny_model_dir, other_model_dir):
    """The student that answers is the one with the adapter."""
    settings = {"max_steps": 3, "learning_rate": 0.5, "hard_weight": 0.0, "held_out": 36, **GREEDY}
    trainer_kwargs = {"peft_config": LoraConfig(**LORA)}
    trainer = make_trainer(tmp_path, tiny_model_dir, other_model_dir, trainer_kwargs=trainer_kwargs, **settings)
    trainer.train()
    assert all(value.abs().sum() > 0 for name, value in weights(trainer.model).items() if "lora_B" in name)
    samples = [{*map(tuple, batch[OWN_SAMPLES]["labels"].tolist())} for batch in (batches[0], batches[-1])]
    assert samples[0] != samples[1]


def test_evaluation_is_on_the_teachers_text(tmp_path, tiny_model_dir, other_model_dir):
    own = make_trainer(tmp_path / "own", tiny_model_dir, other_model_dir, max_steps=1, learning_rate=0.0)
    own.train()
    plain = make_kd_trainer(tmp_path / "plain", tiny_model_dir, None, kl_weight=0.0)
    found, expected = own.evaluate(), plain.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.slow
def test_the_student_learns_the_proxy(tmp_path, tiny_model_dir, other_model_dir):
    for direction in ("forward", "reverse"):
        settings = {"hard_weight": 0.0, "num_train_epochs": 30, "learning_rate": 1e-2, "kl_direction": direction}
        trainer = make_trainer(tmp_path / direction, tiny_model_dir, other_model_dir, **settings)
        trainer.train()
        kl = [line["kl"] for line in trainer.state.log_history if "kl" in line]
        assert kl[-1] < 0.6 * kl[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_source": "onpolicy"}, "target_source must be one of cache, live, on_policy, got 'onpolicy'"),
        ({"target_store": "x"}, "target_store='x' is not possible with target_source='on_policy': samples are new"),
        ({"target_top_k": 5}, "target_top_k=5 is not possible with target_source='on_policy'"),
        ({"target_tail": "bucket"}, "a live proxy's targets are whole"),
        ({"max_length": 64}, "max_length=64 is not possible with target_source='on_policy'"),
        ({"selection": "llkd"}, "selection='llkd' is not possible with target_source='on_policy'"),
        ({"on_policy_temperature": 0.0}, "on_policy_temperature must be positive, got 0.0"),
        ({"on_policy_top_p": 1.5}, r"on_policy_top_p must lie in \(0, 1\], got 1.5"),
        ({"use_vllm": True}, "use_vllm=True is the alignment's"),
        ({"sample_weighting": "mean"}, "computed in the stage 'cache'"),
        ({"target_source": "live", "on_policy_top_p": 0.9}, "on_policy_top_p belongs to target_source='on_policy'"),
        (
            {"target_source": "cache", "stages": ["cache", "distil"], "kl_direction": "reverse"},
            "kl_direction='reverse' needs the proxy's whole distribution",
        ),
        ({"kl_direction": "backward"}, "kl_direction must be one of forward, reverse, got 'backward'"),
    ],
    ids=str,
)
def test_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ProxyKDConfig("unused", use_cpu=True, bf16=False, **ON_POLICY | config)


def test_a_stream_is_refused(tmp_path, tiny_model_dir, other_model_dir):
    stream = Dataset.from_list(make_rows()).to_iterable_dataset()
    with pytest.raises(TeacherDataError, match="not a stream"):
        args = ProxyKDConfig(str(tmp_path), **ON_CPU | ON_POLICY)
        ProxyKDTrainer(tiny_model_dir, other_model_dir, args, train_dataset=stream)
