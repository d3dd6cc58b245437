"""Runs of several seeds: what is finished is kept, and tables grow with each seed."""

import json
from collections.abc import Callable
from pathlib import Path


class KeptRuns:
    """One seed's runs, all below one folder; what its `results.json` has is not run again."""

    def __init__(self, output_dir: str, seed: int, *kinds: str):
        self.seed, self.root = seed, Path(output_dir) / f"seed_{seed}"
        self.path = self.root / "results.json"
        self.results = json.loads(self.path.read_text()) if self.path.is_file() else {kind: {} for kind in kinds}

    def keep(self, kind: str, name: str, found: dict) -> None:
        self.results[kind][name] = found
        self.save()
        print(f"seed {self.seed}, {name}:", json.dumps(found), flush=True)

    def save(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")


def run_seeds(args, run: Callable[[int], dict], tables: Callable[[list[dict]], str]) -> None:
    results, folder = [], Path(args.output_dir)
    for seed in args.seeds:
        results.append(run(seed))
        text = tables(results)
        print(text, flush=True)
        (folder / "tables.md").write_text(text)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
