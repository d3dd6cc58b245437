"""
Everything that only a GPU can tell, in order of value: one part after the other, each in processes of its own.

    python benchmarks/gpu.py --output_dir output/gpu                # all parts, 25 minutes on one H100
    python benchmarks/gpu.py --parts a b
    python benchmarks/gpu.py --smoke                                # the same code on tiny models, on a CPU too

a. `gpu_checks.py`: the loss on soft targets against full logits in float64; 20 steps in bfloat16 of every method's
   recipe, and the same run resumed in the middle.
b. `gpu_loss.py`: time and memory of the loss on soft targets against full logits, TRL's functions and Liger's; chunk sizes.
c. `gpu_steps.py`: steps of SFT, GRPO and GAD of Qwen-shaped models with random weights.
d. `gad_memory.py`: GAD on one frozen model, in bfloat16 and (with bitsandbytes) in 4 bits.
e. `real_text.py`: GAD against SeqKD on real text, ten times the samples of the CPU's evidence, five seeds side by side;
   it needs `--models` and `--data`.

What a part prints as JSON lines is kept as it comes, so that a part stopped at its limit keeps what it has: `results.json`
and `results.md` in `--output_dir`.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from common.arguments import parser


HERE = Path(__file__).parent
SECONDS = {"a": 260, "b": 200, "c": 420, "d": 120, "e": 500}
SEEDS = 5
NOISE = re.compile(r"it/s\]|examples/s\]|Warning|warnings\.warn|^\{'")
TEN_TIMES = ["--sft_steps", "300", "--discriminator_warmup_steps", "12", "--adversarial_steps", "120"]
TEN_TIMES += ["--prompts_per_step", "32", "--num_generations", "8", "--temperatures", "1.0"]


def parse_args(argv=None):
    found = parser(__doc__)
    found.add_argument("--parts", nargs="+", default=list(SECONDS), choices=list(SECONDS))
    found.add_argument("--output_dir", default="output/gpu")
    found.add_argument("--smoke", action="store_true", help="tiny models and few steps")
    found.add_argument("--seconds", type=float, help="limit of each part, instead of its own")
    found.add_argument("--models", help="part e: folder with stories260K and stories15M-fp16")
    found.add_argument("--data", help="part e: the teacher's text, JSON lines")
    return found.parse_args(argv)


def device_facts() -> dict:
    facts = {"device": "CPU", "torch": torch.__version__, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        facts["matmul_tflops"] = round(matmul_flops() / 1e12, 1)
    for name in ("transformers", "trl", "peft", "accelerate", "triton", "liger_kernel", "bitsandbytes"):
        try:
            module = __import__(name)
            facts[name] = getattr(module, "__version__", "installed")
        except ImportError:
            facts[name] = None
    return facts


def matmul_flops(size: int = 8192) -> float:
    """Measured floating-point operations a second of a large bfloat16 product of random matrices."""
    first, second = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        first @ second
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        first @ second
    end.record()
    torch.cuda.synchronize()
    return 2 * size**3 / (start.elapsed_time(end) / 1e3 / 10)


def commands(part: str, args, facts: dict) -> list[list[str]]:
    """Commands of a part that run side by side."""
    smoke = ["--smoke"] if args.smoke else []
    if part in "ab":
        return [["gpu_checks.py" if part == "a" else "gpu_loss.py", *smoke]]
    if part == "c":
        return [["gpu_steps.py", *smoke, "--peak", str(facts.get("matmul_tflops", 0.0))]]
    if part == "d":
        size = (
            ["--hidden_size", "64", "--num_layers", "2"]
            if args.smoke
            else ["--hidden_size", "2048", "--num_layers", "16"]
        )
        device = ["--device", "cuda", "--dtype", "bfloat16"] if torch.cuda.is_available() else []
        four_bit = [["gad_memory.py", *size, *device, "--four_bit"]] if facts["bitsandbytes"] else []
        return [["gad_memory.py", *size, *device], *four_bit]
    if not (args.models and args.data):
        return []
    models = [
        f"--{role}={Path(args.models) / name}"
        for role, name in (("student", "stories260K"), ("teacher", "stories15M-fp16"))
    ]
    few = ["--sft_steps", "2", "--discriminator_warmup_steps", "1", "--adversarial_steps", "1", "--test_prompts", "4"]
    few += ["--validation_prompts", "4", "--samples", "1", "--max_completion_length", "8", "--temperatures", "1.0"]
    return [
        ["real_text.py", *models, "--data", args.data, "--seeds", str(seed), *(few if args.smoke else TEN_TIMES)]
        + ["--output_dir", str(Path(args.output_dir) / f"real_text_{seed}")]
        for seed in range(1 if args.smoke else SEEDS)
    ]


def run_part(part: str, args, facts: dict) -> dict:
    folder = Path(args.output_dir)
    limit = args.seconds or SECONDS[part]
    started = time.perf_counter()
    running = []
    for number, command in enumerate(commands(part, args, facts)):
        log = folder / f"part_{part}_{number}.log"
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, str(HERE / command[0]), *command[1:]],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        running.append((command, log, process))
    found = {"commands": [], "rows": [], "notes": []}
    for command, log, process in running:
        try:
            code = process.wait(max(1.0, limit - (time.perf_counter() - started)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = f"stopped after {limit:.0f} s"
        lines = log.read_text(errors="replace").splitlines()
        found["commands"].append({"command": " ".join(["python", *command]), "exit": code})
        found["rows"] += [json.loads(line) for line in lines if line.startswith('{"table"')]
        if part in "de" or code != 0:
            printed = [line for line in lines if line.strip() and not line.startswith('{"table"')]
            found["notes"] += [line[:600] for line in printed if not NOISE.search(line)][-25:]
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def markdown(facts: dict, parts: dict) -> str:
    lines = [f"# {facts['device']}", "", ", ".join(f"{name} {value}" for name, value in facts.items() if value), ""]
    for part, found in parts.items():
        lines += [f"## Part {part} ({found['seconds']:.0f} s)", ""]
        lines += [f"`{each['command']}`: exit {each['exit']}" for each in found["commands"]] + [""]
        tables: dict[str, list[dict]] = {}
        for row in found["rows"]:
            tables.setdefault(row["table"], []).append({k: v for k, v in row.items() if k != "table"})
        for name, rows in tables.items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            lines += [f"**{name}**", "", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
            lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows] + [""]
        if found["notes"]:
            lines += ["```", *found["notes"], "```", ""]
    return "\n".join(lines)


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def main(argv=None) -> None:
    args = parse_args(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    facts, parts = device_facts(), {}
    for part in args.parts:
        parts[part] = run_part(part, args, facts)
        (folder / "results.json").write_text(json.dumps({"facts": facts, "parts": parts}, indent=1) + "\n")
        (folder / "results.md").write_text(markdown(facts, parts))
        print(f"part {part}: {parts[part]['seconds']} s, {len(parts[part]['rows'])} rows", flush=True)
    print((folder / "results.md").read_text())


if __name__ == "__main__":
    main()
