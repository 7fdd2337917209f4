"use strict";
const $ = (id) => document.getElementById(id);
const data = $("data") ? JSON.parse($("data").textContent) : { layers: [] };
const layers = data.layers;

/* numbers and text: the same digits as in the page's other tables */
function figures(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = value ? Math.floor(Math.log10(Math.abs(value))) : 0;
  const fixed = { minimumFractionDigits: Math.max(0, digits - 1 - size), maximumFractionDigits: Math.max(0, digits - 1 - size) };
  const text = !value ? "0" : size < -4 ? value.toExponential(digits - 1) : value.toLocaleString("en", fixed);
  return text.replaceAll("-", "−");
}
function short(value) {
  if (value === null) return "–";
  for (const [factor, unit] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]) if (value >= factor) return figures(value / factor) + unit;
  return String(value);
}
function withEnds(value, low, high, level) {
  const ends = low === null || high === null || value === null ? "" : ` (${figures(low)} to ${figures(high)}${level ? `, ${level}` : ""})`;
  return [figures(value), ends];
}
function breakable(name) {
  return name.split(/(?<=[._])/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
}
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/* the layer table: rows are built when they are shown, at first MOST of them, so that sorting stays quick; walked through with the arrow keys */
const MOST = 100;
const table = $("layer-table"), rows = [];
const decibels = layers.some((layer) => layer.psnr_effect !== null);
let chosen = -1, sorted = layers.map((_, i) => i), wanted = () => true, most = MOST;
function buildRow(layer, index) {
  const pick = make("button", { type: "button", class: "pick", tabindex: "-1" });
  pick.append(...breakable(layer.layer));
  const number = (text, ends = "") => make("td", { class: "number" }, text, ...(ends ? [make("span", { class: "ends" }, ends)] : []));
  const row = make("tr", { "data-layer": index }, make("td", { class: "name" }, pick), make("td", {}, layer.operator), make("td", {}, ...breakable(layer.block)),
    number(short(layer.weights)), number(short(layer.macs)), number(...withEnds(layer.effect, layer.low, layer.high)),
    ...(decibels ? [number(...withEnds(layer.psnr_effect, layer.psnr_low, layer.psnr_high))] : []),
    number(...withEnds(layer.real, layer.real_low, layer.real_high)), number(String(layer.swaps)), make("td", {}, layer.scheme || "–"),
    number(figures(layer.act)));
  if (index === chosen) row.setAttribute("aria-selected", "true");
  return row;
}
function show() {
  const all = sorted.filter(wanted), some = all.slice(0, most);
  table.tBodies[0].replaceChildren(...some.map((i) => rows[i] || (rows[i] = buildRow(layers[i], i))));
  $("layer-count").textContent = `${all.length} of ${layers.length} layers${some.length < all.length ? `, the first ${some.length} shown` : ""}`;
  $("all").hidden = some.length === all.length;
  $("all").textContent = `Show all ${all.length}`;
  if (some.length) reach(rows[some[0]]);
}
function compare(a, b) {
  return typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
}
function order(key, up) {
  const known = [], unknown = [];
  layers.forEach((layer, i) => (layer[key] === null || layer[key] === "" ? unknown : known).push(i));
  known.sort((i, j) => (up ? compare(layers[i][key], layers[j][key]) : compare(layers[j][key], layers[i][key])) || i - j);
  return known.concat(unknown);
}
function sortBy(head) {
  const numeric = head.classList.contains("number"), now = head.getAttribute("aria-sort");
  const up = now === "none" ? !numeric : now !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", other === head ? (up ? "ascending" : "descending") : "none");
  sorted = order(head.dataset.key, up);
  show();
}
function filterRows(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  wanted = (i) => {
    const { layer, operator, block, scheme } = layers[i];
    const all = `${layer} ${operator} ${block} ${scheme}`.toLowerCase();
    return words.every((word) => all.includes(word));
  };
  show();
}
function reach(row, focus = false) {
  for (const other of table.querySelectorAll('.pick[tabindex="0"]')) other.tabIndex = -1;
  const pick = row.querySelector(".pick");
  pick.tabIndex = 0;
  if (focus) pick.focus();
}
if (table) {
  show();
  for (const head of table.tHead.rows[0].cells) head.firstElementChild.addEventListener("click", () => sortBy(head));
  $("layer-filter").addEventListener("input", (event) => filterRows(event.target.value));
  $("all").addEventListener("click", () => {
    most = Infinity;
    show();
  });
  table.tBodies[0].addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    reach(row);
    choose(Number(row.dataset.layer), true);
  });
  table.tBodies[0].addEventListener("keydown", (event) => {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    const row = step && event.target.closest("tr")[step];
    if (step) event.preventDefault();
    if (row) reach(row, true);
  });
}

