"""The report of a run of Proxy-KD."""

from dataclasses import dataclass

from ..proxy.report import ProxyReport
from ..reports.axes import SECOND, STUDENT, draw_line, set_title, share_axis
from ..reports.curves import draw_coverage
from ..reports.report import Section


TARGETS = {
    "cache": "the proxy's likeliest tokens at each position of the teacher's answers, from disk",
    "live": "the proxy's whole distribution at each position of the teacher's answers",
    "on_policy": "the proxy's whole distribution at each position of the student's own answers, drawn anew at every step",
}


@dataclass(kw_only=True)
class ProxyKDReport(ProxyReport):
    """A run of Proxy-KD: it draws what the stages made of the proxy, and the student's losses."""

    def sections(self) -> list[Section]:
        found, settings = super().sections(), self.settings
        if not found or settings.get("kl_weight") == 0:
            return found
        source = settings.get("target_source", "cache")
        direction = "KL(student ‖ proxy)" if settings.get("kl_direction") == "reverse" else "KL(proxy ‖ student)"
        text = f"The student's soft targets (`target_source: {source}`): {TARGETS[source]}; {direction}."
        return [*found, Section("Soft targets", [text])]

    def draw_panels(self, panels: list) -> list:
        for axes, name, title in (
            (panels[0], "top1_agreement", "Proxy's top-1 agreement"),
            (panels[1], "nll", "Proxy's NLL"),
        ):
            points = [point for stage in self.stages for point in stage_points(stage, name)]
            if points and self.stages[0]["metrics"][0]["at"] == "before":
                points.insert(0, ("raw", self.stages[0]["metrics"][0][name]))
            axes.plot([value for _, value in points], color=SECOND, lw=1.6, marker="o", ms=4)
            axes.set_xticks(range(len(points)), [label for label, _ in points], rotation=30, ha="right")
            set_title(axes, title)
        share_axis(panels[0])

        label = "KL on own samples" if self.settings.get("target_source") == "on_policy" else "KL to the proxy"
        draw_line(panels[2], self.log_history, "kl", STUDENT, label)
        draw_line(panels[2], self.log_history, "nll", SECOND, "NLL")
        set_title(panels[2], "The student's losses")

        draw_coverage(panels[3], self, otherwise="entropy", title="The student's entropy")
        return panels[2:]


def stage_points(stage: dict, name: str) -> list[tuple[str, float]]:
    """Label and value of what a stage changed: where it began, the stage before it ended."""
    return [
        (entry["at"].removeprefix("round ") if entry["at"] != "after" else stage["stage"].split()[-1], entry[name])
        for entry in stage["metrics"]
        if name in entry and entry["at"] != "before"
    ]
