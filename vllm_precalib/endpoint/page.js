"use strict";
// Everything that comes from model files or the model goes through textContent, never through HTML.
const API = "precalib/api/v1";
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function trouble(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
}

async function refusal(answer) {
  const body = await answer.json().catch(() => ({}));
  return new Error(body.error?.message || `The server refused (${answer.status}).`);
}

async function get(path) {
  const answer = await fetch(`${API}/${path}`);
  if (!answer.ok) throw await refusal(answer);
  return answer.json();
}

const size = (bytes) => {
  let unit = 0;
  while (bytes >= 1000 && unit < 3) { bytes /= 1000; unit += 1; }
  return `${bytes.toPrecision(4)} ${["B", "kB", "MB", "GB"][unit]}`;
};
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %`;

function tile(list, what, value) {
  list.append(make("div", {}, make("dt", { textContent: what }), make("dd", { textContent: value })));
}

/* A table that its headings sort. Columns: {name, words, value(row), text(row)}. */
function table(element, columns, rows, sorted, shade) {
  const body = make("tbody");
  const heads = columns.map((column) => {
    const button = make("button", { type: "button", textContent: column.name });
    const head = make("th", { scope: "col", className: column.words ? "words" : "" }, button);
    button.addEventListener("click", () => {
      const first = column.words ? "ascending" : "descending";
      const other = column.words ? "descending" : "ascending";
      order(column, head, head.getAttribute("aria-sort") === first ? other : first);
    });
    return head;
  });
  function order(column, head, way) {
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
    lines.sort((a, b) => sign * compare(column.value(a.row), column.value(b.row)));
    body.append(...lines.map((each) => each.line));
  }
  const lines = rows.map((row) => {
    const line = make("tr");
    columns.forEach((column, index) => {
      const text = (column.text || column.value)(row);
      const cell = index ? make("td", { textContent: text }) : make("th", { scope: "row", textContent: text });
      if (column.words) cell.className = column.className || "words";
      line.append(cell);
    });
    if (shade) shade(line, row);
    return { row, line };
  });
  element.replaceChildren(make("thead", {}, make("tr", {}, ...heads)), body);
  body.append(...lines.map((each) => each.line));
  if (sorted !== undefined) heads[sorted].querySelector("button").click();
  return lines;
}

function showReport(report) {
  const tiles = byId("tiles");
  tile(tiles, "recipe", report.recipe);
  tile(tiles, "effective bits per packed weight", report.effective_bits.toFixed(3));
  tile(tiles, "packed weights", `${size(report.packed_bytes)} from ${size(report.source_bytes)}`);
  tile(tiles, "unquantized", size(report.unquantized_bytes));
  tile(tiles, "relative error, mean", report.relative_error.toFixed(5));
  const columns = [
    { name: "weight", words: true, value: (w) => w.module },
    { name: "recipe", words: true, value: (w) => w.recipe },
    { name: "shape", value: (w) => w.shape[0] * w.shape[1], text: (w) => w.shape.join(" × ") },
    { name: "bits", value: (w) => w.bits, text: (w) => w.bits.toFixed(3) },
    { name: "error", value: (w) => w.relative_error, text: (w) => w.relative_error.toFixed(5) },
    { name: "salient", value: (w) => w.salient_share, text: (w) => percent(w.salient_share) },
  ];
  const lines = table(byId("weights"), columns, report.weights, 4);
  byId("filter").addEventListener("input", () => {
    const wanted = byId("filter").value.toLowerCase();
    for (const { row, line } of lines) line.hidden = !row.module.toLowerCase().includes(wanted);
    const shown = lines.filter(({ line }) => !line.hidden).length;
    byId("shown").textContent = wanted ? `${shown} shown` : "";
  });
  showMap(report.weights.filter((weight) => weight.layer !== null));
  for (const [reason, names] of Object.entries(report.unquantized)) {
    byId("unquantized").append(make("dt", { textContent: `${reason} (${names.length})` }), make("dd", { textContent: names.join(", ") }));
  }
  byId("report").hidden = false;
}

function showMap(weights) {
  const kinds = [...new Set(weights.map((weight) => weight.kind))];
  const layers = [...new Set(weights.map((weight) => weight.layer))].sort((a, b) => a - b);
  const largest = Math.max(...weights.map((weight) => weight.relative_error)) || 1;
  const head = make("tr", {}, make("th", { scope: "col", textContent: "layer" }));
  head.append(...layers.map((layer) => make("th", { scope: "col", textContent: layer })));
  const body = make("tbody");
  for (const kind of kinds) {
    const line = make("tr", {}, make("th", { scope: "row", textContent: kind }));
    for (const layer of layers) {
      const weight = weights.find((each) => each.kind === kind && each.layer === layer);
      const cell = make("td", { textContent: weight ? (1000 * weight.relative_error).toFixed(1) : "" });
      if (weight) {
        cell.className = "shade";
        cell.style.setProperty("--e", weight.relative_error / largest);
      }
      line.append(cell);
    }
    body.append(line);
  }
  byId("map").replaceChildren(make("thead", {}, head), body);
}

function showBackends(found) {
  if (found.missing || !found.layers.length) {
    byId("no-backends").textContent = found.missing || "No packed layer was recorded.";
    byId("no-backends").hidden = false;
    return;
  }
  const why = (c) => Object.entries(c.reasons).map(([name, reason]) => `${name}: ${reason}`).join("; ");
  const columns = [
    { name: "layer", words: true, value: (c) => c.layer },
    { name: "rank", value: (c) => c.rank },
    { name: "layout", words: true, value: (c) => c.layout_name },
    { name: "backend", words: true, value: (c) => c.backend + (c.asked_for ? " (asked for)" : "") },
    { name: "why not the others", words: true, className: "words reasons", value: why },
  ];
  table(byId("backends"), columns, found.layers, 0);
  byId("backends").parentElement.hidden = false;
}

/* Numbers that move: a tile each, with a curve of the last two minutes. */
const LIVE = [
  ["tokens per second", (l) => l.generated_per_second, (v) => v.toFixed(1)],
  ["prompt tokens per second", (l) => l.prompt_per_second, (v) => v.toFixed(1)],
  ["time to first token", (l) => l.first_token_seconds, (v) => `${(1000 * v).toFixed(0)} ms`],
  ["time per token", (l) => l.token_seconds, (v) => `${(1000 * v).toFixed(1)} ms`],
  ["running", (l) => l.running, (v) => v],
  ["waiting", (l) => l.waiting, (v) => v],
  ["KV cache in use", (l) => l.kv_cache_share, percent],
  ["requests with NaN", (l) => l.nan_requests, (v) => v],
];

function watch() {
  const kept = LIVE.map(([name]) => {
    const value = make("dd", { textContent: "–" });
    const line = document.createElementNS(SVG, "polyline");
    const chart = document.createElementNS(SVG, "svg");
    chart.setAttribute("viewBox", "0 0 120 30");
    chart.setAttribute("preserveAspectRatio", "none");
    chart.setAttribute("aria-hidden", "true");
    chart.append(line);
    byId("live").append(make("div", {}, make("dt", { textContent: name }), value, chart));
    return { value, line, history: [] };
  });
  const source = new EventSource(`${API}/events`);
  source.onmessage = (event) => {
    trouble("");
    const live = JSON.parse(event.data);
    LIVE.forEach(([, take, text], index) => {
      const { value, line, history } = kept[index];
      const now = take(live);
      if (now !== null) value.textContent = text(now);
      history.push(now ?? 0);
      if (history.length > 120) history.shift();
      const top = Math.max(...history) || 1;
      line.setAttribute("points", history.map((v, i) => `${i + 120 - history.length},${29 - 28 * v / top}`).join(" "));
    });
  };
  source.onerror = () => trouble("The server does not answer; trying again.");
}

/* An answer as tokens that one can point at or walk through with the arrow keys. */
class Answer {
  constructor(element) {
    this.element = element;
    element.replaceChildren();
    element.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = step && element.children[[...element.children].indexOf(document.activeElement) + step];
      if (next) { next.focus(); event.preventDefault(); }
    };
  }

  add(token) {
    const button = make("button", { type: "button", className: "token", textContent: token.text });
    button.tabIndex = this.element.children.length ? -1 : 0;
    button.style.setProperty("--p", token.probability);
    const show = () => this.show(button, token);
    button.addEventListener("mouseenter", show);
    button.addEventListener("focus", () => {
      for (const other of this.element.children) other.tabIndex = -1;
      button.tabIndex = 0;
      show();
    });
    this.element.append(button);
  }

  show(button, token) {
    document.querySelectorAll(".chosen").forEach((other) => other.classList.remove("chosen"));
    button.classList.add("chosen");
    const kl = token.kl === undefined ? "" : `, KL at least ${token.kl.toFixed(4)} nats`;
    const list = make("ol", {}, ...token.alternatives.map((other) => make("li", { textContent: `${JSON.stringify(other.text)} ${percent(other.probability)}` })));
    byId("detail").replaceChildren(make("strong", { textContent: JSON.stringify(token.text) }), ` ${percent(token.probability)}${kl}`, list);
    byId("detail").hidden = false;
  }
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
  }
}

let running = null;
async function ask(event) {
  event.preventDefault();
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  byId("answers").hidden = byId("other").hidden = byId("detail").hidden = true;
  byId("state").textContent = "Waiting for the first token";
  const shown = new Answer(byId("answer"));
  const body = {
    prompt: byId("prompt").value,
    chat: byId("chat").checked,
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
  };
  try {
    const answer = await fetch(`${API}/generate`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: running.signal,
    });
    if (!answer.ok) throw await refusal(answer);
    for await (const part of eventsOf(answer)) take(part, shown);
  } catch (error) {
    byId("state").textContent = error.name === "AbortError" ? "Stopped." : String(error.message);
  } finally {
    byId("send").disabled = false;
    byId("stop").disabled = true;
  }
}

function take(part, shown) {
  if (part.kind === "token") {
    byId("answers").hidden = false;
    byId("state").textContent = "Answering";
    shown.add(part);
  } else if (part.kind === "comparison") {
    const other = new Answer(byId("other-answer"));
    part.tokens.forEach((token) => other.add(token));
    byId("other-about").textContent = `${part.against}: mean KL(other ‖ served) at least ${part.mean_kl.toFixed(4)} nats per token.`;
    byId("other").hidden = false;
  } else if (part.kind === "problem") {
    byId("state").textContent = part.text;
  } else if (part.kind === "done") {
    byId("state").textContent = `${part.tokens} tokens in ${part.seconds.toFixed(1)} s`;
  }
}

async function start() {
  byId("prompt-form").addEventListener("submit", ask);
  byId("stop").addEventListener("click", () => running.abort());
  watch();
  const about = await get("about");
  document.title = `${about.model} – precalib`;
  byId("model").textContent = about.model;
  byId("versions").textContent = `precalib ${about.precalib}, vLLM ${about.vllm}${about.against ? `, compared with ${about.against}` : ""}`;
  await get("report").then(showReport, (error) => {
    byId("no-report").textContent = error.message;
    byId("no-report").hidden = false;
  });
  showBackends(await get("backends"));
}
start().catch((error) => trouble(error.message));
