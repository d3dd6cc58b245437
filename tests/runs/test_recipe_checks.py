"""What is told of a recipe's keys and values before anything is built."""

import dataclasses

import pytest
from accelerate.commands.launch import launch_command_parser
from transformers.training_args import OptimizerNames
from trl import DatasetMixtureConfig, ModelConfig

from trl_bbkd.errors import RecipeError
from trl_bbkd.runs.methods import METHODS, load_class, load_method
from trl_bbkd.runs.recipe import ClassifierArguments, RecipeArguments, load_recipe
from trl_bbkd.runs.recipe_checks import check_packages
from trl_bbkd.runs.recipe_keys import launcher_options, recipe_keys, unknown_option


@pytest.fixture
def write(tmp_path):
    """Write a recipe whose own text begins in line 4."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"method: gad\nuse_cpu: true\nbf16: false\n{text}\n")
        return path

    return write


class TestValues:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("max_completion_length: 0", "max_completion_length must be at least 1, got 0"),
            ("max_prompt_length: 0", "max_prompt_length must be at least 1, got 0"),
            ("answers_per_prompt: 0", "answers_per_prompt must be at least 1, got 0"),
            ("per_device_train_batch_size: 0", "per_device_train_batch_size must be at least 1, got 0"),
            ("discriminator_batch_size: 0", "discriminator_batch_size must be at least 1, got 0"),
            ("gradient_accumulation_steps: 0", "gradient_accumulation_steps must be at least 1, got 0"),
            ("eval_prompts: 0", "eval_prompts must be at least 1, got 0"),
            ("eval_samples: -1", "eval_samples must be at least 1, got -1"),
            ("learning_rate: -1.0", "learning_rate must be a number of at least 0, got -1.0"),
            ("discriminator_learning_rate: -1", "discriminator_learning_rate must be a number of at least 0"),
            ("seqkd_learning_rate: .inf", "seqkd_learning_rate must be a number of at least 0, got inf"),
            ("temperature: 0", "temperature must be a number above 0, got 0"),
            ("top_p: 2", "top_p must be above 0 and at most 1, got 2"),
            ("top_k: -3", "top_k must be at least 1, or 0 for all tokens, got -3"),
            ("min_p: 3", "min_p must be from 0 to 1, got 3"),
            ("repetition_penalty: 0", "repetition_penalty must be a number above 0, got 0"),
            ("seed: -1", "seed must be from 0 to 2[*][*]32 - 1, got -1"),
            ("max_steps: -5\nnum_train_epochs: 1", "max_steps must be at least 1, or -1 for `num_train_epochs`"),
            ("max_steps: 0", "max_steps must be at least 1, or -1"),
            ("num_train_epochs: -1", "num_train_epochs must be a number of at least 0"),
            ("save_steps: 0", "save_steps must be at least 1 step, or a share of all steps between 0 and 1, got 0"),
            ("logging_steps: -2", "logging_steps must be at least 1 step, or a share"),
            ("eval_steps: 0", "eval_steps must be at least 1 step, or a share"),
        ],
    )
    def test_numbers_out_of_range(self, write, line, message):
        with pytest.raises(RecipeError, match=f"recipe.yaml, line 4: {message}"):
            load_recipe(write(line))
        name, value = line.splitlines()[0].split(": ")
        with pytest.raises(RecipeError, match=f"^{message}"):
            load_recipe(write(""), [f"--{name}={value.replace('.inf', 'inf')}"])

    def test_what_says_undecided_stays(self, write):
        args = load_recipe(write("max_steps: -1\nmax_prompt_length: null\nlearning_rate: 0")).training_args
        assert (args.max_steps, args.max_prompt_length, args.learning_rate) == (-1, None, 0)

    @pytest.mark.parametrize("path", ["taken", "taken/below"])
    def test_output_dir_that_is_a_file(self, write, tmp_path, path):
        (tmp_path / "taken").touch()
        with pytest.raises(RecipeError, match="line 4: output_dir cannot be .*taken is a file. Name another"):
            load_recipe(write(f"output_dir: {tmp_path / path}"))

    def test_a_package_that_a_configuration_looks_for(self, write, monkeypatch):
        monkeypatch.setattr("trl_bbkd.runs.recipe_checks.find_spec", lambda name: None)
        with pytest.raises(RecipeError, match=r"deepspeed=ds.json needs deepspeed.*trl-bbkd\[deepspeed\]"):
            load_recipe(write("deepspeed: ds.json"))

    @pytest.mark.parametrize(
        ("values", "advice"),
        [
            ({"use_vllm": True}, r"use_vllm=True needs vllm.*pip install .trl-bbkd\[vllm\]"),
            ({"load_in_4bit": True}, r"load_in_4bit=True needs bitsandbytes.*trl-bbkd\[quantization\]"),
            ({"discriminator_load_in_4bit": True}, r"bitsandbytes.*trl-bbkd\[quantization\]"),
            ({"optim": OptimizerNames("paged_adamw_8bit")}, "optim=paged_adamw_8bit needs bitsandbytes"),
            (
                {"optim": OptimizerNames("adamw_torch_8bit")},
                "^optim=adamw_torch_8bit needs torchao.*pip install torchao",
            ),
            ({"optim": OptimizerNames("galore_adamw_8bit_layerwise")}, "needs galore_torch.*pip install galore-torch"),
            ({"optim": OptimizerNames("schedule_free_sgd")}, "needs schedulefree"),
            ({"use_liger_kernel": True}, "pip install liger-kernel"),
        ],
    )
    def test_packages(self, monkeypatch, values, advice):
        monkeypatch.setattr("trl_bbkd.runs.recipe_checks.find_spec", lambda name: None)
        with pytest.raises(RecipeError, match=advice):
            check_packages(values)
        check_packages(dict.fromkeys(values) | {"optim": OptimizerNames("adamw_torch_fused")})

    @pytest.mark.parametrize("name", OptimizerNames)
    def test_every_optimizer_with_a_package_of_its_own_is_known(self, monkeypatch, name):
        """Against transformers' own: when this fails, it has a new one."""
        monkeypatch.setattr("trl_bbkd.runs.recipe_checks.find_spec", lambda name: None)
        is_torchs = name.startswith(("adamw_torch", "sgd", "adagrad", "adafactor", "rmsprop")) and not any(
            part in name for part in ("bit", "bnb")
        )
        if is_torchs:
            check_packages({"optim": name})
        else:
            with pytest.raises(RecipeError, match=f"^optim={name.value} needs "):
                check_packages({"optim": name})


