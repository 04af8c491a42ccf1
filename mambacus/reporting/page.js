"use strict";
(() => {
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const tip = document.getElementById("tip");

  function showTip(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, x + 14), innerWidth - box.width - 8);
    const top = y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18;
    tip.style.left = `${left}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  }
  const hideTip = () => { tip.hidden = true; };

  for (const mark of all("[data-tip]")) {
    mark.addEventListener("pointermove", (event) => showTip(mark.dataset.tip, event.clientX, event.clientY));
    mark.addEventListener("pointerleave", hideTip);
    mark.addEventListener("focus", () => {
      const box = mark.getBoundingClientRect();
      showTip(mark.dataset.tip, box.right, box.top);
    });
    mark.addEventListener("blur", hideTip);
  }
  addEventListener("scroll", hideTip, { passive: true });

  for (const button of all("[data-toggle]")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      for (const series of all("[data-series]", button.closest("figure"))) {
        if (series.dataset.series === button.dataset.toggle) series.classList.toggle("off", !on);
      }
    });
  }

  for (const button of all("[data-filter]")) {
    button.addEventListener("click", () => {
      const section = button.closest("section");
      for (const other of all("[data-filter]", section)) other.setAttribute("aria-pressed", String(other === button));
      for (const sample of all(".sample", section)) {
        sample.hidden = button.dataset.filter !== "" && !button.dataset.filter.split("|").includes(sample.dataset.outcome);
      }
    });
  }

  for (const box of all(".area-box")) {
    const points = JSON.parse(box.querySelector(".points").textContent);
    const cursor = box.querySelector(".cursor");
    box.addEventListener("pointermove", (event) => {
      if (event.target.dataset.tip) { cursor.hidden = true; return; }
      const area = box.getBoundingClientRect();
      const x = (100 * (event.clientX - area.left)) / area.width;
      const y = (100 * (event.clientY - area.top)) / area.height;
      const off = new Set(all(".off[data-series]", box).map((series) => series.dataset.series));
      let best = null;
      for (const [label, left, top, text] of points) {
        if (off.has(label)) continue;
        const distance = Math.hypot(left - x, 0.3 * (top - y));
        if (!best || distance < best.distance) best = { left, top, text, distance };
      }
      if (!best) return;
      cursor.hidden = false;
      cursor.style.left = `${best.left}%`;
      cursor.style.top = `${best.top}%`;
      showTip(best.text, event.clientX, event.clientY);
    });
    box.addEventListener("pointerleave", () => { cursor.hidden = true; hideTip(); });
  }

  const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
  for (const button of all("[data-csv]")) {
    button.addEventListener("click", () => {
      const table = button.closest(".table-tools").nextElementSibling.querySelector("table");
      const text = (cell) => {
        const note = cell.querySelector("small");
        const main = [...cell.childNodes].filter((node) => node !== note).map((node) => node.textContent).join("").trim();
        return (note ? `${main} (${note.textContent.trim()})` : main).replaceAll("\u00a0", " ");
      };
      const lines = all("tr", table).map((row) => [...row.cells].map((cell) => quoted(text(cell))).join(","));
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob(["\ufeff" + lines.join("\r\n")], { type: "text/csv" }));
      link.download = `${button.dataset.csv.replaceAll(/[^\w.+-]+/g, "-")}.csv`;
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }

  const links = all("nav a");
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links) link.classList.toggle("here", link.hash === `#${entry.target.id}`);
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const link of links) seen.observe(document.querySelector(link.hash));
})();
