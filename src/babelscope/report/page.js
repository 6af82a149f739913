// Draws every chart in the colours of the page, and again when the reader switches between light and dark; offers
// every chart as SVG and PNG and every table as CSV.
const { specs, themes, print } = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

// `ast`: expressions are interpreted, not compiled, so that the page needs no `unsafe-eval`.
const embed = (place, name, config) => vegaEmbed(place, structuredClone(specs[name]), {
  mode: "vega-lite", config, renderer: "svg", actions: false, ast: true, tooltip: { disableDefaultStyle: true },
  loader: { target: "_self" },
});

async function draw() {
  const theme = themes[dark.matches ? "dark" : "light"];
  for (const place of document.querySelectorAll("[data-chart]")) {
    await embed(place, place.dataset.chart, theme);
    keepNames(place);
  }
  document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
}

// On a phone a wide chart scrolls; the names of its rows stay at the left edge.
function keepNames(place) {
  const scroll = place.parentElement, svg = place.querySelector("svg");
  const names = [...svg.querySelectorAll(".role-axis")].filter((axis) => axis.getAttribute("aria-label")?.startsWith("Y-axis"));
  const first = Math.min(...names.map((axis) => axis.getBoundingClientRect().left));
  const kept = names.filter((axis) => axis.getBoundingClientRect().left - first < 40);
  const home = kept.map((axis) => axis.getAttribute("transform") ?? "");
  for (const axis of kept) {
    const box = axis.getBBox(), back = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const style = { x: box.x - 8, y: box.y, width: box.width + 10, height: box.height, class: "behind" };
    for (const [key, value] of Object.entries(style)) back.setAttribute(key, value);
    axis.prepend(back);
  }
  const follow = () => kept.forEach((axis, at) => {
    axis.classList.toggle("moved", scroll.scrollLeft > 0);
    axis.setAttribute("transform", `${home[at]} translate(${scroll.scrollLeft}, 0)`);
    if (scroll.scrollLeft) axis.parentElement.append(axis); // above the cells
  });
  scroll.onscroll = kept.length && scroll.scrollWidth > scroll.clientWidth ? follow : null;
}

function save(address, name) {
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
}

function tool(text, work) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", work);
  return button;
}

function tools(...parts) {
  const line = document.createElement("p");
  line.className = "tools";
  line.append(...parts);
  return line;
}

async function picture(name, type) {
  const place = document.createElement("div");
  const { view, finalize } = await embed(place, name, print);
  save(await view.toImageURL(type, 2), `${name}.${type}`);
  finalize();
}

for (const place of document.querySelectorAll("[data-chart]")) {
  const name = place.dataset.chart;
  place.closest(".picture").append(tools("Download:", ...["svg", "png"].map((type) => tool(type.toUpperCase(), () => picture(name, type)))));
}

// Figures as a program reads them: "1 234", "−0.5" and "–" on the page are 1234, -0.5 and nothing.
const bare = (text) => text.trim().replace(/^–$/, "").replace(/(\d)\u202f(?=[\d%])/g, "$1").replace(/−/g, "-");
const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text);

for (const table of document.querySelectorAll("table.data")) {
  const caption = table.caption.textContent;
  const name = caption.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60);
  const csv = () => {
    const lines = [...table.rows].map((row) => [...row.cells].map((cell) => quoted(bare(cell.textContent))).join(","));
    save(URL.createObjectURL(new Blob([`${lines.join("\n")}\n`], { type: "text/csv" })), `${name}.csv`);
  };
  const parts = ["Download:", tool("CSV", csv)];
  if (table.tBodies[0].rows.length > 60) {
    const find = document.createElement("input");
    Object.assign(find, { type: "search", placeholder: "show rows that contain …" });
    find.setAttribute("aria-label", `Filter: ${caption}`);
    find.addEventListener("input", () => {
      const words = find.value.toLowerCase().split(/\s+/);
      for (const row of table.tBodies[0].rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    });
    parts.push(find);
  }
  table.parentElement.before(tools(...parts));
}

let drawing = draw();
dark.addEventListener("change", () => { drawing = drawing.then(draw); });
