"""The report of a run of Bayes-KD."""

from dataclasses import dataclass

from ..proxy.report import ProxyReport
from ..reports.axes import INK, PALE, SECOND, STUDENT, THIRD, draw_line, set_title, share_axis
from ..reports.curves import draw_coverage
from ..reports.markdown import table
from ..reports.report import Section


@dataclass(kw_only=True)
class BayesKDReport(ProxyReport):
    """A run of Bayes-KD: it has the `calibration` of its estimate, as of [`~bayeskd.calibration.calibration`]."""

    def sections(self) -> list[Section]:
        found = super().sections()
        if self.calibration:
            lines = [*calibration_table(self.calibration), "", calibration_explanation(self.calibration)]
            found.append(Section("Calibration of the estimate", lines))
        return found

    def draw_panels(self, panels: list) -> list:
        found = self.calibration
        for entries, color, style, label in calibration_lines(found) if found else ():
            points = [(entry["draws"], entry["expected"]) for entry in entries]
            panels[0].plot(*zip(*points, strict=True), color=color, lw=1.6, ls=style, marker="o", ms=3, label=label)
        if found:
            panels[0].axhline(found["proxy"], color=INK, lw=1, ls="--", label="proxy")
            panels[0].axhline(found["prior"], color=PALE, lw=1, ls="--", label="n-gram prior")
            panels[0].set_xscale("symlog", linthresh=1)
            ticks = sorted({entry["draws"] for entry in found["table"]})
            panels[0].set_xticks(ticks, ticks)
            panels[0].set_xlim(-0.1, 1.15 * ticks[-1])
            panels[0].minorticks_off()
        set_title(panels[0], "Held-out NLL by draws K")

        draw_line(panels[1], self.log_history, "entropy", STUDENT, None)
        set_title(panels[1], "The student's entropy")

        draw_line(panels[2], self.log_history, "kl_prior", SECOND, "KL to the prior")
        draw_line(panels[2], self.log_history, "kl_posterior", STUDENT, "KL to the posterior")
        draw_line(panels[2], self.log_history, "nll", THIRD, "NLL")
        set_title(panels[2], "The student's losses")

        draw_coverage(panels[3], self, otherwise="mean_token_accuracy", title="Top-1 accuracy on teacher tokens")
        if not self.judged_metrics:
            share_axis(panels[3])
        return panels[1:]


def calibration_table(calibration: dict) -> list[str]:
    """Lines of a Markdown table: NLL of held-out teacher text by concentration κ (lines) and draws K (columns)."""
    draws = sorted({entry["draws"] for entry in calibration["table"]})
    values = {(entry["concentration"], entry["draws"]): entry["expected"] for entry in calibration["table"]}
    rows = [
        [f"κ = {kappa:g}", *(f"{values[kappa, count]:.3f}" for count in draws)]
        for kappa in sorted({k for k, _ in values})
    ]
    return table(["posterior", *(f"K = {count}" for count in draws)], rows)


def calibration_explanation(calibration: dict) -> str:
    """What the calibration's numbers are, and those of prior and proxy."""
    return (
        f"NLL of {calibration['tokens']:,} held-out teacher tokens, in nats per token, that the estimate was not made from. "
        f"The n-gram prior (γ = 1: an estimate must not know the token it is judged on) has {calibration['prior']:.3f}, the proxy "
        f"{calibration['proxy']:.3f}, the posterior with K = {calibration['draws']} and κ = {calibration['concentration']:g} "
        f"{calibration['posterior']:.3f} in expectation, as in the table, and {calibration['posterior_drawn']:.3f} as drawn."
    )


def calibration_lines(calibration: dict):
    """Entries, color, line style and label of the posterior's curve for each concentration κ, the run's own in blue."""
    kappas = sorted({entry["concentration"] for entry in calibration["table"]})
    for number, kappa in enumerate(kappas):
        is_own = kappa == calibration["concentration"]
        entries = [entry for entry in calibration["table"] if entry["concentration"] == kappa]
        style = "-" if is_own else (0, (1 + number, 1))
        yield entries, STUDENT if is_own else SECOND, style, f"κ = {kappa:g}"
