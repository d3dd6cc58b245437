"""Settings of Bayes-KD and bad input: one error each, before any model is loaded."""

import math
import shutil

import pytest
from datasets import Dataset
from trl import SFTConfig

from tests.conftest import build_model
from trl_bbkd import BayesKDConfig, BayesKDTrainer
from trl_bbkd.errors import ProxyModelError, TeacherDataError, VocabularyError

from .helpers import ON_CPU, make_rows, make_trainer


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory, tiny_model_dir, other_model_dir):
    """Folders of student and proxy that cannot be loaded: an error about the input has to come before."""
    folder, no_weights = tmp_path_factory.mktemp("config"), shutil.ignore_patterns("*.safetensors")
    pairs = {"student": tiny_model_dir, "proxy": other_model_dir}
    return [str(shutil.copytree(path, folder / name, ignore=no_weights)) for name, path in pairs.items()]


def test_defaults_are_those_of_the_docs():
    args = BayesKDConfig(**ON_CPU)
    assert (args.ngram_context_length, args.ngram_min_count, args.prior_gamma) == (3, 1, 3.0)
    assert (args.posterior_draws, args.posterior_concentration, args.proxy_temperature) == (50, 1.0, 1.0)
    assert (args.posterior_sampling, args.posterior_grid_points, args.proxy_top_k) == ("drawn", None, None)
    assert (args.hard_weight, args.prior_weight, args.posterior_weight) == (1.0, 0.0, 1.0)
    assert args.stages == ["warmup", "estimate", "distil"] and args.max_length is None


@pytest.mark.parametrize(
    ("config", "targets", "needs_proxy"),
    [
        ({}, {"posterior": 1.0}, True),
        ({"prior_weight": 0.5}, {"prior": 0.5, "posterior": 1.0}, True),
        ({"prior_weight": 1.0, "posterior_weight": 0.0}, {"prior": 1.0}, False),
        ({"posterior_weight": 2.0}, {"posterior": 2.0}, True),
        ({"prior_weight": 1.0, "posterior_draws": 0}, {"prior": 1.0, "posterior": 1.0}, False),
        ({"prior_weight": 0.0, "posterior_weight": 0.0}, {}, False),
    ],
    ids=str,
)
def test_what_the_weights_ask_for(config, targets, needs_proxy):
    args = BayesKDConfig(**ON_CPU, **config)
    assert args.target_weights == targets and args.needs_proxy == needs_proxy and args.needs_targets == bool(targets)


