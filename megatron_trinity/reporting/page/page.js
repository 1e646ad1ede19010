"use strict";
// Draws what stands in #data. A curve knows the step of each of its points; tokens and hours of a
// step are read off the axis of its run.
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b6fd4", "#7a8794"];
const KINDS = { restart: "#d55e00", alarm: "#d62728", "left out": "#cc79a7", save: "#009e73" };
const PARTS = { training: "#009e73", saving: "#56b4e9", evaluating: "#0072b2", starting: "#e69f00",
  lost: "#d62728", waiting: "#7a8794", other: "#b9c0c9" };
const many = data.runs.length > 1;
const plots = [];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function kept(key, otherwise) {
  try { return sessionStorage.getItem(key) ?? otherwise; } catch { return otherwise; }
}
function keep(key, value) {
  try { sessionStorage.setItem(key, value); } catch { /* a file may have no storage */ }
}

function place(run, steps) {
  const kind = document.getElementById("axis").value;
  const axis = data.runs[run].axis;
  if (kind === "steps") return steps;
  const [from, to] = [axis.steps, axis[kind]];
  let n = 0;
  return steps.map((step) => {
    if (n > 0 && from[n] > step) n = 0;
    while (n < from.length - 2 && from[n + 1] < step) n++;
    if (from.length < 2) return to[0];
    const share = (step - from[n]) / (from[n + 1] - from[n]);
    return to[n] + share * (to[n + 1] - to[n]);
  });
}

function color(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

function layout(more = {}) {
  const axis = { gridcolor: color("--line"), linecolor: color("--line"), zeroline: false, automargin: true };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("--text"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 48, r: 10, t: 8, b: 36 }, hovermode: "closest",
    legend: { orientation: "h", y: -0.26, x: 0 },
    xaxis: { ...axis, title: { text: document.getElementById("axis").value, standoff: 4 }, ...xaxis },
    yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

function card(id, title, unit, parent = document.getElementById("charts")) {
  const plot = element("div", { class: "plot", id: `plot-${id}` });
  const head = element("div", { class: "head" }, element("h2", {}, title, " ", element("small", {}, unit)));
  parent.append(element("article", { class: "card" }, head, plot));
  return { plot, head };
}

// A plot is drawn anew where the axis or the colours change.
function add(plot, draw) { plots.push({ plot, draw }); }
const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  if (target.data) Plotly.Plots.resize(target);
}));
async function redraw() {
  for (const { plot, draw } of plots) {
    const { traces, options } = draw();
    // How many points each trace was given, for who looks at the page from outside.
    plot.dataset.points = traces.map((trace) => (trace.z ? trace.z.flat() : trace.x).length).join(" ");
    await Plotly.react(plot, traces, layout(options), { displayModeBar: false });
    await new Promise((next) => setTimeout(next));  // let the page be read and scrolled meanwhile
  }
}

function markShapes() {
  if (!document.getElementById("marks").checked) return [];
  return data.runs.flatMap((run, number) => run.marks.filter((mark) => mark.kind !== "save").slice(0, 300)
    .map((mark) => {
      const [x] = place(number, [mark.i]);
      return { type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper",
        line: { color: KINDS[mark.kind], width: 1, dash: "dot" } };
    }));
}

function curves(chart) {
  const { plot } = card(chart.id, chart.title, chart.unit);
  const of = (one) => one.name.replace(/, mean of \d+$/, "");  // a mean has the colour of its values
  const labels = [...new Set(chart.traces.map(of))];
  add(plot, () => {
    const traces = chart.traces.map((one) => {
      const shade = COLORS[(many ? one.run : labels.indexOf(of(one))) % COLORS.length];
      const points = one.style === "points" || one.y.length === 1;
      return {
        type: "scatter", mode: points ? "lines+markers" : "lines",
        name: many ? `${data.runs[one.run].name}: ${one.name}` : one.name,
        x: place(one.run, one.x), y: one.y, opacity: one.style === "faint" ? 0.35 : 1,
        line: { color: shade, width: one.style === "faint" ? 1 : 2,
          dash: many && labels.indexOf(of(one)) > 0 ? "dot" : "solid" },
        marker: { color: shade, size: 7 },
      };
    });
    const limits = chart.lines.map((line) => ({ type: "line", x0: 0, x1: 1, xref: "paper", y0: line.y, y1: line.y,
      line: { color: KINDS.alarm, width: 1, dash: "dash" } }));
    const positive = chart.traces.every((one) => one.y.every((value) => value === null || value > 0));
    return { traces, options: { yaxis: { type: chart.log && positive ? "log" : "linear" },
      shapes: [...markShapes(), ...limits] } };
  });
}

function marksChart() {
  if (!data.runs.some((run) => run.marks.length)) return;
  const { plot } = card("marks", "Saves, restarts, alarms", "");
  add(plot, () => ({
    traces: data.runs.flatMap((run, number) => Object.keys(KINDS).map((kind) => {
      const found = run.marks.filter((mark) => mark.kind === kind);
      return { type: "scatter", mode: "markers", name: many ? `${run.name}: ${kind}` : kind,
        x: place(number, found.map((mark) => mark.i)), y: found.map(() => (many ? `${run.name}: ${kind}` : kind)),
        text: found.map((mark) => mark.text), hovertemplate: "%{x}: %{text}<extra></extra>",
        marker: { color: KINDS[kind], size: 9, symbol: kind === "save" ? "circle" : "diamond" } };
    }).filter((trace) => trace.x.length)),
    options: { showlegend: false, yaxis: { type: "category" } },
  }));
}

