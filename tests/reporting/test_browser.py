"""The page in headless Chromium: loads without a console message, its filters, legend and hover work."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_measurements import write_controlled, write_lengths, write_sweep
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
addEventListener("load", async () => {
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const shown = () => all(".sample").filter((sample) => sample.offsetParent).length;
  const filtered = (outcomes) => { document.querySelector(`[data-filter="${outcomes}"]`).click(); return shown(); };
  const found = { all: shown() };
  for (const outcomes of ["lost", "gained", "gained|lost", "both right", "both wrong", ""]) {
    found[outcomes] = filtered(outcomes);
  }
  const style = (selector) => getComputedStyle(document.querySelector(selector)).display;
  const key = document.querySelector('[data-toggle="tiny"]');
  key.click();
  found.hidden = style('.series[data-series="tiny"]');
  key.click();
  found.back = style('.series[data-series="tiny"]');
  const tip = document.getElementById("tip");
  document.querySelector(".mark").dispatchEvent(new PointerEvent("pointermove", { clientX: 50, clientY: 50 }));
  found.tip = tip.textContent;
  const hover = (box, x, y) => {
    const plot = box.getBoundingClientRect();
    const place = { clientX: plot.left + x * plot.width, clientY: plot.top + y * plot.height };
    box.dispatchEvent(new PointerEvent("pointermove", place));
    return tip.textContent;
  };
  const [time] = all("#efficiency .area-box");
  found.failed = hover(time, 0.99, 0.02);
  found.fast = hover(time, 0.02, 0.97);
  const figure = time.closest("figure");
  all("[data-toggle]", figure).find((button) => button.dataset.toggle === "pythia-160m").click();
  found.without = hover(time, 0.99, 0.02);
  const visible = (part) => getComputedStyle(part).display !== "none";
  found.left = all('[data-series="pythia-160m"]', figure).filter(visible).length;
  found.loss = hover(document.querySelector("#training .area-box"), 0.999, 0.999);
  const csv = (name) => new Promise((resolve) => {
    URL.createObjectURL = (blob) => { blob.text().then(resolve); return "#records"; };
    document.querySelector(`[data-csv="${name}"]`).click();
  });
  found.csv = await csv("solving");
  found.crossovers = await csv("crossovers");
  found.width = document.documentElement.scrollWidth - innerWidth;
  found.inner = innerWidth;
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
# a window cannot be narrower than 500 pixels, a frame can
FRAME = """<!doctype html><body style="margin:0"><script>
addEventListener("message", (event) => { document.body.dataset.found = event.data; });
</script><iframe src="page.html" width="{width}" height="900" style="border:0"></iframe>"""


def visit(page: Path, tmp_path: Path, width: int, scheme: str) -> tuple[str, list[str]]:
    """Return the page's markup after its scripts ran, and what it wrote to the console."""
    command = [
        str(CHROMIUM),
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={max(width, 500)},900",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("records")
    write_study(folder / "study")
    for name, write in (("l", write_lengths), ("s", write_sweep), ("c", write_controlled)):
        write(folder / "measured" / f"{name}.json")
    return render(build(collect([folder])))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 820, 390])
def test_the_page_works_in_a_browser(page, tmp_path, width, scheme):
    (tmp_path / "page.html").write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("{width}", str(width)), encoding="utf-8")
    dom, console = visit(frame, tmp_path, width, scheme)
    assert console == []
    marked = re.search(r'data-found="([^"]*)"', dom)
    assert marked, "the probe did not finish"
    found = json.loads(html.unescape(marked.group(1)))
    assert found["inner"] == width
    counts = [found[name] for name in ("all", "lost", "gained", "gained|lost", "both right", "both wrong", "")]
    assert counts == [14, 2, 4, 6, 4, 4, 14]
    assert (found["hidden"], found["back"]) == ("none", "inline")
    assert found["tip"].startswith("tiny\nWord problems: 4.3 % accuracy, 95 %")
    assert found["failed"] == "pythia-160m\n65,536 tokens: out of memory"
    assert found["fast"] == "pythia-160m\n1,024 tokens: 2.56 ms"
    assert found["without"] == "mambacus\n65,536 tokens: 655 ms" and found["left"] == 0
    assert re.match(r"tiny\+lora\nstep (59\d|600): loss 0\.", found["loss"])
    assert '"Word problems (tiny [13])","600","26"' in found["csv"]
    assert found["crossovers"].count("\r\n") == 6 and '"4,096","mambacus is better above"' in found["crossovers"]
    assert found["width"] <= 0, "the page scrolls sideways"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.slow
def test_the_page_prints(page, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    pdf = tmp_path / "page.pdf"
    flags = [flag for flag in FLAGS if flag != "--dump-dom"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={pdf}"]
    subprocess.run([*command, (tmp_path / "page.html").as_uri()], capture_output=True, timeout=120, check=True)
    assert pdf.read_bytes().startswith(b"%PDF")
