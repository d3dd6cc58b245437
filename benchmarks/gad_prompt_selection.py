"""
Does it help GAD to learn only from the prompts on which discriminator and student disagree? Measured in tinyworld.

    OMP_NUM_THREADS=1 python benchmarks/gad_prompt_selection.py --output_dir output/ablations2

The world, student, discriminator and rates are those of `tinyworld_ablations.py` with a discriminator that has not
memorised the answers (second table of `docs/results/gad.md`); what that script has built in `output_dir` is used again.
Every step samples the groups of a pool of 64 prompts and keeps 32: student and discriminator learn from these alone.
With d the discriminator's scores of a group's samples, s the student's mean log-probability per token of each, and r
Pearson's correlation of d and s within the group, the 32 kept are those with the highest

    disagreement            1 - r
    weighted disagreement   (1 - r) std(d), so that groups the discriminator hardly tells apart are not taken
    agreement               r, the opposite rule
    random                  a number drawn at random, the control of all

"plain" samples and keeps 32 prompts. Two more baselines: 64 prompts a step, all learned from, which costs no less to
sample than a pool; ten times the KL, since selecting by disagreement also keeps the student near its start.

Finished arms are kept in `output_dir` and not run again. Hardware: one CPU core. An arm takes 44 to 77 s of CPU time,
everything for 3 seeds 34 minutes (11 of them for the starts), 49 minutes of wall time on a busy machine.
"""

import functools
import statistics
import time
from pathlib import Path

import tinyworld_ablations as ablations
import torch
from common.arguments import evidence_parser
from common.tables import each_of, markdown, mean_of
from common.tinyworld import world

from trl_bbkd import GADTrainer
from trl_bbkd.discriminator.model import collate_responses
from trl_bbkd.discriminator.trainer import PairBatch, PairScores


POOL, KEPT = 64, 32
GROUP = ablations.COMMON["num_generations"]
DIAGNOSE_EVERY = 5
PLAIN = "plain"
POOLED = {"per_device_train_batch_size": POOL * GROUP}
# rule, settings
ARMS = {
    PLAIN: (None, {}),
    "plain, 64 prompts a step": (None, POOLED),
    "plain, beta 0.1": (None, {"beta": 0.1}),
    "random": ("random", POOLED),
    "disagreement": ("disagreement", POOLED),
    "weighted disagreement": ("weighted disagreement", POOLED),
    "agreement": ("agreement", POOLED),
}
COLUMNS = {name: ablations.COLUMNS[name] for name in ablations.COLUMNS if name != "T=0.7"}
COLUMNS |= {"CPU seconds": ("seconds", "{:,.0f}")}


def parse_args(argv=None):
    parser = evidence_parser(__doc__, "output/ablations2", ARMS)
    parser.add_argument("--max_steps", type=int, help="for a quick try: steps of every arm")
    parser.add_argument("--table", action="store_true", help="print the tables of what has been run")
    return parser.parse_args(argv)