function heat(id, title, unit, run, x, y, z, more) {
  const { plot, head } = card(id, title, unit);
  add(plot, () => ({
    traces: [{ type: "heatmap", x: place(run, x), y: y(), z: z(), colorscale: "Viridis",
      colorbar: { thickness: 12 }, hovertemplate: "%{x}, %{y}: %{z}<extra></extra>", ...more }],
    options: { yaxis: { title: { text: id.startsWith("imbalance") ? "layer" : "expert" } } },
  }));
  return head;
}

function experts(run, number) {
  const suffix = many ? ` of ${run.name}` : "";
  if (run.imbalance) {
    const { x, y, z } = run.imbalance;
    heat(`imbalance-${number}`, `MaxVio by layer${suffix}`, "", number, x, () => y.map(String), () => z,
      { zmin: 0 });
  }
  if (!run.loads) return;
  const choice = element("select", { "aria-label": "layer" },
    ...run.loads.layers.map((layer, n) => element("option", { value: n }, `layer ${layer}`)));
  const names = run.loads.load[0].map((_, n) => String(n));
  const head = heat(`load-${number}`, `Load of each expert${suffix}`, "1 is even", number, run.loads.x, () => names,
    () => run.loads.load[choice.value], { zmin: 0, zmax: 2, zmid: 1, colorscale: "RdBu", reversescale: false });
  head.append(choice);
  heat(`biases-${number}`, `Bias of each expert${suffix}`, "of the layer chosen above", number, run.loads.x,
    () => names, () => run.loads.bias[choice.value], { zmid: 0, colorscale: "RdBu" });
  choice.addEventListener("change", redraw);
}

function phases(run, number) {
  if (!run.sources.length) return;
  const { plot } = card(`sources-${number}`, `Data${many ? ` of ${run.name}` : ""}`, "share of the tokens");
  add(plot, () => ({
    traces: run.sources.map((source, n) => ({ type: "scatter", mode: "lines", stackgroup: "all", name: source.name,
      x: place(number, source.x), y: source.y, line: { color: COLORS[n % COLORS.length], width: 1 } })),
    options: { yaxis: { range: [0, 1] } },
  }));
}

function timeChart() {
  const { plot } = card("goodput", "Where the time went", "hours");
  add(plot, () => ({
    traces: Object.entries(PARTS).map(([part, shade]) => ({ type: "bar", orientation: "h", name: part,
      y: data.runs.map((run) => run.name), x: data.runs.map((run) => run.goodput[part] / 3600),
      marker: { color: shade } })),
    options: { barmode: "stack", xaxis: { title: { text: "hours" } }, yaxis: { type: "category" } },
  }));
}

function overview() {
  const parent = document.getElementById("overview");
  for (const run of data.runs) {
    const parts = run.goodput;
    const whole = Object.values(parts).reduce((sum, value) => sum + value, 0);
    const losses = data.charts.find((chart) => chart.id === "loss")?.traces
      .filter((one) => one.run === data.runs.indexOf(run)) ?? [];
    const newest = (one) => (one ? String(one.y.findLast((value) => value !== null) ?? "-") : "-");
    const tiles = {
      steps: run.facts.steps, tokens: run.facts.tokens,
      "training loss": newest(losses.find((one) => one.style === "line")),
      "validation loss": newest(losses.find((one) => one.style === "points")),
      "of the time in training": whole ? `${(100 * parts.training / whole).toFixed(1)} %` : "-",
      alarms: String(run.marks.filter((mark) => mark.kind === "alarm").length),
    };
    if (many) parent.append(element("h2", {}, run.name));
    parent.append(element("div", { class: "tiles" }, ...Object.entries(tiles).map(([name, text]) =>
      element("div", { class: "tile" }, element("b", {}, text), element("span", {}, name)))));
  }
}

function table(title, head, rows) {
  const cells = (kind, row) => element("tr", {}, ...row.map((text, n) =>
    element(n && kind === "td" ? "td" : "th", {}, element(n && kind === "td" ? "code" : "span", {}, text))));
  document.getElementById("tables").append(element("article", { class: "card" }, element("h2", {}, title),
    element("table", {}, cells("th", head), ...rows.map((row) => cells("td", row)))));
}

function start() {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.classList.toggle("dark", kept("theme", dark) === "dark");
  const axis = document.getElementById("axis");
  axis.value = kept("axis", "steps");
  overview();
  data.charts.forEach(curves);
  data.runs.forEach(experts);
  data.runs.forEach(phases);
  marksChart();
  timeChart();
  const names = Object.keys(data.runs[0].facts).filter((name) => data.runs.some((run) => run.facts[name]));
  table("The runs", ["", ...data.runs.map((run) => run.name)],
    names.map((name) => [name, ...data.runs.map((run) => run.facts[name])]));
  if (many) {
    table("Arguments that differ", ["", ...data.runs.map((run) => run.name)],
      data.differences.map((one) => [one.flag, ...one.values]));
  }
  document.getElementById("footer").textContent = `written ${data.written}`;
  axis.addEventListener("change", () => { keep("axis", axis.value); redraw(); });
  document.getElementById("marks").addEventListener("change", redraw);
  document.getElementById("theme").addEventListener("click", () => {
    root.classList.toggle("dark");
    keep("theme", root.classList.contains("dark") ? "dark" : "light");
    redraw();
  });
  redraw().then(() => {
    scrollTo(0, Number(kept("scroll", 0)));
    addEventListener("scroll", () => keep("scroll", scrollY), { passive: true });
    plots.forEach(({ plot }) => sizes.observe(plot));
    root.dataset.drawn = String(plots.length);
  });
}

start();
