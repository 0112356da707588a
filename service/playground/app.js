/** The page: what is typed goes to the server, and what comes back into the views. */

import { ask, embed, Failure, keys, preview, readiness, Unreachable } from "./api.js";
import { showCode } from "./code.js";
import { byId, clip, count, el, put, whole } from "./dom.js";
import { showMap } from "./map.js";
import { cosines } from "./math.js";
import { showServer, stopServer } from "./server.js";
import { showSimilarity } from "./similarity.js";
import { showTokens } from "./tokens.js";

// The example of the LLM2Vec paper's repository.
const EXAMPLE = {
  queries: ["how much protein should a female eat", "summit define"],
  documents: [
    "As a general guideline, the CDC's average requirement of protein for women ages 19 to 70 is 46 grams per day. But, as you can see from this chart, you'll need to increase that if you're expecting or training for a marathon. Check out the chart below to see how much protein you should be eating each day.",
    "Definition of summit for English Language Learners. : 1  the highest point of a mountain : the top of a mountain. : 2  the highest level. : 3  a meeting or series of meetings between the leaders of two or more governments.",
  ],
};

const MOST_TEXTS = 500; // on the page
const MOST_TOKENIZED = 40; // in the view of tokens
const TYPING_MS = 350; // after which something typed is looked at
const AGAIN_MS = 2000; // between looks whether a server has loaded

const NONE = "none", OWN = "own";

const state = {
  model: "", // its name in the API
  prompts: {}, // instructions by what the list calls them: {query, document}
  hasDefault: false, // whether requests that name no instruction get one
  most: undefined, // inputs of a request
  embedded: null, // the texts and vectors of the last answer
  isStale: false, // whether something was typed since
  tokensOf: "", // what the view of tokens shows
  failures: { embed: null, tokens: null }, // of what was asked last
};

/** What is asked now, and can be given up: one of a kind at a time. */
const running = { embed: null, tokens: null };

const lines = (id) => byId(id).value.split("\n").map((line) => line.trim()).filter(Boolean);

/** What is typed. */
function typed() {
  return {
    queries: lines("queries"),
    documents: lines("documents"),
    instruction: byId("instruction").value.trim(),
    documentInstruction: byId("document-instruction").value.trim(),
    tooLong: byId("too-long").value,
  };
}

const labelled = ({ queries, documents, instruction, documentInstruction }) => [
  ...queries.map((text, i) => ({ label: `Q${i + 1}`, text, kind: "query", instruction })),
  ...documents.map((text, i) => ({ label: `D${i + 1}`, text, kind: "document", instruction: documentInstruction })),
];

// Embedding

async function run() {
  running.embed?.abort();
  const now = (running.embed = new AbortController());
  try {
    working(true);
    await ready(now.signal);
    if (!state.model) await learn(now.signal);
    const asked = typed();
    const texts = labelled(asked);
    if (!texts.length) throw new Failure("There is no text yet: type a query or a document.");
    if (texts.length > MOST_TEXTS) throw new Failure(`${count(texts.length, "text")}: this page takes ${MOST_TEXTS} at most.`);
    say(`Embedding ${count(texts.length, "text")} …`);
    state.embedded = await embedAll(texts, asked.tooLong, now.signal);
    state.isStale = false;
    fail("embed", null);
    const { cost } = state.embedded;
    say(summary(state.embedded), cost.truncated ? "Not all of it was read: see Tokens for what was cut." : "");
    show();
    if (JSON.stringify(typed()) !== JSON.stringify(asked)) changed();
  } catch (error) {
    if (!now.signal.aborted) fail("embed", error);
  } finally {
    if (running.embed === now) {
      running.embed = null;
      working(false);
    }
  }
}

/** The vectors of all texts: with their instructions and, where there are such, without. */
async function embedAll(texts, tooLong, signal) {
  const instructed = [...texts.keys()].filter((i) => texts[i].instruction);
  const all = [...texts, ...instructed.map((i) => ({ ...texts[i], instruction: "" }))];
  const onProgress = (done) => all.length > done && say(`Embedding: ${done} of ${all.length} …`);
  const { vectors, ...cost } = await embed(all, tooLong, { signal, onProgress, most: state.most }).catch((error) => {
    error.text = all[error.index];
    throw error;
  });
  const without = vectors.slice(0, texts.length);
  instructed.forEach((i, place) => { without[i] = vectors[texts.length + place]; });
  return { texts, vectors: { with: vectors.slice(0, texts.length), without }, instruction: instructed.length > 0, cost };
}

