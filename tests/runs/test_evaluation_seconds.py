"""What evaluation took, of the parts of a run that are kept."""

from types import SimpleNamespace

from trl_bbkd.reports.report import EVALUATION
from trl_bbkd.runs.text_job import TextJob


def test_a_trainings_time_is_without_its_measurements():
    job = SimpleNamespace(_measuring_seconds=lambda: 2.0)
    assert TextJob._parted(job, 5.0) == {"seconds": 3.0, EVALUATION: 2.0}


def test_measurements_of_all_parts_are_counted():
    """Of students as they end, and along trainings; a training's own time is none, and a part may be a list."""
    measured, trained = {"by_row": {}, "seconds": 1.0}, {"seconds": 9.0, EVALUATION: 2.0}
    parts = {"undistilled": measured, "GAD": measured, "trained": trained, "report in trackers": ["trackio"]}
    job = SimpleNamespace(progress=SimpleNamespace(parts=parts))
    assert TextJob._evaluation_seconds.fget(job) == 4.0
