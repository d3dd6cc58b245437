"""The report of a run of GAD."""

from dataclasses import dataclass

from ..reports.axes import INK, SECOND, STUDENT, draw_line, reach, set_title
from ..reports.curves import draw_coverage
from ..reports.text_report import TextReport


@dataclass(kw_only=True)
class GADReport(TextReport):
    """A run of GAD: it has a warm-up, and draws the discriminator and the lengths."""

    @property
    def warmup_steps(self) -> float:
        """Optimizer steps of warm-up, from the phase in the log."""
        steps, previous = 0.0, 0
        for entry in self.log_history:
            if "adversarial_phase" in entry:
                steps += (1 - entry["adversarial_phase"]) * (entry["step"] - previous)
                previous = entry["step"]
        return steps

    def draw_panels(self, panels: list) -> list:
        log = self.log_history
        draw_line(panels[0], log, "discriminator/accuracy", STUDENT, "accuracy")
        draw_line(panels[0], log, "discriminator/loss", SECOND, "loss")
        panels[0].axhline(0.5, color=INK, lw=0.8, ls=":")
        # A discriminator that starts badly has a loss that would flatten all that follows
        panels[0].set_ylim(0, min(2.0, max(1.05, panels[0].get_ylim()[1])))
        set_title(panels[0], "Discriminator on fresh pairs")

        draw_line(panels[1], log, "discriminator/teacher_score", INK, "teacher's answer")
        draw_line(panels[1], log, "discriminator/student_score", STUDENT, "student's samples")
        set_title(panels[1], "Discriminator's score")

        draw_line(panels[2], log, "completions/length_ratio", STUDENT, None)
        panels[2].axhline(1.0, color=INK, lw=0.8, ls=":")
        reach(panels[2], 0.5, 1.5)
        set_title(panels[2], "Length, student / teacher")

        draw_coverage(panels[3], self, otherwise="discriminator/group_std", title="Score's std within a group")
        return panels
