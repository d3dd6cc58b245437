"""
What to train: every text-only method from one start, SeqKD at its plateau, in two worlds.

Every arm samples and trains on as many answers as GAD, with settings chosen by as many trials on validation rows. A student is
then compared with the start at equal temperature and, over a sweep of temperatures, at equal diversity:
`docs/results/scoreboard.md` is written from its tables.

    python benchmarks/scoreboard.py tinyworld
    python benchmarks/scoreboard.py stories --student stories260K --teacher stories15M-fp16 --data stories15M_generations.jsonl

Each arm runs in a process of its own, whose memory is measured. What is finished is kept in `output_dir` and not run again.
"""

import functools
import json
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from common.arguments import parser
from common.arms import WORLDS, arms_of
from common.tables import markdown
from common.tradeoff import plot

from trl_bbkd.evaluation.diversity import difference_at_equal_diversity, jackknife


START = "SeqKD at its plateau"


def parse_args(argv=None):
    found = parser(__doc__)
    found.add_argument("world", choices=WORLDS)
    found.add_argument("--output_dir", default="output/scoreboard")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--arms", nargs="+", help="by default all that the world has")
    for name in ("student", "teacher", "data"):
        found.add_argument(f"--{name}", help="of the stories, as for real_text.py")
    return found.parse_args(argv)


def make_world(args):
    from common.worlds import Stories, Tinyworld

    folder = Path(args.output_dir) / args.world
    folder.mkdir(parents=True, exist_ok=True)
    if args.world == "tinyworld":
        return Tinyworld(folder)
    return Stories(folder, args.student, args.teacher, args.data)


# Trainings


def in_own_process(function, *arguments) -> None:
    """In a process whose memory is its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{function.__name__}{arguments[1:]} ended with status {process.exitcode}.")


def train(args, arm: str, number: int, seed: int) -> None:
    """Train an arm's student with its `number`-th settings, and keep what that took."""
    world = make_world(args)
    train_student, grid = arms_of(args.world)[arm]
    settings = grid[number]
    folder = run_folder(args, arm, number, seed)
    start = world.start(seed)
    began, held = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train_student(world, start, folder, seed, settings)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    write(folder / "training.json", {"settings": settings, "seconds": time.perf_counter() - began, "MiB": used / 1024})


def measure(args, student: Path, path: Path, split: str, seed: int) -> None:
    """Write a student's samples and verdicts, where there are none yet."""
    write(path, make_world(args).measure(student, split, seed, read(path)))


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n")


def run_folder(args, arm: str, number: int, seed: int) -> Path:
    return Path(args.output_dir) / args.world / f"seed{seed}" / arm.replace(", ", "_").replace(" ", "-") / str(number)


def trained(args, arm: str, number: int, seed: int) -> Path:
    folder = run_folder(args, arm, number, seed)
    if not (folder / "training.json").is_file():
        in_own_process(train, args, arm, number, seed)
    return folder


def measured(args, world, student: Path, split: str, seed: int) -> dict:
    path = student / f"{split}-{seed}.json"
    if world.missing(read(path)):
        in_own_process(measure, args, student, path, split, seed)
    return read(path)


# Comparisons


def start_of(args, seed: int) -> Path:
    folder = Path(args.output_dir) / args.world / f"seed{seed}" / "seqkd"
    if not (folder / "config.json").is_file():
        in_own_process(make_start, args, seed)
    return folder


def make_start(args, seed: int) -> None:
    make_world(args).start(seed)


def curve(world, found: dict, prompts) -> list[tuple[float, float]]:
    """Diversity and quality at each temperature, of some prompts."""
    points = []
    for temperature, groups in found["texts"].items():
        points.append((world.diversity([groups[number] for number in prompts]), quality(found, temperature, prompts)))
    return points


def mean_curve(world, found: list[dict]) -> dict[str, tuple[float, float]]:
    """Over the seeds, diversity and quality at each temperature."""
    prompts = range(len(found[0]["texts"]["1.0"]))
    temperatures = sorted(found[0]["texts"], key=float)
    seeds = [dict(zip(each["texts"], curve(world, each, prompts), strict=True)) for each in found]
    return {
        temperature: tuple(map(statistics.fmean, zip(*(points[temperature] for points in seeds), strict=True)))
        for temperature in temperatures
        if all(temperature in points for points in seeds)
    }


