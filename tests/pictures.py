"""What a picture of a run shows."""

import matplotlib.image
from matplotlib.colors import to_rgb

from trl_bbkd.reports.axes import STUDENT


def is_drawn(path):
    """Whether a picture has the size of a run's, and lines in the student's colour."""
    picture = matplotlib.image.imread(path)[..., :3]
    in_color = (abs(picture - to_rgb(STUDENT)) < 0.02).all(axis=-1)
    return min(picture.shape[:2]) > 600 and in_color.sum() > 200


def lines(figure):
    """Of each of its axes, by title, the labelled lines: `{label: (x, y)}`."""
    found = {}
    for axes in figure.axes:
        drawn = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        found[axes.get_title(loc="left")] = {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn
        }
    return found