function summary({ texts, instruction, cost: { tokens, times } }) {
  const ms = (value) => (value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`);
  const twice = instruction ? ", with the instruction and without:" : ":";
  return `${count(texts.length, "text")}${twice} ${whole(tokens)} tokens in ${ms(times.total)}, ${ms(times.inference)} of it on the device.`;
}

/** Wait until the server has loaded. */
async function ready(signal) {
  for (;;) {
    const phase = await readiness(signal);
    showPhase(phase);
    if (phase === "ready") return;
    if (phase !== "loading") throw new Failure(phase);
    say("The server is loading its model: the page waits for it.");
    await new Promise((resolve, reject) => {
      setTimeout(resolve, AGAIN_MS);
      signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    });
  }
}

/** The model's name, its prompts and limits. */
async function learn(signal) {
  const [version, known, limits] = await Promise.all(["version", "v1/prompts", "info"].map((path) => ask(path, { signal })));
  state.model = version.model;
  state.hasDefault = known.default !== "";
  state.most = limits.max_client_batch_size;
  byId("model").textContent = version.model;
  document.title = `${version.model} · playground`;
  const own = known.roles.query;
  state.prompts = {
    ...(own ? { "The model’s own, for queries": { query: own, document: "" } } : {}),
    ...known.prompts,
  };
  const names = Object.keys(state.prompts);
  const select = byId("prompt"), before = byId("instruction").value;
  put(select,
    own && el("option", { value: names[0] }, names[0]),
    el("option", { value: NONE }, "None"),
    el("option", { value: OWN }, "Words of my own"),
    el("optgroup", { label: "Named prompts" }, Object.keys(known.prompts).map((name) => el("option", { value: name }, name))),
  );
  if (before) select.value = names.find((name) => state.prompts[name].query === before) ?? OWN;
  else choosePrompt(own ? names[0] : NONE);
}

function choosePrompt(name) {
  byId("prompt").value = name;
  if (name === OWN) {
    byId("instruction").focus();
    return;
  }
  byId("instruction").value = state.prompts[name]?.query ?? "";
  byId("document-instruction").value = state.prompts[name]?.document ?? "";
}

// Views

/** What each view shows in its panel. */
const VIEWS = {
  similarity: (panel) => showSimilarity(panel, state.embedded && comparison(state.embedded)),
  tokens: tokenize,
  map: (panel) => showMap(panel, state.embedded?.texts ?? [], state.embedded?.vectors.with ?? []),
  server: showServer,
  code: (panel) => showCode(panel, { ...typed(), ...coded() }),
};

let view = "similarity";

const show = () => VIEWS[view](byId(`panel-${view}`));

/** Queries against documents; where there are only queries or only documents, these against themselves. */
function comparison({ texts, vectors, instruction }) {
  const of = (kind) => [...texts.keys()].filter((i) => texts[i].kind === kind);
  const queries = of("query"), documents = of("document");
  const down = queries.length ? queries : documents;
  const across = queries.length && documents.length ? documents : down;
  const matrix = (some) => cosines(down.map((i) => some[i]), across.map((i) => some[i]));
  const rows = down.map((i) => texts[i]);
  return {
    rows,
    columns: across === down ? rows : across.map((i) => texts[i]),
    matrices: { with: matrix(vectors.with), without: matrix(vectors.without) },
    instruction,
  };
}

/** What the code needs beside what is typed. */
const coded = () => ({
  url: new URL(".", location.href).href.replace(/\/$/, ""),
  model: state.model,
  hasDefault: state.hasDefault,
  hasKey: keys.api.get() !== "",
  // Said only where it made a difference.
  tooLong: state.embedded?.cost.truncated || byId("too-long").value === "mean" ? byId("too-long").value : "error",
});

async function tokenize(panel) {
  running.tokens?.abort();
  const asked = typed();
  const texts = labelled(asked);
  const key = JSON.stringify([asked, keys.api.get() !== ""]);
  if (key === state.tokensOf) return;
  const now = (running.tokens = new AbortController());
  const shown = texts.slice(0, MOST_TOKENIZED);
  try {
    const found = shown.length ? await preview(shown, asked.tooLong, now.signal) : { data: [] };
    showTokens(panel, shown, found.data, found.max_input_tokens, texts.length - shown.length);
    state.tokensOf = key;
    fail("tokens", null);
  } catch (error) {
    if (now.signal.aborted) return;
    error.text = shown[error.index];
    fail("tokens", error);
  }
}

function choose(name) {
  for (const other of Object.keys(VIEWS)) {
    const isChosen = other === name;
    byId(`tab-${other}`).setAttribute("aria-selected", isChosen);
    byId(`tab-${other}`).tabIndex = isChosen ? 0 : -1;
    byId(`panel-${other}`).hidden = !isChosen;
  }
  view = name;
  history.replaceState(null, "", `${location.pathname}${location.search}${name === "similarity" ? "" : `#${name}`}`);
  if (name !== "server") stopServer();
  if (name !== "tokens") fail("tokens", null);
  show();
}

// What is said

function say(words, warning = "") {
  put(byId("status"), words, warning && [" ", el("strong", { class: "warn" }, warning)]);
}

/** Show what has failed of what was asked; with null, that it has not. */
function fail(kind, error) {
  state.failures[kind] = error;
  const words = new Set(Object.values(state.failures).filter(Boolean).map(inWords));
  byId("error").hidden = !words.size;
  put(byId("error"), [...words].map((sentence) => el("p", {}, sentence)));
  if (error === null) return;
  if (kind === "embed") say("");
  if (error instanceof Unreachable) showPhase("not reached");
  if (error.status === 401) {
    showPhase("asks for a key");
    byId("key-field").hidden = false;
    if (kind === "embed") byId("key").focus();
  }
}

/** What is wrong; which text the server means, where it names one; and what can be done. */
function inWords(error) {
  if (!(error instanceof Failure)) {
    console.error(error);
    return "The page failed on this answer. Load it again; if that does not help, it is a bug.";
  }
  const { message, text } = error;
  if (!text) return message;
  const hint = /context length/.test(message) ? " Under More you choose what is done with a text that is too long." : "";
  return `${message} That is ${text.label}, “${clip(text.text, 80)}”.${hint}`;
}

function showPhase(phase) {
  byId("phase-text").textContent = phase;
  byId("phase").dataset.phase = phase;
}

function working(is) {
  byId("embed").textContent = is ? "Stop" : "Embed";
  byId("results").setAttribute("aria-busy", is);
}

// What is done

let typing;

function changed() {
  for (const id of ["queries", "documents"]) byId(`${id}-count`).textContent = whole(lines(id).length);
  if (state.embedded && !state.isStale) {
    state.isStale = true;
    say("Changed since: press Embed for new results.");
  }
  clearTimeout(typing);
  typing = setTimeout(() => (view === "tokens" || view === "code") && show(), TYPING_MS);
}

function fillExample() {
  for (const id of ["queries", "documents"]) byId(id).value = EXAMPLE[id].join(id === "documents" ? "\n\n" : "\n");
  changed();
}

/** On a phone the results are below what is typed. */
function comeIntoView() {
  const place = byId("results");
  if (place.getBoundingClientRect().top > innerHeight / 2) place.scrollIntoView({ block: "start" });
}

function stop() {
  running.embed?.abort();
  running.embed = null;
  working(false);
  say("Stopped.");
}

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running.embed) stop();
    else run().then(comeIntoView);
  });
  for (const id of ["queries", "documents", "instruction", "document-instruction"]) byId(id).addEventListener("input", changed);
  byId("instruction").addEventListener("input", () => { byId("prompt").value = OWN; });
  byId("too-long").addEventListener("change", changed);
  byId("prompt").addEventListener("change", (event) => {
    choosePrompt(event.target.value);
    changed();
  });
  byId("example").addEventListener("click", () => {
    fillExample();
    run();
  });
  const useKey = () => {
    keys.api.set(byId("key").value);
    state.model = state.tokensOf = "";
    stopServer();
    run();
  };
  byId("use-key").addEventListener("click", useKey);
  byId("key").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.ctrlKey) return;
    event.preventDefault();
    useKey();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run();
    }
    if (event.key === "Escape" && running.embed) stop();
  });
  const names = Object.keys(VIEWS);
  names.forEach((name, i) => {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => choose(name));
    tab.addEventListener("keydown", ({ key }) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1 }[key];
      if (to === undefined) return;
      const next = names.at(to % names.length);
      byId(`tab-${next}`).focus();
      choose(next);
    });
  });
}

listen();
byId("key").value = keys.api.get();
byId("key-field").hidden = !keys.api.get();
fillExample();
choose(location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "similarity");
run();
