/** The server: what it serves, within which limits, and how busy it is, read from its metrics every other second. */

import { ask, keys, metricsPage } from "./api.js";
import { byId, el, put, svg, whole } from "./dom.js";
import { parse, quantile, sum } from "./prometheus.js";

const EVERY_MS = 2000;
const WINDOW_MS = 60_000;

let timer = null;
let abort = null;
let scrapes = []; // {at, series}, the newest last

const queued = (labels) => labels.class;

/** Begin to show the server in a panel, unless it is shown; `stopServer` ends it. */
export function showServer(panel) {
  if (abort) return;
  if (!panel.childElementCount) panel.append(el("div", { class: "bar" }, el("h2", {}, "Server"), el("p", { class: "note", id: "since" })),
    el("div", { id: "live" }), el("div", { id: "facts" }));
  begin();
}

function begin() {
  scrapes = [];
  abort = new AbortController();
  tell(abort.signal);
  tick(abort.signal);
}

export function stopServer() {
  clearTimeout(timer);
  abort?.abort();
  abort = null;
}

async function tick(signal) {
  try {
    if (!document.hidden) {
      const page = await metricsPage(signal);
      const at = performance.now();
      scrapes = [...scrapes.filter((one) => at - one.at < WINDOW_MS), { at, series: parse(page) }];
      byId("since").textContent = "live, every 2 s";
      draw();
      device();
    }
  } catch (failure) {
    if (signal.aborted) return;
    byId("since").textContent = "";
    scrapes = [];
    if (!byId("metrics-key") || failure.status !== 401) put(byId("live"), unreadable(failure));
  }
  timer = setTimeout(() => tick(signal), EVERY_MS);
}

function unreadable(failure) {
  if (failure.status !== 401) return el("p", { class: "notice" }, `The metrics can’t be read. ${failure.message}`);
  const field = el("input", { id: "metrics-key", type: "password", autocomplete: "off", spellcheck: "false" });
  const use = (event) => {
    event.preventDefault();
    keys.metrics.set(field.value);
    put(byId("live"));
    stopServer();
    begin();
  };
  return el("form", { class: "notice", onsubmit: use },
    el("label", { for: "metrics-key" }, keys.metrics.get() ? "That key is not valid for the metrics. They have a key of their own:" : "The metrics have a key of their own:"),
    el("div", { class: "row" }, field, el("button", { type: "submit" }, "Use")));
}

function draw() {
  const { at, series } = scrapes.at(-1), first = scrapes[0];
  const seconds = (at - first.at) / 1000;
  const grown = (name, before) => sum(series, name) - sum(before, name);
  const recent = grown("llm2vec_batch_inputs_count", first.series) > 0;
  // Where nothing has happened since the first look, what has since the server began.
  const before = recent ? first.series : [];
  const since = recent ? "last minute" : "since the start";
  const latency = (share) => quantile(share, series, before, "llm2vec_request_duration_seconds", queued);
  const fills = grown("llm2vec_batch_fill_ratio_count", before);
  const fill = grown("llm2vec_batch_fill_ratio_sum", before);
  const lane = (name) => whole(sum(series, "llm2vec_queue_inputs", (labels) => labels.class === name));
  put(byId("live"), el("dl", { class: "tiles" },
    tile("Tokens a second", seconds ? whole(grown("llm2vec_tokens_total", first.series) / seconds) : "–",
      `${whole(sum(series, "llm2vec_throughput_tokens_per_second"))} while the device is busy`, rates()),
    tile("Latency", duration(latency(0.5)), `95 % within ${duration(latency(0.95))}, ${since}`),
    tile("Waiting", whole(sum(series, "llm2vec_queue_inputs")),
      `${lane("interactive")} interactive, ${lane("bulk")} bulk; ${whole(sum(series, "llm2vec_queue_tokens"))} tokens`),
    tile("Batch fill", fills ? `${Math.round((100 * fill) / fills)} %` : "–",
      `of ${whole(sum(series, "llm2vec_batch_tokens_full"))} tokens, ${since}`),
    tile("In flight", whole(Math.max(sum(series, "llm2vec_inflight_requests") - 1, 0)), "requests, beside this page’s look"),
    tile("Requests", whole(sum(series, "llm2vec_request_duration_seconds_count", queued)), `and ${whole(sum(series, "llm2vec_rejected_total"))} turned away, since the start`)));
}

const tile = (name, value, about, drawing) => el("div", { class: "tile" },
  el("dt", {}, name), el("dd", { class: "value" }, value), el("dd", { class: "note" }, about), drawing && el("dd", { "aria-hidden": "true" }, drawing));

/** Tokens a second between scrapes, as a line. */
function rates() {
  const values = scrapes.slice(1).map((scrape, i) => {
    const tokens = sum(scrape.series, "llm2vec_tokens_total") - sum(scrapes[i].series, "llm2vec_tokens_total");
    return (tokens / (scrape.at - scrapes[i].at)) * 1000;
  });
  if (values.length < 2) return null;
  const top = Math.max(...values, 1), most = WINDOW_MS / EVERY_MS;
  const points = values.map((value, i) => `${(100 * (most - values.length + 1 + i)) / most},${(22 - (20 * value) / top).toFixed(1)}`);
  return svg("svg", { class: "spark", viewBox: "0 0 100 24", preserveAspectRatio: "none" }, svg("polyline", { points: points.join(" ") }));
}

function duration(seconds) {
  if (Number.isNaN(seconds)) return "–";
  return seconds < 1 ? `${(seconds * 1000).toPrecision(seconds < 0.01 ? 2 : 3) * 1} ms` : `${seconds.toPrecision(3)} s`;
}

/** What does not change while the server runs. */
async function tell(signal) {
  try {
    const [limits, models] = await Promise.all([ask("info", { signal }), ask("v1/models", { signal })]);
    const [model] = models.data;
    put(byId("facts"), list({
      Model: limits.model_id,
      Version: limits.version,
      Device: el("span", { id: "device" }, "–"),
      Arithmetic: limits.model_dtype,
      Pooling: limits.model_type.embedding.pooling,
      Vector: `${whole(model.dimensions)} numbers${model.widths ? `, may be cut to ${model.widths.join(", ")}` : ""}`,
      "Longest input": `${whole(limits.max_input_length)} tokens${limits.auto_truncate ? ", longer ones are cut as the official library does" : ""}`,
      "One batch": `${whole(limits.max_batch_tokens)} tokens at most`,
      "One request": `${whole(limits.max_client_batch_size)} inputs at most`,
      "The queue": `${whole(limits.max_concurrent_requests)} tokens a lane`,
      "Embedding space": model.embedding_space,
    }));
    if (scrapes.length) device();
  } catch (failure) {
    if (!signal.aborted) put(byId("facts"), el("p", { class: "notice" }, failure.message));
  }
}

/** The device among these facts, which only the metrics know. */
function device() {
  const { series } = scrapes.at(-1);
  const place = byId("device");
  const found = series.filter(({ name }) => name === "llm2vec_build_info").map(({ labels }) => labels.device);
  const bytes = (kind) => sum(series, "llm2vec_gpu_memory_bytes", (labels) => labels.kind === kind);
  const memory = bytes("total") ? `, ${gigabytes(bytes("reserved"))} of ${gigabytes(bytes("total"))} in use` : "";
  if (place) place.textContent = `${found.join(", ") || "–"}${memory}`;
}

const gigabytes = (bytes) => `${(bytes / 1e9).toFixed(1)} GB`;

const list = (entries) => el("dl", { class: "facts" }, Object.entries(entries).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
