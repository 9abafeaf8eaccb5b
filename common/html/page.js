"use strict";
// Draws the figures in the page's colours, and again when the reader's system turns light or dark.
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const narrow = window.matchMedia("(max-width: 760px)").matches;

  function theme(layout) {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const changes = {
      "font.color": color("--text"),
      "hoverlabel.bgcolor": color("--hover"),
      "hoverlabel.bordercolor": color("--hover"),
      "hoverlabel.font.color": color("--hover-text"),
    };
    for (const axis of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
      changes[axis + ".gridcolor"] = color("--grid");
      changes[axis + ".tickfont.color"] = color("--soft");
      changes[axis + ".title.font.color"] = color("--soft");
    }
    return changes;
  }

  function draw(figure, index) {
    const element = document.getElementById("chart-" + index);
    const layout = figure.layout;
    // On a touch screen a drag scrolls the page.
    if (touch) layout.dragmode = false;
    if (narrow) layout.font.size = 11;
    Plotly.newPlot(element, figure.data, layout, { displayModeBar: false, responsive: true })
      .then(() => Plotly.relayout(element, theme(layout)));
  }

  figures.forEach(draw);
  dark.addEventListener("change", () => {
    figures.forEach((figure, index) => Plotly.relayout("chart-" + index, theme(figure.layout)));
  });
})();
