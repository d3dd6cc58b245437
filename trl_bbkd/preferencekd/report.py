"""The report of a run of PreferenceKD."""

from dataclasses import dataclass, field

from ..reports.axes import SECOND, STUDENT, draw_line, set_title, share_axis
from ..reports.curves import draw_coverage
from ..reports.markdown import code, table
from ..reports.report import Section
from ..reports.text_report import TextReport


@dataclass(kw_only=True)
class PreferenceKDReport(TextReport):
    """
    A run of PreferenceKD: it has a warm-up, says what pairs the rounds trained on, and shows some of them.

    Args:
        rounds (`list[dict]`):
            As [`~trainer.PreferenceKDTrainer.round_reports`] gives them.
    """

    rounds: list[dict] = field(default_factory=list)

    @property
    def warmup_steps(self) -> float:
        return max((entry["step"] for entry in self.log_history if entry.get("round") == 0), default=0)

    def sections(self) -> list[Section]:
        return [
            Section("Rounds", [*rounds_table(self.rounds), "", ROUNDS_EXPLANATION]),
            Section("Pairs to read", pairs_to_read(self.rounds)),
        ]

    def draw_panels(self, panels: list) -> list:
        log = self.log_history
        draw_line(panels[0], log, "rewards/accuracies", STUDENT, None)
        share_axis(panels[0])
        set_title(panels[0], "Pairs in the preferred order")

        draw_line(panels[1], log, "rewards/chosen", STUDENT, "preferred")
        draw_line(panels[1], log, "rewards/rejected", SECOND, "other")
        set_title(panels[1], "DPO's rewards")

        draw_line(panels[2], log, "nll", STUDENT, None)
        set_title(panels[2], "NLL of the teacher's answers")

        draw_coverage(panels[3], self, otherwise="entropy", title="The student's entropy")
        return panels


ROUNDS_EXPLANATION = (
    "Scores are the judge's, a mean over the samples, and over the preferred and the other answers of the pairs; lengths are in "
    "the student's tokens. A judge that prefers the longer answers makes longer students. All of them, with their texts, are in "
    "`round-N/candidates.parquet` and `round-N/pairs.parquet`."
)


def rounds_table(rounds: list[dict]) -> list[str]:
    """Lines of a Markdown table of what each round trained on, one line a round."""

    def number(entry: dict, name: str, digits: int) -> str:
        return f"{entry[name]:.{digits}f}" if entry.get(name) is not None else "–"

    rows = [
        [
            str(entry["round"]),
            f"{entry['prompts']:,}",
            f"{entry['samples']:,}",
            f"{entry['pairs']:,}",
            number(entry, "score", 3),
            f"{number(entry, 'chosen_score', 3)} / {number(entry, 'rejected_score', 3)}",
            f"{number(entry, 'chosen_length', 1)} / {number(entry, 'rejected_length', 1)}",
            number(entry.get("discriminator", {}), "discriminator/accuracy", 3),
        ]
        for entry in rounds
    ]
    head = [
        "round",
        "rows",
        "samples",
        "pairs",
        "score",
        "score of pairs",
        "length of pairs",
        "discriminator's accuracy",
    ]
    has_discriminator = any("discriminator" in entry for entry in rounds)
    return table(*((head, rows) if has_discriminator else (head[:-1], [row[:-1] for row in rows])))


def pairs_to_read(rounds: list[dict]) -> list[str]:
    """Lines of Markdown: a few pairs of the last round, each with its prompt and the teacher's answer."""
    lines = []
    for pair in rounds[-1]["examples"] if rounds else []:
        scores = [f" ({pair[name]:.3f})" if name in pair else "" for name in ("chosen_score", "rejected_score")]
        lines += [
            f"* prompt: {code(pair['prompt'])}",
            f"    * preferred{scores[0]}: {code(pair['chosen'])}",
            f"    * over{scores[1]}: {code(pair['rejected'])}",
            f"    * teacher: {code(pair['teacher'])}",
        ]
    return lines