/* one chosen layer: ringed in every figure, marked in the table, explained in its panel */
const SVG = "http://www.w3.org/2000/svg";
function ring(element) {
  const isPoint = element.tagName === "use";
  const box = isPoint ? null : element.getBBox();
  const mark = document.createElementNS(SVG, isPoint ? "circle" : "rect");
  const place = isPoint ? { cx: element.getAttribute("x"), cy: element.getAttribute("y"), r: 5.5 }
    : { x: box.x - 1.5, y: box.y - 1, width: box.width + 3, height: box.height + 2, rx: 2 };
  for (const [key, value] of Object.entries({ class: "ring", ...place })) mark.setAttribute(key, value);
  element.parentNode.append(mark);
}
function choose(index, go = false) {
  if (!layers[index]) return;
  for (const old of document.querySelectorAll(".ring")) old.remove();
  for (const element of document.querySelectorAll(`svg [data-layer="${index}"]`)) ring(element);
  if (rows[chosen]) rows[chosen].removeAttribute("aria-selected");
  chosen = index;
  if (rows[index]) rows[index].setAttribute("aria-selected", "true");
  explain(layers[index]);
  if (go) $("why").scrollIntoView();
}
function explain(layer) {
  const panel = $("layer"), facts = make("dl", { class: "card" });
  const swap = data.swap.length === 2 ? ` by ${data.swap[0]} to ${data.swap[1]}` : "";
  const say = (name, ...text) => facts.append(make("dt", {}, name), make("dd", {}, ...text));
  say("place", `${layer.operator || "unknown operator type"} in ${layer.block || "no block"}; ${short(layer.weights)} weights, ${short(layer.macs)} multiply-adds`);
  say(`effect on ${data.metric}${swap}, ${data.effects}`, withEnds(layer.effect, layer.low, layer.high, layer.level).join(""));
  if (decibels) say("PSNR lost, dB", withEnds(layer.psnr_effect, layer.psnr_low, layer.psnr_high, layer.level).join(""));
  say("measured swaps", layer.swaps ? `${withEnds(layer.real, layer.real_low, layer.real_high, layer.real_level).join("")}, the mean of ${layer.swaps}` : "none");
  if (layer.shap !== null) say("mean |SHAP| (log units)", `${figures(layer.shap)}; with high weight error less with low: ${figures(layer.shap_signed)}`);
  if (layer.scheme) say("the winner gives it", `${layer.scheme}, activations at ${Number(figures(layer.act))} bits`);
  if (layer.pairs.length) {
    const list = make("ul", { class: "pairs" });
    for (const [other, value, low, high] of layer.pairs) {
      const link = make("button", { type: "button", class: "link" }, layers[other].layer);
      link.addEventListener("click", () => choose(other));
      list.append(make("li", {}, link, `: ${withEnds(value, low, high, data.level).join("")}`));
    }
    say("swapped together with, beyond the sum", list);
  }
  panel.replaceChildren(make("h3", {}, layer.layer), facts, byScheme(layer));
}
function byScheme(layer) {
  const columns = [["error", "error of its output"], ["damage", "error of the denoiser's output"], ["effect", `effect on ${data.metric}, predicted`], ["shap", `mean SHAP, ${data.metric}`]];
  const parts = columns.filter(([key]) => (layer.schemes[key] || []).some((v) => v !== null));
  if (!parts.length) return "";
  const most = Object.fromEntries(parts.map(([key]) => [key, Math.max(...layer.schemes[key].map((v) => Math.abs(v || 0)))]));
  const body = make("tbody");
  data.schemes.forEach((scheme, j) => {
    if (!parts.some(([key]) => layer.schemes[key][j] !== null)) return;
    const cells = parts.map(([key]) => {
      const value = layer.schemes[key][j], cell = make("td", { class: "number bar" }, figures(value));
      cell.style.setProperty("--share", `${most[key] ? (100 * Math.abs(value || 0)) / most[key] : 0}%`);
      if (value < 0) cell.classList.add("less");
      return cell;
    });
    body.append(make("tr", scheme === layer.scheme ? { class: "own" } : {}, make("th", { scope: "row" }, scheme), ...cells));
  });
  const head = make("tr", {}, make("th", { scope: "col" }, "scheme"), ...parts.map(([, text]) => make("th", { scope: "col", class: "number" }, text)));
  return make("div", { class: "scroll small" }, make("table", {}, make("thead", {}, head), body));
}

/* pointing at figures: the nearest named point says what it is; a click on a layer's point chooses it */
const REACH = 14;
let near = null;
function nearest(drawing, event) {
  const frame = drawing.getBoundingClientRect();
  if (drawing.frame !== `${frame.width}`) {
    drawing.points = Array.from(drawing.querySelectorAll("[data-layer], [data-tip]"), (element) => {
      const box = element.getBoundingClientRect();
      return { element, left: box.left - frame.left, top: box.top - frame.top, right: box.right - frame.left, bottom: box.bottom - frame.top };
    });
    drawing.frame = `${frame.width}`;
  }
  const x = event.clientX - frame.left, y = event.clientY - frame.top;
  let best = null, least = REACH;
  for (const point of drawing.points) {
    const away = Math.hypot(Math.max(point.left - x, 0, x - point.right), Math.max(point.top - y, 0, y - point.bottom));
    if (away < least) [best, least] = [point.element, away];
  }
  return best;
}
function pointed(event) {
  const drawing = event.target.closest && event.target.closest(".sheet svg"), tip = $("tip");
  near = drawing ? nearest(drawing, event) : null;
  tip.hidden = !near;
  if (drawing) drawing.style.cursor = near && near.dataset.layer ? "pointer" : "";
  if (!near) return;
  const layer = layers[near.dataset.layer];
  tip.textContent = layer ? `${layer.layer}: ${data.metric} ${withEnds(layer.effect, layer.low, layer.high).join("")}` : near.dataset.tip;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${event.clientY + 18 + tip.offsetHeight < innerHeight ? event.clientY + 18 : event.clientY - tip.offsetHeight - 12}px`;
}
document.addEventListener("pointermove", pointed);
document.addEventListener("scroll", () => { $("tip").hidden = true; }, { passive: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") $("tip").hidden = true; });
document.addEventListener("click", (event) => {
  if (near && near.dataset.layer && event.target.closest(".sheet svg")) choose(Number(near.dataset.layer));
});
if (layers.length && $("layer")) choose(0);

/* light and dark: as the system says, until someone chooses */
const dark = matchMedia("(prefers-color-scheme: dark)"), theme = $("theme");
function isDark() {
  return document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : dark.matches;
}
function showTheme() {
  theme.hidden = false;
  theme.textContent = isDark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
}
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
dark.addEventListener("change", showTheme);
showTheme();
