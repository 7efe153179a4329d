"use strict";
const { figures, hovers } = JSON.parse(document.getElementById("figures").textContent);
const text = (id) => document.getElementById(id).textContent;

async function library() {
  const packed = Uint8Array.from(atob(text("plotly")), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  script.remove();
}

function themed(value, color) {
  if (typeof value === "string") return value[0] === "@" ? color(value.slice(1)) : value;
  if (Array.isArray(value)) return value.map((each) => themed(each, color));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, color)]));
}

function draw(responsive = true) {
  const style = getComputedStyle(document.documentElement);
  const css = (name) => style.getPropertyValue("--" + name).trim();
  const color = (name) =>
    name[0] === "@" ? hovers[name.slice(1)] :
    name === "scale" ? [0, 1, 2, 3, 4].map((i) => [i / 4, css("c" + i)]) : css(name);
  for (const { id, height, figure } of figures) {
    const { data, layout } = themed(figure, color);
    const place = document.getElementById(id);
    const width = place.clientWidth;
    if (width < 500 && layout.legend) layout.legend.font = { size: 10 };
    const size = responsive ? { height, autosize: true } : { height, width };
    Plotly.react(place, data, { ...layout, ...size }, { displayModeBar: false, responsive });
  }
}

function sortable(table) {
  const body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column];
    const raw = cell.dataset.v ?? cell.textContent;
    return raw === "" ? null : cell.classList.contains("n") ? Number(raw) : raw;
  };
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head) return;
    const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [value(row, head.cellIndex), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return way * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
    });
    body.append(...rows.map(([, row]) => row));
  });
}

document.querySelectorAll("table.sortable").forEach(sortable);

(figures.length ? library() : Promise.resolve()).then(() => {
  draw();
  document.documentElement.dataset.drawn = "yes";
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("paper");
    draw(false);
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("paper");
    draw();
  });
}).catch((error) => {
  document.querySelectorAll(".chart").forEach((place) => {
    place.style.height = "auto";
    place.textContent = "This browser cannot draw the charts: " + error.message;
  });
});