def correlation(scores: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Pearson's, of each row; 0 where one side does not vary."""
    scores, log_probs = (x - x.mean(dim=1, keepdim=True) for x in (scores, log_probs))
    norms = scores.norm(dim=1) * log_probs.norm(dim=1)
    return (scores * log_probs).sum(dim=1) / norms.clamp(min=1e-6)


def priorities(rule: str, scores: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """How much each prompt is wanted, from the scores and log-probabilities `(P, G)` of its samples."""
    r, std = correlation(scores, log_probs), scores.std(dim=1)
    return {
        "random": torch.rand(len(scores)),
        "disagreement": 1 - r,
        "weighted disagreement": (1 - r) * std,
        "agreement": r,
    }[rule]


def valid_pairs(scores: torch.Tensor, valid: torch.Tensor) -> tuple[float, float]:
    """Of the pairs of a valid and an invalid sample of a prompt, how many the scores order rightly, and how many are."""
    gap = scores[:, :, None] - scores[:, None, :]
    mixed = valid[:, :, None] & ~valid[:, None, :]
    return ((gap > 0) & mixed).sum().item(), mixed.sum().item()


class PoolGADTrainer(GADTrainer):
    """GAD that samples a pool of prompts every step and learns from those that `rule` prefers."""

    def __init__(self, *args, rule: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.rule, self.diagnosis = rule, []

    @torch.no_grad()
    def _log_probs(self, pairs: PairBatch) -> torch.Tensor:
        prompts = [pairs.prompt_ids[index] for index in pairs.prompt_index]
        batch = collate_responses(prompts, pairs.student_ids, self._tokenizer.pad_token_id)
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        log_probs = logits.log_softmax(dim=-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        mask = batch["response_mask"][:, 1:]
        return (log_probs * mask).sum(dim=1) / mask.sum(dim=1)

    def _step_discriminator(self, pairs, scores, measured):
        student, log_probs = scores.student.view(-1, GROUP), self._log_probs(pairs).view(-1, GROUP)
        self._kept = priorities(self.rule, student, log_probs).topk(KEPT).indices.sort().values
        if self.state.global_step % DIAGNOSE_EVERY == 0:
            self._diagnose(pairs, student, correlation(student, log_probs))
        kept = self._kept.tolist()
        pairs = PairBatch(
            prompt_ids=[pairs.prompt_ids[index] for index in kept],
            teacher_ids=[pairs.teacher_ids[index] for index in kept],
            student_ids=[ids for index in kept for ids in pairs.student_ids[index * GROUP : (index + 1) * GROUP]],
            prompt_index=[number for number in range(KEPT) for _ in range(GROUP)],
        )
        scores = PairScores(scores.teacher[self._kept], student[self._kept].flatten())
        return super()._step_discriminator(pairs, scores, measured)

    def _diagnose(self, pairs: PairBatch, scores: torch.Tensor, r: torch.Tensor) -> None:
        prompts = self._tokenizer.batch_decode([pairs.prompt_ids[index] for index in pairs.prompt_index])
        answers = self._tokenizer.batch_decode(pairs.student_ids, skip_special_tokens=True)
        valid = torch.tensor(world.judge(prompts, answers)["valid"]).view(-1, GROUP) > 0
        for name, rows in {"pool": slice(None), "kept": self._kept}.items():
            right, mixed = valid_pairs(scores[rows], valid[rows])
            means = [x[rows].float().mean().item() for x in (valid, r, scores.std(dim=1))]
            self.diagnosis.append({"of": name, "right": right, "mixed": mixed} | dict(zip("vrd", means, strict=True)))

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        rows = (self._kept[:, None] * GROUP + torch.arange(GROUP)).flatten()
        output = {name: value[rows] if value.dim() > 0 else value for name, value in output.items()}
        rewards = self._rewards[rows]
        groups = rewards.view(-1, GROUP)
        # scale_rewards="batch", of the kept
        output["advantages"] = (groups - groups.mean(dim=1, keepdim=True)).flatten() / (rewards.std() + 1e-4)
        output["num_items_in_batch"] = output["completion_mask"].sum()
        return output


class SelectionExperiment(ablations.Experiment):
    def arm(self, name: str, max_steps: int | None = None) -> dict:
        rule, settings = ARMS[name]
        settings = ablations.COMMON | {"discriminator": str(self.folder / "discriminator")} | settings
        if max_steps is not None:
            settings["max_steps"] = max_steps
        trainer_class = GADTrainer if rule is None else functools.partial(PoolGADTrainer, rule=rule)
        trainer = trainer_class(
            model=str(self.folder / "seqkd"),
            args=ablations.config(self.folder / "runs" / name, self.seed, **settings),
            train_dataset=self.train,
            processing_class=self.tokenizer,
        )
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        log = [entry for entry in trainer.state.log_history if "discriminator/accuracy" in entry]
        return self.measure(trainer.model) | {
            "accuracy": log[-1]["discriminator/accuracy"],
            "warnings": [vars(warning) for warning in trainer.monitor.warnings],
            "seconds": seconds,
            "diagnosis": getattr(trainer, "diagnosis", []),
        }

    def run(self, arms: list[str], max_steps: int | None) -> None:
        super().run([])
        for name in arms:
            self.result(f"selection, {name}", functools.partial(self.arm, name, max_steps))


def difference(valid: list[float], baseline: list[float]) -> str:
    """Mean in points, and of each seed."""
    gains = [100 * (value - base) for value, base in zip(valid, baseline, strict=False)]
    return f"{statistics.mean(gains):+.1f} ({', '.join(f'{gain:+.1f}' for gain in gains)})" if gains else "–"


def students_table(output_dir: Path, seeds: list[int], results: dict[str, list[dict]]) -> str:
    valid = {name: [row["valid@t1.0"] for row in rows] for name, rows in results.items()}
    shown = {ablations.SEQKD: ablations.read(output_dir, ablations.SEQKD, seeds), **results}
    rows = []
    for name, runs in shown.items():
        if not runs:
            continue
        mine = [run["valid@t1.0"] for run in runs]
        cells = [mean_of(runs, *column) for column in COLUMNS.values()] + [each_of(runs, "valid@t1.0")]
        rows.append([name, *cells, *(difference(mine, valid[other]) for other in (PLAIN, "random"))])
    return markdown(["arm", *COLUMNS, "valid of each seed", "minus plain, points", "minus random"], rows)


def choices_table(results: dict[str, list[dict]]) -> str:
    rows = []
    for name, runs in results.items():
        kept, pool = (
            [entry for run in runs for entry in run["diagnosis"] if entry["of"] == side] for side in ("kept", "pool")
        )
        if not kept:
            continue
        means = [[statistics.mean(entry[key] for entry in side) for side in (kept, pool)] for key in "rdv"]
        mixed = [sum(entry["mixed"] for entry in side) for side in (kept, pool)]
        right = [sum(entry["right"] for entry in side) for side in (kept, pool)]
        prompts = KEPT * len(kept), POOL * len(pool)
        cells = ["{:.2f} ({:.2f})".format(*pair) for pair in means]
        cells.append("{:.1f} ({:.1f})".format(*(m / p for m, p in zip(mixed, prompts, strict=True))))
        cells.append("{:.3f} ({:.3f})".format(*(r / max(m, 1) for r, m in zip(right, mixed, strict=True))))
        rows.append([name, *cells])
    return markdown(["rule", "r", "score std", "valid samples", "mixed pairs a prompt", "AUC"], rows)


def main(argv=None) -> None:
    arguments = parse_args(argv)
    output_dir, seeds = Path(arguments.output_dir), arguments.seeds
    if not arguments.table:
        for seed in seeds:
            experiment = SelectionExperiment(output_dir, seed, base_steps=1500, discriminator_steps=800)
            experiment.run(arguments.arms, arguments.max_steps)
    results = {name: ablations.read(output_dir, f"selection, {name}", seeds) for name in ARMS}
    print(students_table(output_dir, seeds, results))
    print("\nMean over the run, kept (pool): what the rules choose. AUC: of the pairs of a valid and an invalid")
    print("sample of one prompt, the share that the discriminator orders rightly.\n")
    print(choices_table(results))


if __name__ == "__main__":
    main()
