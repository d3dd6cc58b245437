"""Part c of `gpu.py`: steps of SFT, GRPO and GAD on Qwen-shaped models with random weights: where time and memory go."""

import contextlib
import gc
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from common.arguments import QUIET, parser
from common.device import DEVICE, emit, synchronize
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_bbkd import GADConfig, GADTrainer


TOKENIZER = Path(__file__).parents[1] / "recipes" / "tinyworld" / "student"
SHAPES = {
    "0.5B": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
    "1.5B": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2
    ),
    "7B LoRA": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    ),
    "smoke": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    ),
    "smoke LoRA": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    ),
}
WARMUP, TIMED = 1, 2


class Clock(TrainerCallback):
    """Seconds of each step, and within it of each phase."""

    def __init__(self):
        self.steps, self.phases = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.started = time.perf_counter()
        self.phases.append(defaultdict(float))

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.steps.append(time.perf_counter() - self.started)

    @contextlib.contextmanager
    def phase(self, name: str):
        synchronize()
        started = time.perf_counter()
        yield
        synchronize()
        # GRPO generates within the first step's preparation, before its begin is told
        (self.phases[-1] if self.phases else defaultdict(float))[name] += time.perf_counter() - started

    def mean(self) -> dict[str, float]:
        phases = self.phases[WARMUP:]
        names = dict.fromkeys(name for phase in phases for name in phase)
        found = {f"{name} s": sum(phase[name] for phase in phases) / len(phases) for name in names}
        return {"step s": sum(self.steps[WARMUP:]) / len(self.steps[WARMUP:]), **found}


def timed(method, clock: Clock, name: str):
    def call(*args, **kwargs):
        with clock.phase(name):
            return method(*args, **kwargs)

    return call


def build(shape: str, vocab: int, model_class=AutoModelForCausalLM):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = Qwen2Config(
        vocab_size=vocab, tie_word_embeddings="7B" not in shape, max_position_embeddings=4096, **SHAPES[shape], **ids
    )
    torch.manual_seed(0)
    # Frozen weights under an adapter in bfloat16; weights that are trained in float32, as TRL loads them
    dtype = torch.bfloat16 if "LoRA" in shape else torch.float32
    with torch.device(DEVICE):
        return model_class.from_config(config, dtype=dtype), tokenizer


def rows(count: int, prompt_tokens: int, answer_tokens: int) -> Dataset:
    text = " ".join(["now he has 3 pears ."] * (prompt_tokens + answer_tokens)).split()
    prompts = [" ".join([*text[number % 5 : number % 5 + prompt_tokens - 1], "."]) for number in range(count)]
    return Dataset.from_list([{"prompt": p, "completion": " " + " ".join(text[: answer_tokens - 1])} for p in prompts])


def measure(method: str, shape: str, args) -> dict:
    model, tokenizer = build(shape, args.vocab)
    parameters = model.num_parameters()
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if "LoRA" in shape else None
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "max_steps": WARMUP + TIMED,
            "per_device_train_batch_size": args.batch_size,
            "gradient_accumulation_steps": args.sequences // args.batch_size,
            "bf16": DEVICE == "cuda",
            "use_cpu": DEVICE == "cpu",
            **QUIET,
            "logging_steps": 1,
        }
        common = dict(
            model=model,
            train_dataset=rows(args.sequences * (WARMUP + TIMED), args.prompt_tokens, args.answer_tokens),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[clock],
        )
        roll_out = {
            "num_generations": 8,
            "max_completion_length": args.answer_tokens,
            # Random models end answers at random places: without this every step would be of another size
            "generation_kwargs": {"min_new_tokens": args.answer_tokens},
            "beta": 0.0,
        }
        if method == "SFT":
            trainer = SFTTrainer(args=SFTConfig(**settings), **common)
        elif method == "GRPO":
            lengths = lambda completions, **kwargs: [float(len(text) % 7) for text in completions]  # noqa: E731
            trainer = GRPOTrainer(reward_funcs=lengths, args=GRPOConfig(**settings, **roll_out), **common)
        else:
            shared = adapter is not None
            discriminator = "shared" if shared else build(shape, args.vocab, AutoModel)[0]
            trainer = GADTrainer(
                args=GADConfig(warmup_epochs=0, sft_weight=0.0, max_prompt_length=None, **settings, **roll_out),
                discriminator=discriminator,
                discriminator_peft_config=LoraConfig(r=16, target_modules="all-linear") if shared else None,
                **common,
            )
            for name in ("score", "update"):
                owner = trainer.discriminator_trainer
                setattr(owner, name, timed(getattr(owner, name), clock, f"D {name}"))
        if method != "SFT":
            trainer._generate = timed(trainer._generate, clock, "generation")
        del model, common
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    found = clock.mean()
    tokens = args.sequences * (args.prompt_tokens + args.answer_tokens)
    row = {"tokens/s": tokens / found["step s"], **found}
    if method == "SFT" and args.peak:
        # Forward and backward of what is trained; with an adapter the frozen weights have no gradient of their own
        operations = (4 if adapter else 6) * parameters * tokens
        row["of the matmul peak"] = operations / found["step s"] / (args.peak * 1e12)
    if DEVICE == "cuda":
        row |= {
            "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
            "reserved GiB": torch.cuda.max_memory_reserved() / 2**30,
        }
    return row | {"parameters": parameters}


def parse_args(argv=None):
    found = parser(__doc__)
    found.add_argument("--smoke", action="store_true")
    found.add_argument("--shapes", nargs="*", help="of: " + ", ".join(SHAPES))
    found.add_argument("--vocab", type=int, default=151936)
    found.add_argument("--sequences", type=int, default=32, help="of an optimizer step")
    found.add_argument("--batch_size", type=int, default=16)
    found.add_argument("--prompt_tokens", type=int, default=256)
    found.add_argument("--answer_tokens", type=int, default=256)
    found.add_argument("--peak", type=float, default=0.0, help="measured TFLOP/s of a large product")
    return found.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if args.smoke:
        args.vocab, args.sequences, args.batch_size, args.prompt_tokens, args.answer_tokens = 512, 16, 8, 8, 8
    for shape in args.shapes or (["smoke", "smoke LoRA"] if args.smoke else ["0.5B", "1.5B", "7B LoRA"]):
        for method in ("SFT", "GRPO", "GAD"):
            try:
                row = measure(method, shape, args)
            except Exception as error:  # one that fails is a row, and the others are still worth their time
                row = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            table = f"steps of {args.sequences} sequences, {args.prompt_tokens} + {args.answer_tokens} tokens"
            emit(table, model=shape, method=method, **row)
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
