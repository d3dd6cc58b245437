"""
Pictures of a comparison's page on a phone, in light and dark, in docs/images. It needs Chromium, and fetches nothing:

    trl-bbkd train recipes/gad.yaml && trl-bbkd train recipes/proxykd-on-policy.yaml
    python docs/site/screenshots.py output/gad output/proxykd-on-policy
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from trl_bbkd.reports.comparison import Comparison, read_runs
from trl_bbkd.reports.comparison_page import page


IMAGES = Path(__file__).parents[1] / "images"
LOOKS = {"light": 1, "dark": 0}  # as Chromium numbers them
WIDTH, HEIGHT, PIXELS, PALETTE = 390, 1338, 2, 64


def take(html: Path, look: str) -> None:
    target = IMAGES / f"compare_{look}.png"
    chromium = ["chromium", "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--screenshot={target}"]
    chromium += [f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={PIXELS}"]
    chromium += [f"--blink-settings=preferredColorScheme={LOOKS[look]}", html.as_uri()]
    subprocess.run(chromium, check=True, capture_output=True)
    with Image.open(target) as image:
        small = image.convert("RGB").quantize(PALETTE)
    small.save(target, optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "page.html"
        html.write_text(page(Comparison(read_runs(sys.argv[1:]))), encoding="utf-8")
        for look in LOOKS:
            take(html, look)
