// Draws the figures of executed notebooks, whose data lie in the page.
for (const place of document.querySelectorAll(".figure")) {
  const { data, layout } = JSON.parse(place.firstElementChild.textContent);
  Plotly.newPlot(place, data, layout, { responsive: true, displaylogo: false });
}
