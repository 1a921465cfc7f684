"""What makes pictures interactive: plotly.js, inlined, and the script that draws each picture's numbers with it.

A page holds every picture twice: as SVG, for readers without scripts and for paper, and as numbers beside it. Colours are read from the style
sheet, so pictures follow the reader's light or dark mode.
"""

import hashlib
from base64 import b64encode
from functools import cache
from importlib.resources import files

SCRIPT = r"""
(() => {
  "use strict";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const settings = {displayModeBar: false, responsive: true, doubleClick: "reset", scrollZoom: false};
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const safe = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const faint = (hex, share) => hex + Math.round(255 * share).toString(16).padStart(2, "0");
  const axis = (title, more) => Object.assign({
    title: {text: safe(title), standoff: 8}, automargin: true, zeroline: false, gridcolor: colour("--line"), linecolor: colour("--soft"),
    tickcolor: colour("--line")}, more);
  const layout = (height, more) => Object.assign({
    height, margin: {l: 8, r: 8, t: 30, b: 8}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: {family: "system-ui, sans-serif", size: 12, color: colour("--soft")}, dragmode: "zoom",
    hoverlabel: {bgcolor: colour("--panel"), bordercolor: colour("--soft"), font: {color: colour("--ink")}}}, more);

  function heat(spec, narrow) {
    const name = narrow ? spec.names.map(text => text.split(".").pop()) : spec.names;
    const accent = colour("--accent");
    const edge = 0.46;
    const boxes = spec.outlined.map(([row, column]) => ({type: "rect", x0: spec.columns[column] - edge, x1: spec.columns[column] + edge,
      y0: row - edge, y1: row + edge, line: {color: colour("--ink"), width: 1}}));
    const trace = {type: "heatmap", x: spec.columns, y: spec.names.map((_, row) => row), z: spec.shares, text: spec.texts.map(row => row.map(safe)),
      hoverinfo: "text", hoverongaps: false, xgap: 1, ygap: 1, zmin: 0, zmax: 1, colorscale: [[0, faint(accent, 0.06)], [1, accent]],
      colorbar: {orientation: "h", thickness: 8, len: narrow ? 0.7 : 0.4, x: narrow ? 0.86 : 0.93, xanchor: "right", y: 1.02, yanchor: "bottom", outlinewidth: 0, tickvals: [0, 1],
        ticktext: spec.legend.map(safe)}};
    const y = axis("", {autorange: "reversed", tickvals: trace.y, ticktext: name.map(safe), showgrid: false});
    const x = axis("decoder block", {showgrid: false, tickformat: "d"});
    return [[trace], layout(Math.max(180, 110 + 24 * spec.names.length), {xaxis: x, yaxis: y, shapes: boxes, margin: {l: 8, r: 8, t: 50, b: 8}})];
  }

  function lines(spec, narrow) {
    const traces = [];
    spec.lines.forEach((line, number) => {
      const look = colour("--c" + line.colour % 8);
      const shared = {name: safe(line.name), legendgroup: String(number), line: {color: faint(look, line.strength), width: 1.8,
        dash: dashes[Math.floor(line.colour / 8) % 4]}, hovertemplate: "%{x:.4~g}, %{y:.4~g}<extra>" + safe(line.name) + "</extra>"};
      if (line.x.length) traces.push({...shared, type: "scatter", mode: "lines", x: line.x, y: line.y});
      if (line.marks.length) traces.push({...shared, type: "scatter", mode: "markers", showlegend: !line.x.length, x: line.marks.map(mark => mark[0]),
        y: line.marks.map(mark => mark[1]), text: line.texts.map(safe), marker: {color: look, size: 6},
        ...(line.texts.length ? {hovertemplate: "%{text}<extra></extra>"} : {})});
    });
    const small = spec.size[0] < 500;
    const y = axis(spec.y, {range: spec.range});
    const key = {orientation: "h", x: 0, y: narrow ? -0.3 : -0.2, yanchor: "top"};
    const title = spec.title ? {text: safe(spec.title), x: 0, xanchor: "left", font: {size: 13, color: colour("--ink")}} : undefined;
    return [traces, layout(spec.size[1] + (small ? 10 : 60), {xaxis: axis(spec.x), yaxis: y, title, showlegend: !small && spec.lines.length > 1, legend: key})];
  }

  function bars(spec) {
    const most = Math.max(...spec.values) || 1;
    const trace = {type: "bar", orientation: "h", x: spec.values, y: spec.names.map(safe), text: spec.texts.map(safe), textposition: "outside",
      cliponaxis: false, marker: {color: colour("--accent")}, hovertemplate: "%{y}: %{text}<extra></extra>", textfont: {color: colour("--soft")}};
    const title = {text: safe(spec.title), x: 0, xanchor: "left", font: {size: 13, color: colour("--ink")}};
    const x = {visible: false, range: [0, 1.45 * most], fixedrange: true};
    const y = axis("", {autorange: "reversed", showgrid: false, fixedrange: true, ticksuffix: " "});
    return [[trace], layout(60 + 24 * spec.names.length, {xaxis: x, yaxis: y, title, showlegend: false, bargap: 0.35})];
  }

  const kinds = {heat, lines, bars};

  function draw(chart) {
    const spec = JSON.parse(chart.querySelector("script").textContent);
    let live = chart.querySelector(".live");
    if (!live) {
      live = chart.appendChild(document.createElement("div"));
      live.className = "live";
      live.setAttribute("role", "img");
      live.setAttribute("aria-label", chart.querySelector("svg").getAttribute("aria-label"));
      chart.classList.add("drawn");
    }
    const [traces, look] = kinds[spec.kind](spec, chart.clientWidth < 500);
    Plotly.react(live, traces, look, settings);
  }

  const drawAll = () => document.querySelectorAll(".chart").forEach(draw);
  const theme = document.querySelector("#theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const shown = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = shown === "dark" ? "light" : "dark";
    drawAll();
  });
  dark.addEventListener("change", drawAll);
  drawAll();
  if (still.matches) document.documentElement.style.scrollBehavior = "auto";
})();
"""


@cache
def scripts() -> tuple[str, ...]:
    """The texts of the page's scripts, in their order; plotly.js begins with its licence (MIT)."""
    plotly = files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    return plotly.replace("</script", "<\\/script"), SCRIPT


@cache
def script_sources() -> str:
    """The page's policy on scripts: these texts and no others."""
    digests = [b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts()]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