def test_stages_are_in_their_order():
    assert BayesKDConfig(**ON_CPU, stages=["distil", "estimate"]).stages == ["estimate", "distil"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ngram_context_length": 0}, "ngram_context_length must be at least 1, got 0"),
        ({"ngram_min_count": 0}, "ngram_min_count must be at least 1, got 0"),
        ({"ngram_memory_limit": 0.0}, "ngram_memory_limit must be positive, got 0.0"),
        ({"prior_gamma": 0.5}, "prior_gamma must be at least 1, got 0.5"),
        ({"prior_weight": -1.0}, "prior_weight must be at least 0, got -1.0"),
        ({"posterior_weight": -1.0}, "posterior_weight must be at least 0, got -1.0"),
        ({"posterior_draws": -1}, "posterior_draws must be at least 0, got -1"),
        ({"posterior_concentration": -0.1}, "posterior_concentration must be at least 0, got -0.1"),
        (
            {"posterior_draws": 0, "posterior_concentration": 0.0},
            "both 0: nothing is left to estimate from. Raise one",
        ),
        ({"posterior_grid_points": 1}, "posterior_grid_points must be at least 2, got 1"),
        (
            {"posterior_grid_points": 100, "posterior_sampling": "expected"},
            "posterior_grid_points goes with posterior_sampling='drawn'",
        ),
        *(
            ({"posterior_grid_points": 100, name: 0}, "needs a prior density and draws .* set posterior_concentration")
            for name in ("posterior_concentration", "posterior_draws")
        ),
        ({"proxy_temperature": 0.0}, "proxy_temperature must be positive, got 0.0"),
        ({"proxy_top_k": 0}, "proxy_top_k must be at least 1, got 0. Leave it out for all tokens"),
        ({"target_top_k": 0}, "target_top_k must be at least 1, got 0"),
        (
            {"hard_weight": 0.0, "prior_weight": 0.0, "posterior_weight": 0.0},
            "hard_weight, prior_weight and posterior_weight are all 0: there is no loss. Set one",
        ),
        ({"stages": ["warmup", "cache"]}, r"stages must be some of warmup, estimate, distil, got .*cache"),
        ({"stages": []}, r"stages must be some of warmup, estimate, distil, got \[\]"),
        ({"stages": ["distil"]}, "stages leaves out 'estimate', so target_store has to name a folder"),
        ({"target_store": "somewhere"}, "takes the place of all stages before 'distil'. Set stages to"),
        (
            {"stages": ["estimate"], "target_store": "x"},
            "target_store='x' is what .* learns from, .* leaves out 'distil'",
        ),
        ({"stages": ["warmup"], "posterior_weight": 0.0}, "'warmup'. has nothing to do"),
        ({"packing": True}, "packing=True is not possible with soft targets"),
        ({"distillation_temperature": 2.0, "target_tail": "bucket"}, "needs target_tail='renormalize'"),
        ({"proxy_lora_kwargs": {"rank": 4}}, "proxy_lora_kwargs: .*rank"),
        ({"proxy_learning_rate": -1.0}, "proxy_learning_rate must be positive, got -1.0. .* leave 'warmup' out"),
        ({"proxy_warmup_epochs": -1.0}, "proxy_warmup_epochs must be positive, got -1.0. .* leave 'warmup' out"),
        ({"proxy_per_device_train_batch_size": 0}, "proxy_per_device_train_batch_size must be at least 1, got 0"),
        ({"proxy_gradient_accumulation_steps": 0}, "proxy_gradient_accumulation_steps must be at least 1, got 0"),
        ({"proxy_lr_scheduler_type": "liner"}, "proxy_lr_scheduler_type must be one of linear, .*, got 'liner'"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
        ({"stages": None}, "stages must be some of warmup, estimate, distil, got None"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(tmp_path, without_weights, config, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, *without_weights, **config)


@pytest.mark.parametrize("config", [{}, {"prior_weight": 1.0, "posterior_weight": 0.0}], ids=str)
def test_distilling_without_an_estimate_and_without_targets(config):
    with pytest.raises(ValueError, match="stages leaves out 'estimate', so target_store has to name a folder"):
        BayesKDConfig(**ON_CPU, stages=["warmup", "distil"], **config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("posterior_sampling", "maybe"),
        ("prior_gamma", math.nan),
        ("posterior_concentration", math.nan),
        ("posterior_concentration", math.inf),
        ("prior_weight", math.nan),
        ("proxy_temperature", math.nan),
        ("posterior_draws", 2.5),
        ("posterior_draws", "5"),
        ("posterior_draws", None),
        ("posterior_draws", True),
        ("prior_gamma", "3"),
        ("ngram_context_length", None),
        ("proxy_top_k", "4"),
    ],
)
def test_values_that_are_no_values(name, value):
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        BayesKDConfig(**ON_CPU, **{name: value})


class TestBadInput:
    def test_no_proxy(self, tmp_path, without_weights):
        with pytest.raises(ProxyModelError, match="Bayes-KD needs a proxy: set `proxy_model` .*posterior_weight=0.0"):
            make_trainer(tmp_path, without_weights[0], None)

    def test_the_student_as_its_own_proxy(self, tmp_path, without_weights):
        with pytest.raises(ProxyModelError, match="The proxy is the student .*Set `proxy_model` to a larger model"):
            make_trainer(tmp_path, without_weights[0], without_weights[0])

    def test_another_tokenizer(self, tmp_path, without_weights):
        proxy = build_model(tmp_path / "proxy", hidden_size=48)
        text = (tmp_path / "proxy/tokenizer.json").read_text()
        (tmp_path / "proxy/tokenizer.json").write_text(text.replace('": 300', '": 299').replace('": 299', '": 300', 1))
        (tmp_path / "proxy/model.safetensors").unlink()
        with pytest.raises(VocabularyError, match="ids differ"):
            make_trainer(tmp_path / "run", without_weights[0], proxy)

    def test_a_stream(self, tmp_path, without_weights):
        args = BayesKDConfig(str(tmp_path), **ON_CPU)
        stream = Dataset.from_list(make_rows(4)).to_iterable_dataset()
        with pytest.raises(TeacherDataError, match="counts all .* answers .* not a stream. Turn streaming off"):
            BayesKDTrainer(*without_weights, args, train_dataset=stream)

    def test_no_data(self, tmp_path, without_weights):
        args = BayesKDConfig(str(tmp_path), **ON_CPU)
        with pytest.raises(TeacherDataError, match="needs a `Dataset`"):
            BayesKDTrainer(*without_weights, args)
        empty = Dataset.from_dict({"prompt": [], "completion": []})
        with pytest.raises(TeacherDataError, match="The teacher data has no rows"):
            BayesKDTrainer(*without_weights, args, train_dataset=empty)

    def test_answers_of_nothing(self, tmp_path, without_weights):
        rows = make_rows(4)
        with pytest.raises(TeacherDataError, match="Row 1: `completion` is empty .*; remove the row"):
            make_trainer(tmp_path, *without_weights, [*rows[:1], rows[1] | {"completion": " "}, *rows[2:]], held_out=0)
        with pytest.raises(TeacherDataError, match="answers have no tokens: there is nothing to count"):
            make_trainer(
                tmp_path, *without_weights, [row | {"prompt_ids": [1], "teacher_ids": []} for row in rows], held_out=0
            )

    @pytest.mark.parametrize(
        ("completion", "message"),
        [
            (None, "Row 0: `completion` is null"),
            ([], "Row 0: `prompt` is a string but `completion` is a list"),
            (4, "Row 0: `completion` is 4, an int"),
        ],
        ids=str,
    )
    def test_rows_that_are_none(self, tmp_path, without_weights, completion, message):
        rows = [{"prompt": "Name a fruit.", "completion": completion}] * 4
        with pytest.raises(TeacherDataError, match=message):
            make_trainer(tmp_path, *without_weights, rows, held_out=0)

    def test_a_missing_column(self, tmp_path, without_weights):
        rows = [{"prompt": "Name a fruit.", "output": "An apple."}] * 4
        with pytest.raises(TeacherDataError, match="no column `completion`.* rename that column"):
            make_trainer(tmp_path, *without_weights, rows, held_out=0)

    def test_another_configuration(self, tmp_path, without_weights):
        args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
        with pytest.raises(TypeError, match="args of BayesKDTrainer must be a BayesKDConfig, got SFTConfig"):
            BayesKDTrainer(*without_weights, args, train_dataset=Dataset.from_list(make_rows(4)))

    def test_data_sets_by_name(self, tmp_path, without_weights):
        args, rows = BayesKDConfig(str(tmp_path), **ON_CPU), Dataset.from_list(make_rows(4))
        with pytest.raises(TeacherDataError, match="needs a `Dataset`, not dict"):
            BayesKDTrainer(*without_weights, args, train_dataset={"train": rows})
        with pytest.raises(TeacherDataError, match="eval_dataset must be one `Dataset`, not dict"):
            BayesKDTrainer(*without_weights, args, train_dataset=rows, eval_dataset={"a": rows})

    def test_answers_that_are_all_cut_off(self, tmp_path, tiny_model_dir, other_model_dir):
        with pytest.raises(TeacherDataError, match="max_length=4 cuts off every answer"):
            make_trainer(tmp_path, tiny_model_dir, other_model_dir, max_length=4)

    def test_rows_longer_than_the_context(self, tmp_path, without_weights):
        with pytest.raises(TeacherDataError, match="No room for an answer.*context is 512 tokens"):
            make_trainer(tmp_path, *without_weights, max_completion_length=600)

    def test_the_first_version_of_fsdp(self, tmp_path, without_weights, monkeypatch):
        args = BayesKDConfig(str(tmp_path), **ON_CPU)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="FSDP's first version is not supported"):
            BayesKDTrainer(*without_weights, args, train_dataset=Dataset.from_list(make_rows(4)))
