"""From a recipe to what fits, what to change, and what it says."""

import io
import time
from dataclasses import replace

import pytest
from rich.console import Console

from tests.plan.configurations import qwen, write_recipe
from trl_bbkd.errors import RecipeError
from trl_bbkd.plan.cost import forward_operations, parts_of
from trl_bbkd.plan.memory import ENGINES, GIB
from trl_bbkd.plan.models import ModelSizes, adapter_size
from trl_bbkd.plan.plan import Machine, Plan
from trl_bbkd.plan.reading import read_recipe
from trl_bbkd.plan.show import print_plan
from trl_bbkd.plan.ways import WAYS, in_a_way, options, way_of
from trl_bbkd.runs.held_models import HeldModel
from trl_bbkd.runs.shipped import recipes_folder


LORA = {"use_peft": True, "lora_target_modules": "all-linear", "dtype": "bfloat16"}
BOTH = {**LORA, "discriminator_lora_kwargs": {"r": 16, "target_modules": "all-linear"}}


def plan(path, gpus=1, gpu_memory=80, overrides=(), **settings) -> Plan:
    return Plan(read_recipe(path, list(overrides), gpus), Machine(gpus, gpu_memory, 989, 0.4), **settings)


def printed(found: Plan, overrides=()) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_plan(found, "my.yaml", overrides, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def configurations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configurations")
    return {name: qwen(folder, name) for name in ("0.5B", "7B", "72B")}


class TestPhases:
    """Which models a method says it holds."""

    def names(self, path, gpus=1, overrides=()):
        return [[model.name for model in phase.models] for phase in plan(path, gpus, overrides=overrides).phases()]

    def test_gad(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["0.5B"])
        assert self.names(path) == [["student", "discriminator"]]
        with_all = ["--beta", "0.1", "--critic", "copy", "--advantage_estimator", "gae"]
        assert self.names(path, overrides=with_all) == [["student", "reference", "discriminator", "critic"]]

    def proxy_recipe(self, tmp_path, configurations, **values):
        values = {"method": "proxykd", "num_generations": None, "beta": None, **values}
        return write_recipe(
            tmp_path, model_name_or_path=configurations["0.5B"], proxy_model=configurations["7B"], **values
        )

    def test_proxies_and_students_are_trained_one_after_the_other(self, configurations, tmp_path):
        path = self.proxy_recipe(tmp_path, configurations)
        phases = [["proxy", "reference", "student"], ["proxy", "student"], ["student"]]
        assert self.names(path) == phases
        assert self.names(path, overrides=["--stages", "warmup", "cache", "distil"])[0] == ["proxy", "student"]
        live = ["--target_source", "live", "--sample_weighting", "none"]
        assert self.names(path, overrides=live)[-1] == ["student", "proxy"]
        own = ["--target_source", "on_policy", "--sample_weighting", "none"]
        phase = plan(path, 1, overrides=own).phases()[-1]
        assert [model.name for model in phase.models] == ["student", "proxy"]
        assert phase.sampler == "student" and phase.sampled == phase.step_rows and phase.new_tokens > 0
        path = self.proxy_recipe(tmp_path, configurations, method="bayeskd")
        assert self.names(path) == [["proxy", "student"], ["proxy", "student"], ["student"]]

    def test_targets_on_disk(self, configurations, tmp_path):
        path = self.proxy_recipe(tmp_path, configurations, target_top_k=10)
        # 4 bytes and 5 for each of 10 tokens, of 256 tokens a row
        assert plan(path, rows=1000).store_bytes == 1000 * 256 * 54
        assert "Soft targets on disk: up to 14 MB." in printed(plan(path, rows=1000))

    def test_a_classifier(self, tmp_path):
        from transformers import RobertaConfig

        RobertaConfig(num_hidden_layers=3).save_pretrained(tmp_path / "encoder")
        path = write_recipe(
            tmp_path,
            method="llkd",
            model_name_or_path=str(tmp_path / "encoder"),
            labels=["a", "b", "c"],
            max_length=64,
            **dict.fromkeys(("max_prompt_length", "max_completion_length", "num_generations", "beta")),
        )
        found = plan(path, rows=1000)
        (student,) = found.phases()[0].models
        assert (student.kind, student.num_labels) == ("classes", 3)
        assert "the student reads" in printed(found)


class TestEngines:
    def test_what_is_sharded_falls_with_the_number_of_gpus(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["7B"], beta=0.1)
        few, many = (plan(path, gpus).own for gpus in (8, 64))
        for engine in ENGINES:
            kept = [sum(cases[engine].footprints[0].kept.values()) for cases in (few, many)]
            expected = {"ddp": 1, "fsdp2": 1 / 8}.get(engine)
            if expected is not None:
                assert kept[1] == pytest.approx(kept[0] * expected, rel=0.01), engine
            else:
                assert kept[1] < kept[0], engine

    def test_the_cheapest_that_fits_is_recommended(self, configurations, tmp_path):
        small = write_recipe(tmp_path, model_name_or_path=configurations["0.5B"])
        assert plan(small, 8).recommended.engine == "ddp"
        assert "--accelerate_config ddp --num_processes 8" in printed(plan(small, 8))
        large = write_recipe(tmp_path, model_name_or_path=configurations["7B"])
        found = plan(large, 8)
        assert not found.own["ddp"].fits and found.recommended.engine == "zero2"
        with_reference = plan(large, 8, overrides=["--beta", "0.1"])
        assert with_reference.recommended.engine == "fsdp2"
        assert "--accelerate_config fsdp2 --num_processes 8" in printed(with_reference)

    def test_4bit_weights_are_not_sharded(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["7B"], **BOTH)
        cells = plan(path, 8).others["QLoRA"]
        assert [engine for engine in ENGINES if cells[engine].refusal] == ["fsdp2", "zero3"]

    def test_what_a_run_is_refused_with_is_the_plan_s_reason(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["7B"])
        found = plan(path, 8, overrides=["--critic", "trunk", "--advantage_estimator", "gae"])
        assert [engine for engine in ENGINES if found.own[engine].refusal] == ["zero2", "fsdp2", "zero3"]
        assert found.recommended is None
        assert "Refused under ZeRO-2, FSDP2, ZeRO-3: critic='trunk' reads" in printed(found)
        stored = ["--load_in_4bit", "true", "--bnb_4bit_quant_storage", "bfloat16"]
        found = plan(write_recipe(tmp_path, model_name_or_path=configurations["7B"], **BOTH), 8, overrides=stored)
        assert [engine for engine in ENGINES if found.own[engine].refusal] == ["zero3"]
        kept = {engine: found.own[engine].footprints[0].kept["student", "frozen weights"] for engine in ENGINES}
        assert kept["fsdp2"] == pytest.approx(kept["ddp"] / 8)
        assert "Refused under ZeRO-3: 4-bit weights cannot be partitioned by ZeRO-3" in printed(found)

    def test_machines_that_have_a_copy_each(self, configurations, tmp_path):
        """Under HSDP a GPU keeps what it keeps on one machine, and gathers within it."""
        path = write_recipe(tmp_path, model_name_or_path=configurations["7B"], beta=0.1)
        one, two, four = (plan(path, gpus, gpu_memory=60) for gpus in (8, 16, 32))
        assert "hsdp" not in one.own
        for found in (two, four):
            assert found.own["hsdp"].footprints[0].kept == one.own["fsdp2"].footprints[0].kept
            assert found.recommended.engine == "hsdp"
        assert "hsdp" not in plan(path, 12).own
        assert "--accelerate_config hsdp --num_machines 2 --num_processes 16\n" in printed(two)
        assert "--num_processes 32 --parallelism_config_dp_replicate_size 4" in printed(four)
        took = {engine: sum(part.took for part in two.parts(two.own[engine])[0][1]) for engine in ("hsdp", "fsdp2")}
        assert took["hsdp"] < took["fsdp2"]

    def test_the_largest_batch_is_found_by_doubling(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["0.5B"])
        found = plan(path, gpu_memory=24).own["ddp"]
        batch = found.largest_batch
        assert found.fits and batch in (16, 32)
        for tried, fits in ((batch, True), (2 * batch, False)):
            case = plan(path, gpu_memory=24, overrides=["--per_device_train_batch_size", str(tried)]).own["ddp"]
            assert case.fits is fits or tried > 32

    def test_a_smaller_batch_keeps_the_step(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["0.5B"], max_prompt_length=1792)
        found = plan(path, gpu_memory=19)
        assert not found.own["ddp"].fits and 0 < found.recommended.largest_batch < 16
        batch = found.recommended.largest_batch
        words = f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {32 // batch}"
        assert words in printed(found)
        assert "my.yaml --beta 0.1 --num_processes 1 " in printed(found, ["--beta", "0.1", "--hub_token", "secret"])

    def test_what_is_shared_is_sharded_twice(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["7B"], discriminator="shared", **LORA)
        own = plan(path, 8).own
        frozen = {
            engine: own[engine].footprints[0].kept.get(("discriminator", "frozen weights")) for engine in ENGINES
        }
        assert frozen["ddp"] is None and frozen["zero2"] is None
        assert frozen["fsdp2"] == frozen["zero3"] > 1.5e9

    def test_vllm_has_room_for_the_student_s_weights(self, configurations, tmp_path):
        colocated = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
        path = write_recipe(tmp_path, model_name_or_path=configurations["72B"], **colocated)
        found = plan(path, 64)
        assert (
            found.recommended is None and found.own["fsdp2"].footprints[0].kept["vLLM", "weights and KV cache"] > 135e9
        )
        assert found.changes[0].text.startswith("--use_vllm true --vllm_mode server")
        shared_out = plan(path, 64, overrides=["--vllm_tensor_parallel_size", "8"])
        assert shared_out.own["fsdp2"].footprints[0].kept["vLLM", "weights and KV cache"] == int(0.3 * 80 * GIB)


class TestWhatToChange:
    def test_nearest_first(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["7B"], dtype="float32")
        found = plan(path, 1)
        assert found.recommended is None
        assert [change.text.partition(" ")[0] for change in found.changes] == 4 * ["--use_peft"] + ["--gpus"]
        text = printed(found)
        assert "my.yaml fits nowhere. The nearest is one GPU" in text
        assert "--discriminator shared" in text and "--load_in_4bit true" in text
        for change in found.changes:
            assert change.total / GIB < 80 or change.batch < 16

    def test_its_options_are_the_ones_that_a_recipe_takes(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["7B"])
        own = plan(path).phases()
        shared = next(way for way in WAYS if way.name == "LoRA, shared")
        changed = plan(path, overrides=options(own, shared).split()).phases()
        assert way_of(own).name == "full" and way_of(changed) == shared
        assert [model.stands_on for model in changed[0].models] == [None, "student"]

    def test_ways(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["7B"], beta=0.1, **LORA)
        found = plan(path)
        assert found.way is None and "mixed (the recipe)" in printed(found)
        (phase,) = in_a_way(found.phases(), WAYS[0])
        assert [model.adapter for model in phase.models] == [None] * 3
        (phase,) = in_a_way(found.phases(), WAYS[1])
        assert {model.name: model.stands_on for model in phase.models}["reference"] == "student"

    def test_nothing_helps_against_a_model_that_every_gpu_holds(self, configurations, tmp_path):
        path = write_recipe(
            tmp_path,
            method="proxykd",
            model_name_or_path=configurations["0.5B"],
            proxy_model=configurations["72B"],
            num_generations=None,
            beta=None,
        )
        text = printed(plan(path, 8))
        assert "fits nowhere" in text and "take a smaller --proxy_model." in text


class TestTime:
    def test_operations(self, configurations):
        size = ModelSizes()(HeldModel("student", configurations["7B"], "key"))
        products = 2 * (size.parameters - size.vocabulary * size.hidden)
        assert forward_operations(size, 1000, 1) == pytest.approx(1000 * products, rel=0.01)
        # 28 layers of 3,584, half of 4,096 tokens seen: twice two products
        attention = forward_operations(size, 1, 4096) - forward_operations(size, 1, 0)
        assert attention == 28 * 3584 * 4096 * 2

    def test_steps_and_the_share_of_the_report(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["0.5B"], num_train_epochs=2)
        found = plan(path, 2, rows=4000)
        run = found.run_time(found.recommended)
        # 4,000 prompts of 8 samples, 64 samples a step
        assert run.steps == 1000
        assert run.samples == 1000 * 64
        # Two samples of 200 prompts, and a greedy one: within a tenth of the training
        assert run.plan.all == 3 * 200 * 5 + 15 * 200 * 1
        assert "The report samples 6,000 completions, 9% of the run's" in printed(found)
        assert "needs the number of training rows: --rows" in printed(plan(path, 2))

    def test_rows_are_counted_where_they_are(self, configurations, tmp_path):
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 640)
        path = write_recipe(
            tmp_path, model_name_or_path=configurations["0.5B"], dataset_name=str(tmp_path / "rows.jsonl")
        )
        assert plan(path).rows == 640

    def test_sampling_is_the_bottleneck_without_vllm(self, configurations, tmp_path):
        """As it was measured: 86 to 95 % of a step."""
        path = write_recipe(tmp_path, model_name_or_path=configurations["0.5B"])
        found = plan(path)
        ((phase, parts),) = found.parts(found.recommended)
        assert parts[0].took / sum(part.took for part in parts) > 0.86
        assert "Bottleneck of a step: the student samples." in printed(found)
        sharded = replace(found.setting("fsdp2", 8))
        first, *_ = parts_of(phase, found.sizes(phase), sharded, found.machine.flops)
        assert first.gathering > 0


class TestReading:
    def test_a_recipe_for_8_gpus_is_checked_for_8(self, configurations, tmp_path):
        # 1 sample on each of 8 GPUs is a prompt's group of 8; on one GPU it would be refused
        few = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        path = write_recipe(tmp_path, model_name_or_path=configurations["0.5B"], **few)
        assert plan(path, 8).recommended.fits
        with pytest.raises(RecipeError, match="num_generations|divisible"):
            plan(path, 1)

    def test_bf16_is_what_the_recipe_says(self, configurations, tmp_path):
        path = write_recipe(tmp_path, model_name_or_path=configurations["0.5B"])
        assert plan(path).setting("ddp").compute_bytes == 2
        assert plan(path, overrides=["--bf16", "false"]).setting("ddp").compute_bytes == 4
        path = write_recipe(tmp_path, model_name_or_path=configurations["0.5B"], bf16=False)
        assert plan(path).setting("ddp").compute_bytes == 4

    def test_a_student_that_is_an_adapter(self, configurations, tmp_path):
        from peft import LoraConfig

        LoraConfig(r=8, target_modules=["q_proj"], base_model_name_or_path=configurations["0.5B"]).save_pretrained(
            tmp_path / "adapter"
        )
        path = write_recipe(tmp_path, model_name_or_path=str(tmp_path / "adapter"))
        found = plan(path)
        student = found.phases()[0].models[0]
        assert student.source == configurations["0.5B"]
        assert found.sizes(found.phases()[0])["student"].adapter == 24 * 8 * (896 + 896)

    def test_a_model_without_configuration(self, tmp_path):
        (tmp_path / "empty").mkdir()
        path = write_recipe(tmp_path, model_name_or_path=str(tmp_path / "empty"))
        with pytest.raises(RecipeError, match="no config.json.*set --model_name_or_path to a folder with that file"):
            plan(path)

    def test_an_adapter_that_fits_no_layer(self, configurations, tmp_path):
        lora = {"use_peft": True, "lora_target_modules": ["no_such_layer"]}
        path = write_recipe(tmp_path, model_name_or_path=configurations["0.5B"], **lora)
        with pytest.raises(RecipeError, match="The student cannot have its adapter: .*no_such_layer"):
            plan(path)


def test_an_adapter_is_counted_on_two_layers(configurations):
    """As PEFT counts it on all of them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(configurations["0.5B"])
    adapter = {"r": 4, "target_modules": ["q_proj", "down_proj", "lm_head"], "modules_to_save": ["norm"]}
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
        found = get_peft_model(models[0], LoraConfig(**adapter), low_cpu_mem_usage=True)
    counted = sum(parameter.numel() for parameter in found.parameters() if parameter.requires_grad)
    assert adapter_size(models[1], adapter, None, "student") == counted


def test_70_billion_parameters_take_seconds(configurations, tmp_path):
    path = write_recipe(tmp_path, model_name_or_path=configurations["72B"], beta=0.1)
    plan(path, 64)
    started = time.perf_counter()
    printed(plan(path, 64))
    assert time.perf_counter() - started < 6  # 3 with a core of its own


class TestShippedRecipes:
    def test_the_paper_s_run_fits_its_hardware(self, configurations):
        path = recipes_folder() / "qwen2.5-7b-lmsys/gad.yaml"
        found = plan(path, 8, overrides=["--model_name_or_path", configurations["7B"]])
        assert found.recommended.fits and found.recommended.engine == "fsdp2"
