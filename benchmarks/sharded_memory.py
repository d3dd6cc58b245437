"""
What each process of GAD holds of student, discriminator and KL reference under FSDP2, against the formulas of `trl-bbkd plan`.

    python benchmarks/sharded_memory.py
    python benchmarks/sharded_memory.py --processes 1 2 4 8 --num_layers 32

The models are built on the spot, with random weights, and what they read is a few tokens long: weights are what it takes. The
processes are on the CPU. With one process nothing is sharded. Held bytes are those of the local parts; what a moment takes is the
most that PyTorch's CPU allocator gave out from its begin on, seen by the profiler, in the second step with a reference.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


TOKENIZER = Path(__file__).parents[1] / "recipes" / "tinyworld" / "student"
MB = 2**20
# What `accelerate launch` sets with recipes/accelerate_configs/fsdp2.yaml
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
SAMPLES, PROMPT_TOKENS, ANSWER_TOKENS = 8, 2, 8
STEPS = 3  # one of warm-up, two with a reference
LEARNS = {"student": "the student learns", "discriminator": "the discriminator learns"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_layers", type=int, default=24)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def build_model(arguments, directory: str) -> int:
    from common.models import llama_config
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = {"num_attention_heads": arguments.hidden_size // 64, "max_position_embeddings": 64}
    model = LlamaForCausalLM(llama_config(tokenizer, arguments.hidden_size, arguments.num_layers, width=4, **sizes))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.num_parameters()


class Moments:
    """The most that was allocated from each moment's begin to its end, by name."""

    def __init__(self):
        self.found: dict[str, int] = {}
        self._running = None

    def begin(self, name: str) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.end()
        self._running = name, profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._running[1].start()

    def end(self) -> None:
        if self._running is None:
            return
        (name, profiler), self._running = self._running, None
        profiler.stop()
        events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
        allocated = peak = 0
        for event in sorted(events, key=lambda each: each.start_ns()):
            allocated += event.nbytes()
            peak = max(peak, allocated)
        self.found[name] = peak


def own_bytes(tensors) -> int:
    from torch.distributed.tensor import DTensor

    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def gradients(parameters) -> int:
    return own_bytes(parameter.grad for parameter in parameters if parameter.grad is not None)


