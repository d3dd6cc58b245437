"""The report's samples come from the trainer's vLLM: of every student, from its own weights."""

import contextlib
import json
import weakref

import pytest
import torch
from accelerate.utils import is_torch_version
from datasets import Dataset
from transformers import AutoTokenizer, GenerationMixin

from tests.processes import on_processes
from tests.recipes import write_recipe
from tests.sharding.runs import start
from trl_bbkd.data.teacher_data import tokenize_teacher_data
from trl_bbkd.evaluation.student import evaluate_student
from trl_bbkd.evaluation.vllm import TrainersVLLM
from trl_bbkd.gad.trainer import GADTrainer
from trl_bbkd.host._compat import is_in_parts
from trl_bbkd.host.engines import gathered
from trl_bbkd.host.model_files import load_model
from trl_bbkd.host.sharding import AVERAGES_ON_CPUS
from trl_bbkd.runs import text_job
from trl_bbkd.runs.recipe import load_recipe
from trl_bbkd.runs.run import run

from . import stand_in
from .runs import ADAPTER, distance, merged, parameters_of, whole
from .server import serving


LORA = {"use_peft": True, "lora_r": ADAPTER["r"], "lora_alpha": ADAPTER["lora_alpha"]}
LORA |= {"lora_target_modules": "all-linear"}
COLOCATE = {"use_vllm": True, "vllm_mode": "colocate"}
RUN = {"max_steps": 2, "eval_samples": 2, "discriminator_only_steps": 0, "learning_rate": 1e-2}
CASES = {
    "asleep, LoRA": ("single", 1, COLOCATE | LORA | {"vllm_enable_sleep_mode": True}),
    "full": ("single", 1, COLOCATE),
    "fsdp2": ("fsdp2", 2, COLOCATE),
    "fsdp2, LoRA": ("fsdp2", 2, COLOCATE | LORA),
    "server": ("single", 1, {"use_vllm": True, "vllm_mode": "server"}),
    "server, fsdp2, LoRA": ("fsdp2", 2, {"use_vllm": True, "vllm_mode": "server"} | LORA),
}


def watched_run(engine: str, path) -> list[float]:
    """Run a recipe. Returns how far vLLM's weights were from each student's that it held."""
    start(engine)
    stand_in.install()
    holding, seen = TrainersVLLM.holding, []

    @contextlib.contextmanager
    def watching(self, model):
        with holding(self, model):
            with gathered([each for each in model.parameters() if is_in_parts(each)], is_written=False):
                state = {name: whole(value).clone() for name, value in model.state_dict().items()}
            if stand_in.LLM.made:
                seen.append(distance(merged(state), parameters_of(stand_in.LLM.made[0])))
            yield self

    def generate(*args, **kwargs):
        raise AssertionError("transformers samples")

    students = []

    def initialised(self, *args, **kwargs):
        init(self, *args, **kwargs)
        students.append(weakref.ref(self.model))

    def train_seqkd(*args, **kwargs):
        # DeepSpeed keeps its engine's model, with vLLM or without
        assert engine == "zero3" or students[0]() is None, "vLLM holds on to GAD's student while SeqKD trains"
        return seqkd(*args, **kwargs)

    init, seqkd = GADTrainer.__init__, text_job.train_seqkd
    GADTrainer.__init__, text_job.train_seqkd = initialised, train_seqkd
    TrainersVLLM.holding, GenerationMixin.generate = watching, generate
    run(load_recipe(path))
    return seen


@pytest.mark.parametrize(
    "case", [name if name == "asleep, LoRA" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_report_samples_with_vllm(case, tmp_path, recipe_folder, tiny_model_dir):
    engine, processes, config = CASES[case]
    if processes > 1 and is_torch_version("<", AVERAGES_ON_CPUS):
        pytest.skip("this torch does not average gradients on CPU processes")
    report_of(engine, processes, config, tmp_path, recipe_folder, tiny_model_dir)


def report_of(engine, processes, config, tmp_path, recipe_folder, tiny_model_dir):
    with contextlib.ExitStack() as stack:
        if config["vllm_mode"] == "server":
            config = config | {"vllm_server_base_url": stack.enter_context(serving(tiny_model_dir)).url}
        config = config | {"per_device_train_batch_size": 8 // processes}
        recipe = write_recipe(recipe_folder, tiny_model_dir, tmp_path / "out", **RUN, **config)
        seen, *_ = on_processes(processes, watched_run, engine, recipe)
    if config["vllm_mode"] == "colocate":
        # Before, after, and along the way, of GAD and of SeqKD
        assert len(seen) == 1 + 1 + 1 + 2 + 1 and max(seen) < 1e-5
    saved = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {"undistilled", "SeqKD", "GAD"} <= saved["results"].keys()
    # Greedy answers are those of the saved students, whoever writes them
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = [json.loads(line) for line in (recipe_folder / "test.jsonl").read_text().splitlines()]
    rows = tokenize_teacher_data(Dataset.from_list(rows), tokenizer, max_completion_length=12)[0].to_list()
    for name, folder in (
        ("undistilled", tiny_model_dir),
        ("GAD", tmp_path / "out"),
        ("SeqKD", tmp_path / "out/seqkd"),
    ):
        student = load_model(str(folder), dtype=torch.float32)
        expected = evaluate_student(student, tokenizer, rows, max_new_tokens=12, num_samples=2)
        found = saved["results"][name]
        for key in ("length@greedy", "truncated@greedy", "teacher_nll"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3), (name, key)
        # Samples are other ones, of the same distribution
        assert found["length@t1.0"] == pytest.approx(expected["length@t1.0"], abs=6)
