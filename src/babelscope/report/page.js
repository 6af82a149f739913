// Draws every chart in the colours of the page, and again when the reader switches between light and dark.
const { specs, themes } = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

async function draw() {
  const theme = themes[dark.matches ? "dark" : "light"];
  for (const place of document.querySelectorAll("[data-chart]")) {
    // `ast`: expressions are interpreted, not compiled, so that the page needs no `unsafe-eval`.
    await vegaEmbed(place, structuredClone(specs[place.dataset.chart]), {
      mode: "vega-lite", config: theme, renderer: "svg", actions: false, ast: true,
      tooltip: { disableDefaultStyle: true },
    });
  }
  document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
}

let drawing = draw();
dark.addEventListener("change", () => { drawing = drawing.then(draw); });