def quality(found: dict, temperature: str, prompts) -> float:
    return statistics.fmean(value for number in prompts for value in found["quality"][temperature][number])


def at_equal_diversity(world, own: dict, other: dict, prompts) -> float:
    return difference_at_equal_diversity(curve(world, own, prompts), curve(world, other, prompts))


def at_one(own: dict, other: dict, prompts) -> float:
    return quality(own, "1.0", prompts) - quality(other, "1.0", prompts)


def gain(difference: Callable, found: list[dict], starts: list[dict]) -> tuple[str, str]:
    """The mean of the seeds' differences with its standard error over prompts, and each seed's difference."""
    each = [
        jackknife(functools.partial(difference, own, start), len(own["texts"]["1.0"]))
        for own, start in zip(found, starts, strict=True)
    ]
    error = math.sqrt(sum(error**2 for _, error in each)) / len(each)
    mean = statistics.fmean(gained for gained, _ in each)
    return f"{mean:+.3f} ± {error:.3f}", ", ".join(f"{gained:+.3f}" for gained, _ in each)


def choose(args, world, arm: str) -> int:
    """The settings that are best at equal diversity on validation rows, of seed 0."""
    start = measured(args, world, start_of(args, 0), "validation", 0)
    gains = []
    for number in range(len(arms_of(args.world)[arm][1])):
        found = measured(args, world, trained(args, arm, number, 0), "validation", 0)
        prompts = range(len(found["texts"]["1.0"]))
        gained = at_equal_diversity(world, found, start, prompts)
        gains.append(-math.inf if math.isnan(gained) else gained)
        print(
            f"{arm}, {arms_of(args.world)[arm][1][number]}: {gains[-1]:+.4f} at equal diversity on validation rows",
            flush=True,
        )
    return max(range(len(gains)), key=gains.__getitem__)


def row(world, arm: str, found: list[dict], starts: list[dict], training: list[dict]) -> list:
    of_seeds = [quality(each, "1.0", range(len(each["quality"]["1.0"]))) for each in found]
    cells = [arm, f"{statistics.fmean(of_seeds):.3f}", ", ".join(f"{each:.3f}" for each in of_seeds)]
    if arm == START:
        cells += [""] * 3
    else:
        cells.append(gain(at_one, found, starts)[0])
        cells += gain(functools.partial(at_equal_diversity, world), found, starts)
    cells += [
        f"{statistics.fmean(world.diversity(each['texts']['1.0']) for each in found):.3f}",
        f"{statistics.fmean(each['nll'] for each in found):.3f}",
        f"{statistics.fmean(each['length_ratio'] for each in found):.3f}",
    ]
    if not training:
        return [*cells, "", "", ""]
    settings = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in training[0]["settings"].items()
    )
    seconds, memory = (statistics.fmean(each["seconds"] for each in training), max(each["MiB"] for each in training))
    return [*cells, f"{seconds:.0f}", f"{memory:.0f}", settings]


HEADER = [
    "arm", "quality, T=1.0", "of each seed", "minus SeqKD, T=1.0", "minus SeqKD, equal diversity", "of each seed",
    "diversity, T=1.0", "teacher NLL", "length ratio", "seconds", "MiB", "chosen settings",
]  # fmt: skip


def main(argv=None) -> None:
    args = parse_args(argv)
    world = make_world(args)
    starts = [measured(args, world, start_of(args, seed), "test", seed) for seed in args.seeds]
    rows, curves = [row(world, START, starts, starts, [])], {START: mean_curve(world, starts)}
    for arm in args.arms or arms_of(args.world):
        number = choose(args, world, arm)
        folders = [trained(args, arm, number, seed) for seed in args.seeds]
        found = [measured(args, world, folder, "test", seed) for folder, seed in zip(folders, args.seeds, strict=True)]
        training = [json.loads((folder / "training.json").read_text()) for folder in folders]
        rows.append(row(world, arm, found, starts, training))
        curves[arm] = mean_curve(world, found)
        plot(world.folder / "tradeoff.png", world.title, world.quality_name, world.diversity_name, curves)
        text = markdown(HEADER, rows) + "\n"
        print(text, flush=True)
        (world.folder / "table.md").write_text(text)


if __name__ == "__main__":
    main()
