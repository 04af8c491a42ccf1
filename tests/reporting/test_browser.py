"""The page in headless Chromium: loads without a console message, its filters, legend and hover work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_records import write_study

from mambacus.reporting.page import build, render
from mambacus.reporting.sources import collect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
    "--dump-dom",
]
PROBE = """
<script>
addEventListener("load", () => {
  const shown = () => [...document.querySelectorAll(".sample")].filter((sample) => sample.offsetParent).length;
  const found = { all: shown() };
  document.querySelector('[data-filter="lost"]').click();
  found.lost = shown();
  document.querySelector('[data-filter=""]').click();
  found.again = shown();
  const key = document.querySelector('[data-toggle="tiny"]');
  key.click();
  found.hidden = getComputedStyle(document.querySelector('.series[data-series="tiny"]')).display;
  key.click();
  found.back = getComputedStyle(document.querySelector('.series[data-series="tiny"]')).display;
  const tip = document.getElementById("tip");
  document.querySelector(".mark").dispatchEvent(new PointerEvent("pointermove", { clientX: 50, clientY: 50 }));
  found.tip = tip.textContent;
  const plot = document.querySelector(".area-box").getBoundingClientRect();
  document.querySelector(".area-box").dispatchEvent(
    new PointerEvent("pointermove", { clientX: plot.right - 1, clientY: plot.bottom - 1 }));
  found.curve = tip.textContent;
  URL.createObjectURL = (blob) => { blob.text().then((text) => { found.csv = text; done(); }); return "#records"; };
  document.querySelector('[data-csv="solving"]').click();
  found.width = document.documentElement.scrollWidth - innerWidth;
  const done = () => { document.body.dataset.found = JSON.stringify(found); };
});
</script>
"""


def visit(page: Path, tmp_path: Path, width: int) -> tuple[str, list[str]]:
    """Return the page's markup after its scripts ran, and what it wrote to the console."""
    command = [
        str(CHROMIUM),
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 768, 500])
def test_the_page_works_in_a_browser(tmp_path, width):
    page = tmp_path / "page.html"
    page.write_text(render(build(collect([write_study(tmp_path / "study")]))).replace("</body>", PROBE + "</body>"))
    dom, console = visit(page, tmp_path, width)
    assert console == []
    marked = re.search(r'data-found="([^"]*)"', dom)
    assert marked, "the probe did not finish"
    found = json.loads(marked.group(1).replace("&quot;", '"').replace("&amp;", "&"))
    assert (found["all"], found["lost"], found["again"]) == (14, 2, 14)
    assert (found["hidden"], found["back"]) == ("none", "inline")
    assert found["tip"].startswith("tiny\nWord problems: 4.3 % accuracy, 95 %")
    assert re.match(r"tiny\+lora\nstep (59\d|600): loss 0\.", found["curve"])
    assert '"Word problems (tiny [10])","600","26"' in found["csv"]
    assert found["width"] <= 0, "the page scrolls sideways"
