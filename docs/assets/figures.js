// Draws the figures whose data lie in the page. On a phone they are as wide as a figure has to be, and scroll.
const NARROWEST = 640;
for (const place of document.querySelectorAll(".figure")) {
  const { data, layout } = JSON.parse(place.firstElementChild.textContent);
  const width = place.clientWidth < NARROWEST ? { width: NARROWEST } : {};
  Plotly.newPlot(place, data, { ...width, ...layout }, { responsive: true, displaylogo: false });
}
