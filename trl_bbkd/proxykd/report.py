"""The report of a run of Proxy-KD."""

from dataclasses import dataclass

from ..proxy.report import ProxyReport
from ..reports.axes import SECOND, STUDENT, draw_line, set_title, share_axis
from ..reports.curves import draw_coverage


@dataclass(kw_only=True)
class ProxyKDReport(ProxyReport):
    """A run of Proxy-KD: it draws what the stages made of the proxy, and the student's losses."""

    def draw_panels(self, panels: list) -> list:
        for axes, name, title in (
            (panels[0], "top1_agreement", "Proxy's top-1 agreement"),
            (panels[1], "nll", "Proxy's NLL"),
        ):
            points = [point for stage in self.stages for point in stage_points(stage, name)]
            if points and self.stages[0]["metrics"][0]["at"] == "before":
                points.insert(0, ("raw", self.stages[0]["metrics"][0][name]))
            axes.plot([value for _, value in points], color=SECOND, lw=1.6, marker="o", ms=4, clip_on=False)
            axes.set_xticks(range(len(points)), [label for label, _ in points], rotation=30, ha="right")
            set_title(axes, title)
        share_axis(panels[0])

        draw_line(panels[2], self.log_history, "kl", STUDENT, "KL to the proxy")
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
