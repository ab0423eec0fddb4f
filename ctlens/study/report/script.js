"use strict";
const PRINTED = {drawn: 900, width: 680, height: 700};  // made smaller, so that two fit on a page
const SMALLEST = .72, LEGEND_ROW = 20, ABOVE = 14, PANEL_NAME = 20;
const LIGHT = JSON.parse(document.getElementById("colours").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)");
const wide = matchMedia("(min-width: 70.01rem)");
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const figures = new Map(all(".plot").map(plot =>
  [plot, JSON.parse(plot.closest("figure").querySelector("script").textContent)]));
const boxes = all(".methods input");
const hidden = () => new Set(boxes.filter(box => !box.checked).map(box => box.value));

// ---- colours: those of the figures are made for a white page; on a dark one ink turns light, the rest is lifted.
const mixed = hex => "#" + [1, 3, 5].map(at =>
  Math.round(.75 * parseInt(hex.slice(at, at + 2), 16) + 64).toString(16).padStart(2, "0")).join("");
const palette = isDark => {
  if (!isDark) return hex => hex;
  const now = getComputedStyle(document.documentElement);
  const known = {[LIGHT.ink]: now.getPropertyValue("--ink").trim(), [LIGHT.muted]: now.getPropertyValue("--muted").trim()};
  return hex => known[hex] || mixed(hex);
};
const painted = (value, shade) => {
  if (typeof value === "string") return /^#[0-9a-f]{6}$/i.test(value) ? shade(value) : value;
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(entry => painted(entry, shade));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, entry]) => [name, painted(entry, shade)]));
};

// ---- drawing: always from the saved figure and the state of the page, so that one path serves every change.
const isBand = trace => trace.fill === "toself";
const isNamed = trace => trace.name && trace.showlegend !== false;
const group = trace => trace.legendgroup || trace.name;
const chosen = data => {  // the hidden methods out of sight, lines over the bands of those drawn later
  const without = hidden(), legend = new Set(data.filter(isNamed).map(group));
  const traces = data.map(trace => ({...trace, visible: !without.has(trace.meta?.method) && (trace.visible ?? true)}));
  for (const trace of traces) if (trace.visible && isNamed(trace)) legend.delete(group(trace));
  for (const trace of traces) if (trace.visible && legend.delete(group(trace))) trace.showlegend = true;  // for its group
  return traces.sort((one, other) => isBand(other) - isBand(one));
};
const legendRows = (data, width) => {  // as many as its names need, one after the other
  const names = new Set(data.filter(trace => trace.visible && isNamed(trace)).map(trace => trace.name));
  let rows = names.size > 1 ? 1 : 0, at = 0;
  for (const name of names) {
    const next = 45 + 7.2 * name.length;
    if (at && at + next > width - 110) { rows += 1; at = 0; }
    at += next;
  }
  return rows;
};
// A figure that is wider than the page is drawn as wide as it has to be, then made smaller, then it scrolls.
const measured = (plot, data, printed) => {  // known before drawing, so that the page does not jump
  const {layout} = figures.get(plot), room = printed ? PRINTED.width : plot.parentElement.clientWidth;
  const width = Math.max(printed ? PRINTED.drawn : room, plot.dataset.width);
  const named = (layout.annotations || []).some(note => note.yref === "paper" && note.yanchor === "bottom");
  const top = ABOVE + (named ? PANEL_NAME : 0) + LEGEND_ROW * legendRows(data, width);
  const height = plot.dataset.height - (layout.margin?.t || 0) + top;
  const scale = printed ? Math.min(room / width, PRINTED.height / height, 1) : Math.max(SMALLEST, room / width);
  Object.assign(plot.style, {
    width: `${width}px`, height: `${height}px`, transform: scale < 1 ? `scale(${scale})` : "",
    margin: `0 ${width * (scale - 1)}px ${height * (scale - 1)}px 0`,
  });
  plot.parentElement.style.height = printed ? `${height * scale}px` : "";
  return {width, height, margin: {...layout.margin, t: top}};
};
const draw = (plot, printed) => {
  stale.delete(plot);  // whatever comes of it: a figure that cannot be drawn is not tried for ever
  const saved = figures.get(plot), shade = palette(dark.matches && !printed), now = getComputedStyle(document.body);
  const data = chosen(painted(saved.data, shade)), layout = painted(saved.layout, shade);
  return Plotly.react(plot, data, {
    ...layout, ...measured(plot, data, printed), autosize: false, uirevision: true,
    paper_bgcolor: "rgba(0, 0, 0, 0)",
    dragmode: touch.matches ? false : "zoom",
    hoverlabel: {bgcolor: printed ? "#fff" : now.backgroundColor, font: {color: printed ? LIGHT.ink : now.color}},
    legend: {...layout.legend, tracegroupgap: 0},
    modebar: {...layout.modebar, color: "rgba(128, 128, 128, .7)", activecolor: now.color},
  }, {displaylogo: false, displayModeBar: touch.matches ? false : "hover"});
};
const unfolded = plot => plot.closest(".fold")?.open !== false;  // nothing has a width in a part that is folded
const stale = new Set([...figures.keys()].filter(unfolded)), near = new Set();
const idle = window.requestIdleCallback || (job => setTimeout(job, 50));
let working = false;
const work = () => {  // one figure at a time, those on the screen first, and the page answers in between
  const next = [...near].find(plot => stale.has(plot)) || [...stale][0];
  working = Boolean(next);
  if (next) new Promise(done => done(draw(next))).finally(() => near.size ? setTimeout(work) : idle(work));
};
const start = () => { if (!working) work(); };
let printing = false;
const refresh = () => {
  if (printing) return;  // a dark page turns light for the printer, which is no reason to draw for the screen
  for (const plot of [...figures.keys()].filter(unfolded)) { measured(plot, chosen(figures.get(plot).data)); stale.add(plot); }
  start();
};
const watcher = new IntersectionObserver(seen => {
  for (const {target, isIntersecting} of seen) near[isIntersecting ? "add" : "delete"](target);
  start();
}, {rootMargin: "600px 0px"});
for (const plot of figures.keys()) watcher.observe(plot);
dark.addEventListener("change", refresh);
let resizing, drawnWidth = innerWidth;
addEventListener("resize", () => {
  clearTimeout(resizing);
  if (innerWidth !== drawnWidth) resizing = setTimeout(() => { drawnWidth = innerWidth; refresh(); }, 150);
});
addEventListener("beforeprint", () => {
  printing = true;
  for (const more of all("details.more")) more.open = true;
  for (const plot of figures.keys()) draw(plot, true);
});
addEventListener("afterprint", () => { printing = false; refresh(); });