class TestKeys:
    @pytest.mark.parametrize("method", METHODS)
    def test_read_from_the_sources_they_are_those_of_the_classes(self, method):
        """When this fails, TRL or transformers has moved a class: `recipe_keys.HOMES` says where they are."""
        arguments = ClassifierArguments if method == "llkd" else RecipeArguments
        classes = [arguments, load_class(load_method(method).config), ModelConfig, DatasetMixtureConfig]
        assert recipe_keys(method) == {f.name for cls in classes for f in dataclasses.fields(cls) if f.init}

    def test_without_the_sources_the_parser_tells(self, write, monkeypatch):
        monkeypatch.setattr("trl_bbkd.runs.recipe_keys.HOMES", {})
        assert recipe_keys("gad") is None
        with pytest.raises(RecipeError, match="line 4: unknown key 'learning_rat'; did you mean 'learning_rate'"):
            load_recipe(write("learning_rat: 1"))

    def test_options_of_the_launcher(self):
        options = list(launch_command_parser()._option_string_actions)
        assert len(options) > 100 and unknown_option(options, [], launcher_options()) is None

    def test_a_section_is_told_to_be_flat(self, write):
        with pytest.raises(RecipeError, match="line 4: unknown key 'training': a recipe is flat.*`learning_rate`"):
            load_recipe(write("training:\n  learning_rate: 1e-3"))

    def test_help_has_the_methods_keys_first_and_trls_on_demand(self, write, capsys):
        texts = []
        for option in ("--help", "--help-all"):
            with pytest.raises(SystemExit):
                load_recipe(write(""), [option])
            texts.append(capsys.readouterr().out)
        short, full = texts
        for text in texts:
            assert text.index("--discriminator_head") < text.index("--learning_rate") and "--output_dir" in text
        assert "--adam_beta1" not in short and "--help-all shows them" in short
        assert full.index("--discriminator_head") < full.index("--adam_beta1") and len(short) < len(full) / 3
        assert "--discriminator-head" not in full and "--no_seqkd_baseline" not in full
