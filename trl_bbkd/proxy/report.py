"""The report of a run with a proxy."""

from dataclasses import dataclass

from ..reports.markdown import table
from ..reports.report import Section, duration
from ..reports.text_report import TextReport


PROXY = "proxy"


@dataclass(kw_only=True)
class ProxyReport(TextReport):
    """A run of a method whose soft targets come from a proxy: it has `stages`, and a column of the proxy."""

    def column_explanations(self) -> list[str]:
        if PROXY not in self.results:
            return []
        return [
            f"The proxy is the open model that {self.method} learned from beside the teacher's text, as it was then; it was "
            f"sampled at {self.sampled_at} only."
        ]

    def sections(self) -> list[Section]:
        if not self.stages:
            return []
        return [Section("Stages", [*stages_table(self.stages), "", stages_explanation(self.stages)])]


STAGES_EXPLANATION = (
    "Top-1 agreement is the share of held-out answer tokens that are the proxy's likeliest ones, and NLL its negative "
    "log-likelihood of them, in nats per token: before the stage, after each round, after the stage."
)


def stages_explanation(stages: list[dict]) -> str:
    """What the table of stages says, and what of a stage it has no room for."""
    seen_once = [
        entry["contexts_seen_once"] for stage in stages for entry in stage["metrics"] if "contexts_seen_once" in entry
    ]
    text = [STAGES_EXPLANATION]
    text += [
        f"{share:.1%} of the answer tokens have an n-gram context that was seen once: there, without back-off, the "
        "prior is the token itself."
        for share in seen_once
    ]
    return " ".join(text)


def stages_table(stages: list[dict]) -> list[str]:
    """Lines of a Markdown table of the stages, one line a stage."""

    def course(stage: dict, name: str, digits: int) -> str:
        return " → ".join(f"{entry[name]:.{digits}f}" for entry in stage["metrics"] if name in entry) or "–"

    rows = [
        [
            stage["stage"],
            f"{stage['rows']:,}",
            duration(stage["seconds"]),
            course(stage, "top1_agreement", 3),
            course(stage, "nll", 3),
        ]
        for stage in stages
    ]
    return table(["stage", "rows", "time", "proxy's top-1 agreement", "proxy's NLL"], rows)