// ---- methods
const choose = () => {
  const without = hidden();
  for (const part of all("main [data-method]")) part.hidden = without.has(part.dataset.method);
  refresh();
};
for (const box of boxes) box.addEventListener("change", choose);
for (const button of all(".methods button")) button.addEventListener("click", () => {
  for (const box of boxes) box.checked = button.value === "all";
  choose();
});
choose();

// ---- the side: both lists open beside a wide page, one at a time over a narrow one
const lists = all(".side details");
const fold = () => { for (const list of lists) list.open = wide.matches; };
for (const list of lists) list.addEventListener("toggle", () => {
  if (list.open && !wide.matches) for (const other of lists) if (other !== list) other.open = false;
});
const close = event => {
  const list = !wide.matches && lists.find(list => list.open);
  if (!list) return;
  if (event.key === "Escape") list.querySelector("summary").focus();
  if (event.key === "Escape" || event.target.closest?.(".side a") || !event.target.closest?.(".side")) list.open = false;
};
addEventListener("keydown", event => { if (event.key === "Escape") close(event); });
addEventListener("click", close);
wide.addEventListener("change", fold);
fold();

const side = document.querySelector(".side");
const links = all(".side nav a"), targets = links.map(link => document.querySelector(link.hash));
const mark = () => {
  const passed = targets.filter(target => target.getBoundingClientRect().top < innerHeight / 4).length;
  const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 2;
  const current = links[atEnd ? links.length - 1 : Math.max(0, passed - 1)];
  for (const link of links) link === current ? link.setAttribute("aria-current", "location") : link.removeAttribute("aria-current");
  if (current.offsetTop < side.scrollTop || current.offsetTop > side.scrollTop + side.clientHeight - 40)
    side.scrollTop = current.offsetTop - side.clientHeight / 2;
};
let marking;
addEventListener("scroll", () => { cancelAnimationFrame(marking); marking = requestAnimationFrame(mark); }, {passive: true});
mark();

// ---- parts that are folded: opened where a link leads into one
for (const part of all(".fold")) part.addEventListener("toggle", () => { if (part.open) refresh(); });
const unfold = hash => {
  const part = hash && document.querySelector(hash)?.closest(".fold");
  if (part) part.open = true;
};
for (const link of all("a[href^='#']")) link.addEventListener("click", () => unfold(link.hash));
unfold(location.hash);

// ---- the numbers of a figure, written when they are asked for
const table = ([header, ...rows], title) => {
  const made = document.createElement("table");
  made.createCaption().textContent = title;
  const cell = (row, text, scope) => {
    const added = row.appendChild(document.createElement(scope ? "th" : "td"));
    if (scope) added.scope = scope;
    added.textContent = text;
  };
  const head = made.createTHead().insertRow(), body = made.createTBody();
  for (const name of header) cell(head, name, "col");
  for (const row of rows) {
    const line = body.insertRow();
    row.forEach((text, place) => cell(line, text, place ? "" : "row"));
  }
  return made;
};
for (const numbers of all("details.numbers")) numbers.addEventListener("toggle", () => {
  if (numbers.querySelector("table")) return;
  const rows = JSON.parse(numbers.querySelector("script").textContent);
  const title = numbers.closest("figure").querySelector("h3, h4").textContent;
  const scroll = numbers.appendChild(document.createElement("div"));
  Object.assign(scroll, {className: "scroll", tabIndex: 0});
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", `Numbers: ${title}`);
  scroll.append(table(rows, title));
  const file = numbers.appendChild(document.createElement("a"));
  const csv = rows.map(row => row.map(text => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text).join(",")).join("\n");
  Object.assign(file, {download: `${numbers.closest("figure").id.replace("figure-", "")}.csv`, textContent: "Save as CSV", href: URL.createObjectURL(new Blob([csv]))});
});
