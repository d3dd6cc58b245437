"""
How fast the command line answers: `trl-bbkd --help` and `python -m trl_bbkd --help` against `trl --help`.

    python benchmarks/help_time.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path


SCRIPTS = Path(sys.executable).parent
COMMANDS = {
    "trl --help": [SCRIPTS / "trl", "--help"],
    "trl-bbkd --help": [SCRIPTS / "trl-bbkd", "--help"],
    "trl-bbkd collect --help": [SCRIPTS / "trl-bbkd", "collect", "--help"],
    "python -m trl_bbkd --help": [sys.executable, "-m", "trl_bbkd", "--help"],
}
RUNS = 7


def seconds(command):
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    medians = {name: statistics.median(seconds(command) for _ in range(RUNS)) for name, command in COMMANDS.items()}
    for name, median in medians.items():
        print(f"{name:28} {median:.3f} s, {median / medians['trl --help']:.2f} of trl")


if __name__ == "__main__":
    main()
