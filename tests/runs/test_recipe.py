import os
from pathlib import Path

import pytest
import yaml

from trl_bbkd import GADConfig
from trl_bbkd.errors import RecipeError
from trl_bbkd.runs.methods import METHODS
from trl_bbkd.runs.recipe import check_recipe, import_callable, load_recipe


RECIPES = Path(__file__).parents[2] / "recipes"
ON_CPU = "use_cpu: true\nbf16: false\n"


@pytest.fixture
def write(tmp_path):
    """Write a recipe of `method: gad` (line 1), two lines for CPU (2, 3) and the given text (from line 4)."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"method: gad\n{ON_CPU}{text}\n")
        return path

    return write


class TestLoadRecipe:
    def test_values_reach_their_dataclass(self, write):
        recipe = load_recipe(
            write(
                "teacher_name: GPT-5-Chat\nseqkd_baseline: false\ndataset_name: some/set\n"
                "learning_rate: 1e-5\nnum_generations: 4\ngradient_accumulation_steps: 4\n"
                "discriminator_head: likelihood\ndiscriminator_lora_kwargs: {r: 4}\nreward_weights: [1, 5e-1]\n"
                "model_name_or_path: some/model\nuse_peft: true\nlora_target_modules: all-linear\n"
                "test_split_size: 0.1\nreport_to: none\nsave_strategy: 'no'"
            )
        )
        assert recipe.method == "gad"
        assert recipe.path.name == "recipe.yaml"
        assert recipe.script_args.teacher_name == "GPT-5-Chat"
        assert recipe.script_args.seqkd_baseline is False
        assert recipe.script_args.dataset_name == "some/set"
        assert isinstance(recipe.training_args, GADConfig)
        assert recipe.training_args.learning_rate == 1e-5
        assert recipe.training_args.num_generations == 4
        assert recipe.training_args.discriminator_head == "likelihood"
        assert recipe.training_args.discriminator_lora_kwargs == {"r": 4}
        assert recipe.training_args.reward_weights == [1.0, 0.5]
        assert recipe.training_args.report_to == []
        assert recipe.training_args.save_strategy == "no"
        assert recipe.model_args.model_name_or_path == "some/model"
        assert recipe.model_args.lora_target_modules == "all-linear"
        assert recipe.dataset_args.test_split_size == 0.1

    def test_defaults_are_the_dataclasses(self, write):
        recipe = load_recipe(write(""))
        assert recipe.training_args.discriminator_learning_rate == 1e-6
        assert recipe.training_args.temperature == 0.8
        assert recipe.script_args.seqkd_baseline is True
        assert recipe.script_args.reward_funcs is None

    def test_datasets(self, write):
        recipe = load_recipe(write("datasets:\n  - path: json\n    data_files: {train: a.jsonl}\n  - path: org/set"))
        first, second = recipe.dataset_args.datasets
        assert (first.path, first.data_files, first.split) == ("json", {"train": "a.jsonl"}, "train")
        assert second.path == "org/set"

    def test_env_is_exported(self, write, monkeypatch):
        monkeypatch.setenv("BBKD_TEST", "from outside")
        load_recipe(write("env:\n  BBKD_TEST: 1"))
        assert os.environ["BBKD_TEST"] == "1"

    def test_overrides_win(self, write):
        path = write("learning_rate: 1e-5\nreward_funcs: [a.b]\nseqkd_baseline: true\ngradient_checkpointing: true")
        overrides = ["--learning_rate", "1e-6", "--reward_funcs", "c.d", "e.f", "--no_seqkd_baseline"]
        overrides += ["--gradient_checkpointing", "false", "--discriminator-head=likelihood"]
        overrides += ["--discriminator_lora_kwargs", '{"r": 8}']
        recipe = load_recipe(path, overrides)
        assert recipe.training_args.learning_rate == 1e-6
        assert recipe.training_args.gradient_checkpointing is False
        assert recipe.training_args.discriminator_head == "likelihood"
        assert recipe.training_args.discriminator_lora_kwargs == {"r": 8}
        assert recipe.script_args.reward_funcs == ["c.d", "e.f"]
        assert recipe.script_args.seqkd_baseline is False

    def test_anchors_and_merges(self, write):
        path = write("model_init_kwargs: &base {a: 1, b: 2}\nchat_template_kwargs: {<<: *base, b: 3}")
        recipe = load_recipe(path)
        assert recipe.training_args.chat_template_kwargs == {"a": 1, "b": 3}


class TestPaths:
    @pytest.fixture
    def recipe_file(self, write, tmp_path, monkeypatch):
        for folder in ("student", "data", "elsewhere"):
            (tmp_path / folder).mkdir()
        for file in ("teacher.jsonl", "judge.py", "data/a.jsonl"):
            (tmp_path / file).touch()
        monkeypatch.chdir(tmp_path / "elsewhere")
        return write(
            "model_name_or_path: student\ndiscriminator: ./student\ndataset_name: teacher.jsonl\n"
            "reward_funcs: [judge.py:reward, package.reward]\nsample_metrics: judge.py:judge\noutput_dir: student\n"
            "datasets:\n  - path: data\n  - {path: json, data_files: [data/*.jsonl, 'hf://a.jsonl']}"
        )

    def test_inputs_next_to_the_recipe(self, recipe_file, tmp_path):
        recipe = load_recipe(Path("..", recipe_file.name))
        assert recipe.model_args.model_name_or_path == str(tmp_path / "student")
        assert recipe.training_args.discriminator == str(tmp_path / "student")
        assert recipe.script_args.dataset_name == str(tmp_path / "teacher.jsonl")
        assert recipe.script_args.reward_funcs == [f"{tmp_path}/judge.py:reward", "package.reward"]
        assert recipe.script_args.sample_metrics == f"{tmp_path}/judge.py:judge"
        folder, files = recipe.dataset_args.datasets
        assert folder.path == str(tmp_path / "data")
        assert files.path == "json"
        assert files.data_files == [str(tmp_path / "data/*.jsonl"), "hf://a.jsonl"]

    def test_output_is_relative_to_the_current_directory(self, recipe_file):
        assert load_recipe(recipe_file).training_args.output_dir == "student"

    def test_overrides_are_relative_to_the_current_directory(self, recipe_file):
        recipe = load_recipe(recipe_file, ["--dataset_name", "teacher.jsonl"])
        assert recipe.script_args.dataset_name == "teacher.jsonl"

    def test_hub_ids_stay(self, write):
        recipe = load_recipe(write("model_name_or_path: Qwen/Qwen2.5-7B-Instruct\ndataset_name: org/set"))
        assert recipe.model_args.model_name_or_path == "Qwen/Qwen2.5-7B-Instruct"
        assert recipe.script_args.dataset_name == "org/set"


class TestErrors:
    @pytest.mark.parametrize(
        "text, message",
        [
            ("learning_rat: 1e-3", "line 4: unknown key 'learning_rat'; did you mean 'learning_rate'"),
            ("# a comment\n\ndiscriminator_hed: scalar", "line 6: .*'discriminator_head'"),
            ("zzzz: 1", "line 4: unknown key 'zzzz'"),
            ("learning_rate: 1e-5\nbeta: 0\nlearning_rate: 1e-6", "line 6: 'learning_rate' was already .* line 4"),
            ("env: {A: 1, A: 2}", "line 4: 'A' was already given in line 4"),
            ("learning_rate: fast", "line 4: learning_rate: expected a number, got 'fast'"),
            ("num_generations: 2.5", "line 4: num_generations: expected a whole number, got 2.5"),
            ("gradient_checkpointing: 3", "line 4: gradient_checkpointing: expected true or false, got 3"),
            ("gradient_checkpointing:", "expected true or false, got None"),
            ("discriminator_head: scaler", "expected one of scalar, likelihood, got 'scaler'"),
            ("dtype: float8", "expected one of auto, bfloat16, float16, float32, got 'float8'"),
            ("save_strategy: no", "expected one of no, steps, epoch, best, got False .put it in quotes"),
            ("model_revision: 12345", "expected text, got 12345 .put it in quotes"),
            ("reward_weights: [1, heavy]", r"expected a list \(of a number\), got \[1, 'heavy'\]"),
            ("model_init_kwargs: [1]", "model_init_kwargs: expected .*a mapping"),
            ("datasets: teacher.jsonl", "line 4: `datasets` is a list of mappings"),
            ("datasets:\n  - path: a\n  - pth: b", "line 6: unknown key 'pth'; did you mean 'path'"),
            ("datasets:\n  - path: a\n    fraction: half", "line 6: fraction: expected a number, got 'half'"),
            ("datasets:\n  - split: train", "line 5: an entry of `datasets` needs `path`"),
            ("env: [A]", "line 4: `env` is a mapping"),
            ("a: [1", "line 5: not valid YAML"),
            ("num_generations: 1", "num_generations must be at least 2, got 1"),
            ("warmup_epochs: 9", "warmup_epochs"),
        ],
    )
    def test_bad_line(self, write, text, message):
        with pytest.raises(RecipeError, match=f"recipe.yaml.*{message}"):
            load_recipe(write(text))

    @pytest.mark.parametrize(
        "text, message",
        [
            ("learning_rate: 1e-6", "`method` is missing. Add a line `method: gad`"),
            ("method: gda", "line 1: unknown method 'gda'; available: gad"),
            ("method: [gad]", "line 1: unknown method .'gad'.; available: gad"),
            ("\nmethod: lkd", "line 2: unknown method 'lkd'; available: gad, proxykd, bayeskd, preferencekd, llkd"),
            ("", "a recipe is a YAML mapping"),
            ("- method: gad", "a recipe is a YAML mapping"),
        ],
    )
    def test_bad_method(self, tmp_path, text, message):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(RecipeError, match=f"recipe.yaml.*{message}"):
            load_recipe(tmp_path / "recipe.yaml")

    def test_not_utf8(self, tmp_path):
        (tmp_path / "recipe.yaml").write_bytes("method: gad\nteacher_name: Müller\n".encode("latin-1"))
        with pytest.raises(RecipeError, match="recipe.yaml, line 2: not UTF-8 .* Save the file as UTF-8"):
            load_recipe(tmp_path / "recipe.yaml")

    def test_a_character_that_yaml_has_not(self, tmp_path):
        (tmp_path / "recipe.yaml").write_bytes(b"method: gad\nteacher_name: \x00\n")
        with pytest.raises(RecipeError, match="recipe.yaml: not valid YAML: character 0x0"):
            load_recipe(tmp_path / "recipe.yaml")

    def test_no_file(self, tmp_path):
        with pytest.raises(RecipeError, match="there is no recipe .*nothing.yaml"):
            load_recipe(tmp_path / "nothing.yaml")

    @pytest.mark.parametrize(
        "overrides, message",
        [
            (["--learning_rat", "1"], "unknown option --learning_rat; did you mean '--learning_rate'"),
            (["--learning_ra=1"], "unknown option --learning_ra; did you mean '--learning_rate'"),
            (["--learning_rate", "fast"], "--learning_rate.*'fast'"),
            (["--discriminator_head", "scaler"], "'scaler'.*scalar.*likelihood"),
            (["stray"], "unexpected argument 'stray'"),
            (["--num_generations", "1"], "num_generations must be at least 2, got 1"),
            (["--num_processes", "2"], "unknown option --num_processes"),
        ],
    )
    def test_bad_override(self, write, overrides, message):
        with pytest.raises(RecipeError, match=message):
            load_recipe(write(""), overrides)


class TestCheckRecipe:
    launch_options = ("--num_processes", "--accelerate_config", "--use_cpu", "-q")

    def test_arguments_are_sorted(self, write):
        arguments = [
            "--num_processes",
            "2",
            "--learning_rate",
            "1e-6",
            "--accelerate_config=zero2",
            "--use_cpu",
            "true",
        ]
        arguments += ["-q", "--reward_funcs", "a.b", "c.d"]
        launch, overrides = check_recipe(write(""), arguments, self.launch_options)
        assert launch == ["--num_processes", "2", "--accelerate_config=zero2", "-q"]
        # --use_cpu is a key of the recipe too, and the recipe comes first
        assert overrides == ["--learning_rate", "1e-6", "--use_cpu", "true", "--reward_funcs", "a.b", "c.d"]

    def test_typo_in_a_launch_option(self, write):
        with pytest.raises(RecipeError, match="unknown option --num_proceses; did you mean '--num_processes'"):
            check_recipe(write(""), ["--num_proceses", "2"], self.launch_options)

    def test_recipe_is_checked(self, write):
        with pytest.raises(RecipeError, match="line 4: unknown key 'learning_rat'"):
            check_recipe(write("learning_rat: 1"), [], self.launch_options)


class TestImportCallable:
    def test_dotted(self):
        assert import_callable("os.path.join") is os.path.join

    def test_file(self, tmp_path):
        (tmp_path / "judge.py").write_text("def judge(): return 7")
        assert import_callable(f"{tmp_path}/judge.py:judge")() == 7

    @pytest.mark.parametrize(
        "spec, message",
        [
            ("join", "write `package.module.function` or `path/to/file.py:function`"),
            ("nowhere.at.all", "cannot import nowhere.at"),
            ("os.path.joine", "no function 'joine'; did you mean 'join'"),
            ("os.path.sep", "not a function but str"),
            ("nothing.py:judge", "there is no file .*nothing.py"),
            (f"{RECIPES}/gad.yaml:judge", "not a Python file"),
        ],
    )
    def test_errors(self, spec, message):
        with pytest.raises(RecipeError, match=message):
            import_callable(spec)


SHIPPED = sorted(file for method in METHODS for file in RECIPES.rglob(f"{method}.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(RECIPES)))
class TestShippedRecipes:
    def test_both_yaml_and_python(self, file):
        values = yaml.safe_load(file.read_text())
        assert values["method"] == file.stem
        assert values['if __import__("trl_bbkd").launch(__name__, __file__)'] == "r'''"
        namespace = {"__name__": "__mp_main__", "__file__": str(file)}
        exec(compile(file.read_text(), file, "exec"), namespace)  # a spawned worker starts nothing
        assert namespace["__name__"] == "__mp_main__"

    def test_header_states_the_command(self, file):
        header = file.read_text().partition("if __import__")[0]
        assert "# Hardware:" in header
        assert "# Command:" in header
        assert str(file.relative_to(RECIPES.parent)) in header


@pytest.mark.parametrize(
    ("method", "second_model"),
    [
        ("gad", "discriminator"),
        ("proxykd", "proxy_model"),
        ("bayeskd", "proxy_model"),
        ("preferencekd", "discriminator"),
    ],
)
def test_default_recipe_runs_from_any_directory(tmp_path, monkeypatch, method, second_model):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(RECIPES / f"{method}.yaml")
    inputs = [
        recipe.model_args.model_name_or_path,
        getattr(recipe.training_args, second_model),
        recipe.script_args.dataset_name,
    ]
    assert [Path(path) for path in inputs if Path(path).exists()] == [Path(path) for path in inputs]
    assert callable(import_callable(recipe.script_args.sample_metrics))


def test_the_recipe_of_a_classifier_runs_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(RECIPES / "llkd.yaml")
    for path in (recipe.model_args.model_name_or_path, recipe.script_args.dataset_name):
        assert Path(path).is_dir()


class TestPaperRecipe:
    recipe_file = RECIPES / "qwen2.5-7b-lmsys" / "gad.yaml"

    def test_hyper_parameters(self):
        recipe = load_recipe(self.recipe_file, ["--bf16", "false", "--use_cpu", "true"])
        args = recipe.training_args
        assert recipe.script_args.seqkd_learning_rate == 5e-6
        samples_per_step = 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert samples_per_step == 256 * args.num_generations == 256 * 8
        assert args.steps_per_generation == args.gradient_accumulation_steps
        assert (args.learning_rate, args.discriminator_learning_rate) == (1e-6, 1e-6)
        assert (args.warmup_epochs, args.num_train_epochs, args.discriminator_only_steps) == (1, 3, 10)
        assert (args.temperature, args.top_p, args.top_k) == (0.8, 1.0, 0)
        assert (args.max_prompt_length, args.max_completion_length) == (2048, 1536)
        assert (args.beta, args.use_bias_correction_kl) == (0.001, False)
        assert args.use_vllm and args.vllm_mode == "colocate"

    def test_prepared_rows_keep_the_data_contract(self):
        from datasets import Dataset

        from trl_bbkd.data.teacher_data import check_teacher_data

        convert = import_callable(f"{self.recipe_file.parent}/prepare_data.py:prompt_and_completion")
        rows = [{"content": [{"role": "user", "content": "Hi"}], "teacher_response": "Hello!"}]
        dataset = Dataset.from_list(rows).map(convert, remove_columns=["content", "teacher_response"])
        assert check_teacher_data(dataset).rows == 1
        assert dataset[0]["completion"] == [{"role": "assistant", "content": "Hello!"}]

    def test_it_says_that_we_did_not_run_it(self):
        assert "NOT RUN BY US" in self.recipe_file.read_text()


class TestLLKDPaperRecipe:
    recipe_file = RECIPES / "roberta-pubmed-rct" / "llkd.yaml"

    def test_it_is_valid_and_says_that_we_did_not_run_it(self):
        recipe = load_recipe(self.recipe_file, ["--bf16", "false", "--use_cpu", "true"])
        assert recipe.training_args.labels == ["background", "objective", "methods", "results", "conclusions"]
        assert (recipe.training_args.selection, recipe.script_args.baselines) == ("llkd", True)
        assert "NOT RUN BY US" in self.recipe_file.read_text()

    def test_prepared_rows_keep_the_data_contract(self):
        from datasets import Dataset

        from trl_bbkd import pseudo_label

        calibrated_rows = import_callable(f"{self.recipe_file.parent}/prepare_data.py:calibrated_rows")
        said = {"methods": 0.9, "results": 0.1}
        answers = [
            {"text": f"Sentence {n}.", "gold": "methods" if n % 4 else "results", "said": said} for n in range(40)
        ]
        labels = ["background", "objective", "methods", "results", "conclusions"]
        labelled = pseudo_label(Dataset.from_list(answers), labels, label_probs_column="said")
        rows, temperature = calibrated_rows(labelled, checked_rows=40)
        # Right 3 times in 4, the teacher is too sure
        assert temperature == pytest.approx(2.0, rel=1e-3)
        assert rows[0].pop("teacher_confidence") == pytest.approx(0.75, abs=1e-3)
        assert rows[0] == {"text": "Sentence 0.", "label": "methods", "gold": "results"}


def test_the_recipe_with_one_backbone():
    from datasets import Dataset

    from trl_bbkd.data.teacher_data import check_teacher_data

    recipe_file = RECIPES / "smollm2-codegen" / "gad.yaml"
    recipe = load_recipe(recipe_file, ["--bf16", "false", "--use_cpu", "true"])
    assert (recipe.training_args.discriminator, recipe.model_args.use_peft) == ("shared", True)
    assert "RUN BY US FOR 3 STEPS ONLY" in recipe_file.read_text()
    convert = import_callable(f"{recipe_file.parent}/prepare_data.py:row")
    rows = [convert({"instruction": "Add them.", "input": "1, 2", "output": "3"})]
    assert check_teacher_data(Dataset.from_list(rows)).rows == 1
    assert rows[0]["prompt"] == [{"role": "user", "content": "Add them.\n\n1, 2"}]


class TestProxyKD:
    paper = RECIPES / "llama-2-7b-gpt4" / "proxykd.yaml"

    def test_hyper_parameters_of_the_paper(self):
        recipe = load_recipe(self.paper, ["--bf16", "false", "--use_cpu", "true"])
        args = recipe.training_args
        assert (args.warmup_share, args.alignment_share, args.alignment_rounds) == (0.1, 0.45, 16)
        assert (args.learning_rate, args.proxy_learning_rate, args.num_train_epochs) == (1e-5, 1e-5, 1)
        assert args.lr_scheduler_type == args.proxy_lr_scheduler_type == "constant"
        assert (args.target_top_k, args.kl_weight, args.sample_weighting) == (10, 100.0, "sum")
        assert args.max_prompt_length + args.max_completion_length == 1024
        assert args.proxy_lora_kwargs["r"] == recipe.model_args.lora_r == 64 and recipe.model_args.use_peft
        assert "NOT RUN BY US" in self.paper.read_text()

    def test_prepared_rows_keep_the_data_contract(self):
        from datasets import Dataset

        from trl_bbkd.data.teacher_data import check_teacher_data

        script = self.paper.parent / "prepare_data.py"
        orca, nectar = (import_callable(f"{script}:{name}") for name in ("orca_row", "nectar_row"))
        answers = [{"model": "llama", "answer": "no"}, {"model": "gpt-4", "answer": "yes"}]
        rows = [
            orca({"system_prompt": "Be kind.", "question": "How?", "response": "So."}),
            nectar({"prompt": "\n\nHuman: Hi\n\nAssistant: ", "answers": answers}),
        ]
        assert check_teacher_data(Dataset.from_list(rows)).rows == 2
        assert rows[0]["prompt"] == "Be kind.\n\nHow?\n\n" and rows[1]["completion"] == "yes"

    def test_a_typo_is_an_error_with_the_nearest_key(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"method: proxykd\n{ON_CPU}kl_wieght: 1\n")
        with pytest.raises(RecipeError, match="line 4: unknown key 'kl_wieght'; did you mean 'kl_weight'"):
            load_recipe(path)
        path.write_text(f"method: proxykd\n{ON_CPU}kl_weight: -1\n")
        with pytest.raises(RecipeError, match="kl_weight must be at least 0, got -1"):
            load_recipe(path)

    def test_keys_of_another_method(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"method: proxykd\n{ON_CPU}reward_funcs: [os.path.join]\n")
        with pytest.raises(RecipeError, match="reward_funcs are added to GAD's discriminator"):
            load_recipe(path)

    def test_stages_on_the_command_line(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"method: proxykd\n{ON_CPU}")
        recipe = load_recipe(path, ["--stages", "distil", "cache", "--proxy_lora_kwargs", '{"r": 4}'])
        assert recipe.training_args.stages == ["cache", "distil"]
        assert recipe.training_args.proxy_lora_kwargs == {"r": 4}


class TestBayesKD:
    def test_the_recipe_at_the_size_of_the_paper(self):
        file = RECIPES / "llama-2-7b-gpt4" / "bayeskd.yaml"
        recipe = load_recipe(file, ["--bf16", "false", "--use_cpu", "true"])
        args = recipe.training_args
        assert (args.prior_gamma, args.ngram_context_length) == (3.0, 3)
        assert args.prior_weight > 0 and args.posterior_weight > 0 and args.posterior_draws > 0
        assert args.proxy_lora_kwargs["r"] == recipe.model_args.lora_r == 64 and recipe.model_args.use_peft
        assert "NOT RUN BY US" in file.read_text()

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("prior_gama: 3", "line 4: unknown key 'prior_gama'; did you mean 'prior_gamma'"),
            ("prior_gamma: 0.5", "prior_gamma must be at least 1, got 0.5"),
            ("ngram_context_length: 0", "ngram_context_length must be at least 1, got 0"),
            ("posterior_draws: -1", "posterior_draws must be at least 0, got -1"),
            ("posterior_sampling: maybe", "posterior_sampling: expected one of drawn, expected, got 'maybe'"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, line, message):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"method: bayeskd\n{ON_CPU}{line}\n")
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