def measure(arguments) -> None:
    """On each process of a run; the main one writes what all of them found."""
    from accelerate.utils import gather_object
    from common.arguments import QUIET
    from datasets import Dataset
    from transformers import TrainerCallback

    from trl_bbkd import GADConfig, GADTrainer

    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        os.environ.update(FSDP2)
    moments, held = Moments(), {}

    class Measured(GADTrainer):
        """Begins a moment where a model begins to work, in the last step."""

        def _compute_loss(self, model, inputs):
            if self.state.global_step == STEPS - 1:
                moments.begin(LEARNS["student"])
            return super()._compute_loss(model, inputs)

        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            if model is not self.ref_model or self.state.global_step < STEPS - 1:
                return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            moments.begin("the reference reads")
            found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            moments.end()
            return found

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            held["student gradients"] = gradients(model.parameters())

        def on_step_end(self, *args, **kwargs):
            moments.end()

    with tempfile.TemporaryDirectory() as output_dir:
        trainer = Measured(
            model=arguments.model,
            args=GADConfig(
                output_dir,
                sft_weight=0.0,
                use_cpu=True,
                bf16=False,
                **QUIET,
                per_device_train_batch_size=SAMPLES // processes,
                num_generations=4,
                max_completion_length=ANSWER_TOKENS,
                num_train_epochs=STEPS,
                warmup_epochs=1,
                max_steps=STEPS,
                discriminator_only_steps=0,
                beta=0.1,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": "1 2", "completion": "3"}] * (SAMPLES // 4)),
            callbacks=[Gradients()],
        )
        engine = trainer.discriminator_trainer.engine
        update, step = trainer.discriminator_trainer.update, engine.step

        def measured_update(*args, **kwargs):
            if trainer.state.global_step == STEPS - 1:
                moments.begin(LEARNS["discriminator"])
            found = update(*args, **kwargs)
            moments.end()
            return found

        def measured_step():
            held["discriminator gradients"] = gradients(engine.parameters)
            return step()

        trainer.discriminator_trainer.update, engine.step = measured_update, measured_step
        trainer.train()
    models = {"student": trainer.model, "discriminator": engine.module, "reference": trainer.ref_model}
    held |= {f"{name} weights": own_bytes(module.parameters()) for name, module in models.items()}
    for name, optimizer in (("student", trainer.optimizer), ("discriminator", engine.optimizer)):
        states = (value for state in optimizer.state.values() for value in state.values() if value.dim())
        held[f"{name} optimizer"] = own_bytes(states)
    found = gather_object([{"held": held, "moments": moments.found}])
    if trainer.accelerator.is_main_process:
        Path(arguments.output).write_text(json.dumps(found))


def planned(model: str, processes: int):
    """The footprint of the plan, of a run in float32 that keeps activations."""
    from trl_bbkd.plan.footprint import footprint
    from trl_bbkd.plan.memory import Setting
    from trl_bbkd.plan.models import ModelSizes
    from trl_bbkd.runs.held_models import HeldModel, Phase, reference_of

    rows = SAMPLES // processes
    student = HeldModel("student", model, "model_name_or_path", rows=rows, learns=1.0)
    beside = HeldModel("discriminator", model, "discriminator", kind="trunk", has_own_engine=True, rows=rows)
    models, measured = (student, reference_of(student), beside), ModelSizes()
    engine = "ddp" if processes == 1 else "fsdp2"
    setting = Setting(engine, processes, 2**40, compute_bytes=4, checkpoints=False)
    phase = Phase("training", models, PROMPT_TOKENS + ANSWER_TOKENS, rows)
    return footprint(phase, {each.name: measured(each) for each in models}, setting)


def run(arguments, processes: int, model: str) -> list[dict]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "found.json")
        command = [sys.executable, *(launcher if processes > 1 else []), sys.argv[0]]
        command += ["--model", model, "--output", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(output.read_text())


def show(found: dict[int, list[dict]], model: str) -> None:
    counts = sorted(found)
    whole = found[1][0]["held"] if 1 in found else None
    print("| largest process, MB | " + " | ".join(str(count) for count in counts) + " |")
    print("| --- |" + " ---: |" * len(counts))
    for part in found[counts[0]][0]["held"]:
        cells = []
        for count in counts:
            largest = max(process["held"][part] for process in found[count])
            ratio = f" ({largest * count / whole[part]:.2f}/{count})" if whole and count > 1 else ""
            cells.append(f"{largest / MB:.0f}{ratio}")
        print(f"| {part} | " + " | ".join(cells) + " |")
    plans = {count: planned(model, count) for count in counts}
    for moment in found[counts[0]][0]["moments"]:
        cells = []
        for count in counts:
            largest = max(process["moments"][moment] for process in found[count])
            formulas = [value for name, value in plans[count].moments.items() if name == moment]
            cells.append(f"{largest / MB:.0f} (plan {sum(formulas[0].values()) / MB:.0f})")
        print(f"| {moment} | " + " | ".join(cells) + " |")
    cells = []
    for count in counts:
        peak = max(
            sum(v for k, v in p["held"].items() if "gradients" not in k) + max(p["moments"].values())
            for p in found[count]
        )
        cells.append(f"{peak / MB:.0f} (plan {plans[count].peak / MB:.0f})")
    print("| all that is held, and the largest moment | " + " | ".join(cells) + " |")


def main(argv=None):
    arguments = parse_args(argv)
    if arguments.model:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as model:
        parameters = build_model(arguments, model)
        print(f"{parameters / 1e6:.0f} M parameters in float32, {arguments.num_layers} layers, FSDP2 on CPU processes")
        show({count: run(arguments, count, model) for count in arguments.processes}, model)


if __name__ == "__main__":
    main()
