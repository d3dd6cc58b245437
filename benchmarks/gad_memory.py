"""
Memory of GAD with a discriminator of its own against one on the student's backbone (`discriminator="shared"`).

    python benchmarks/gad_memory.py
    python benchmarks/gad_memory.py --four_bit            # the same on a 4-bit base model, needs bitsandbytes
    python benchmarks/gad_memory.py --device cuda

The model is built on the spot, with random weights; student and discriminator are LoRA adapters, the KL reference is a
frozen copy of the student's. Each variant runs in a process of its own: one step of warm-up, one adversarial step. Then
the bytes of all parameters, buffers and optimizer states are added up, each storage once, gradients left out. The peak is
that of the whole run: resident memory of the process on a CPU, allocated memory on a GPU.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common.processes import peak_bytes, printed_json, run_again


TOKENIZER = Path(__file__).parents[1] / "recipes" / "tinyworld" / "student"
VARIANTS = {"separate": "a LoRA discriminator with its own backbone", "shared": 'discriminator="shared"'}
MB = 2**20


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank of student, reference and discriminator")
    parser.add_argument("--head", choices=["scalar", "likelihood"], default="scalar")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base models")
    parser.add_argument("--four_bit", action="store_true", help="base models in NF4")
    parser.add_argument("--variant", choices=["build", *VARIANTS], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def build_model(arguments):
    from common.models import llama_config
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = {"num_attention_heads": arguments.hidden_size // 64, "max_position_embeddings": 512}
    config = llama_config(
        tokenizer, arguments.hidden_size, arguments.num_layers, width=4, tie_word_embeddings=True, **sizes
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(arguments.model)
    tokenizer.save_pretrained(arguments.model)
    return {"parameters": model.num_parameters()}


def tensors_of(trainer):
    """Everything that stays from step to step: weights, references, optimizer states."""
    modules = [trainer.accelerator.unwrap_model(trainer.model), trainer.discriminator]
    for module in modules:
        for parameter in module.parameters():
            yield parameter
            quant_state = getattr(parameter, "quant_state", None)
            if quant_state is not None:
                yield from (value for value in quant_state.as_dict().values() if hasattr(value, "untyped_storage"))
        yield from module.buffers()
    for optimizer in (trainer.optimizer, trainer.discriminator_trainer.engine.optimizer):
        for state in optimizer.state.values():
            yield from (value for value in state.values() if hasattr(value, "untyped_storage"))


def measure(arguments):
    import torch
    from common.arguments import QUIET
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from trl_bbkd import GADConfig, GADTrainer

    lora = {"r": arguments.rank, "target_modules": "all-linear"}
    quantization_config = None
    if arguments.four_bit:
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, arguments.dtype)
        )
    shared = arguments.variant == "shared"
    before = peak_bytes(arguments.device)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = GADTrainer(
            model=arguments.model,
            args=GADConfig(
                output_dir,
                sft_weight=0.0,
                use_cpu=arguments.device == "cpu",
                bf16=arguments.dtype == "bfloat16",
                model_init_kwargs={"dtype": arguments.dtype},
                **QUIET,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=8,
                num_train_epochs=2,
                max_steps=2,
                logging_steps=1,
                discriminator_only_steps=0,
                learning_rate=1e-4,
                discriminator_learning_rate=1e-4,
                beta=0.1,
                discriminator="shared" if shared else None,
                discriminator_head=arguments.head,
                discriminator_load_in_4bit=arguments.four_bit and not shared,
            ),
            train_dataset=Dataset.from_list([{"prompt": "1 2", "completion": "3"}] * 8),
            quantization_config=quantization_config,
            peft_config=LoraConfig(**lora, task_type="CAUSAL_LM"),
            discriminator_peft_config=LoraConfig(**lora),
        )
        trainer.train()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_of(trainer)}
    steps = [entry for entry in trainer.state.log_history if "adversarial_phase" in entry]
    assert [entry["adversarial_phase"] for entry in steps] == [0.0, 1.0] and "kl" in steps[1]
    peak = peak_bytes(arguments.device)
    return {"kept": sum(storage.nbytes() for storage in storages.values()), "peak": peak, "added": peak - before}


def run(variant, model):
    # This process stays small: a child inherits its parent's peak
    return printed_json(run_again(*sys.argv[1:], "--variant", variant, "--model", model))


def main(argv=None):
    arguments = parse_args(argv)
    if arguments.variant:
        print(json.dumps(build_model(arguments) if arguments.variant == "build" else measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as directory:
        parameters = run("build", directory)["parameters"]
        print(
            f"{parameters / 1e6:.0f} M parameters in {'NF4' if arguments.four_bit else arguments.dtype}, LoRA of rank "
            f"{arguments.rank} on all linear layers, {arguments.head} head, {arguments.device}"
        )
        results = {}
        for variant, description in VARIANTS.items():
            result = results[variant] = run(variant, directory)
            print(
                f"{description:44} weights, references, optimizers {result['kept'] / MB:7.0f} MB, "
                f"peak {result['peak'] / MB:7.0f} MB, of it {result['added'] / MB:7.0f} MB over the libraries"
            )
    for name in ("kept", "peak", "added"):
        print(f"shared / separate, {name}: {results['shared'][name] / results['separate'][name]:.3f}")


if __name__ == "__main__":
    main()
