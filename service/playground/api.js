/** What the page asks of its server, and every failure as a sentence. Knows no element of the page. */

/** A failure in words for the reader. `status` is the answer's, if it came to one; `index` the item's that is to blame. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
    this.index = Number(/index (\d+)/.exec(message)?.[1] ?? NaN);
  }
}

/** Where there was no answer at all. */
export class Unreachable extends Failure {}

// Texts of a request, and their characters: few enough that progress shows and no limit on a request is met.
const AT_ONCE = 64;
const CHARACTERS_AT_ONCE = 200_000;

/** A key that lives as long as the tab: in its storage, or in memory where the browser allows no storage. */
function keyOfTab(name) {
  let key = "";
  try {
    key = sessionStorage.getItem(name) ?? "";
  } catch { /* no storage here */ }
  const get = () => key;
  const set = (typed) => {
    key = typed.trim();
    try {
      sessionStorage.setItem(name, key);
    } catch { /* in memory, then */ }
  };
  return { get, set };
}

export const keys = { api: keyOfTab("llm2vec-api-key"), metrics: keyOfTab("llm2vec-metrics-key") };

/** The document at a path; with a body, the answer to it. */
export const ask = async (path, options) => (await send(path, options)).json();

/** The Prometheus metrics, as text. */
export const metricsPage = async (signal) => (await send("metrics", { signal, key: keys.metrics })).text();

/** Whether the server takes requests, in words: `ready`, or what it does instead. */
export async function readiness(signal) {
  try {
    await send("readyz", { signal });
    return "ready";
  } catch (failure) {
    if (failure.status !== 503) throw failure;
    return /loading/.test(failure.message) ? "loading" : failure.message;
  }
}

/**
 * The vectors of items {text, instruction}, in order, and what they cost: {vectors, tokens, truncated, times}, with
 * times in milliseconds. `tooLong` is end, start, mean or error; `onProgress` is told how many items are done.
 */
export async function embed(items, tooLong, { signal, onProgress, most }) {
  const found = { vectors: [], tokens: 0, truncated: 0, times: { total: 0, inference: 0 } };
  for (const [start, end] of batches(items, Math.min(most, AT_ONCE))) {
    const body = { ...bodyOf(items.slice(start, end), tooLong), encoding_format: "base64" };
    const answer = await send("v1/embeddings", { body, signal }).catch((failure) => {
      failure.index += start;
      throw failure;
    });
    const { data, usage } = await answer.json();
    for (const { index, embedding } of data) found.vectors[start + index] = floats(embedding);
    found.tokens += usage.prompt_tokens;
    found.truncated += usage.truncated_inputs;
    for (const name of Object.keys(found.times)) found.times[name] += Number(answer.headers.get(`x-${name}-time`));
    onProgress(end);
  }
  return found;
}

/** The tokens of items {text, instruction}. */
export const preview = (items, tooLong, signal) =>
  ask("v1/prompts/preview", { body: bodyOf(items, tooLong), signal });

const bodyOf = (items, tooLong) => ({
  input: items.map(({ text, instruction }) => ({ text, instruction })),
  ...lengthFields(tooLong),
});

/** The fields of a request that say what is done with a text that is too long. */
export const lengthFields = (tooLong) =>
  ({ end: { truncate: "END" }, start: { truncate: "START" }, mean: { overflow: "mean" } })[tooLong] ?? {};

function* batches(items, most) {
  let start = 0, characters = 0;
  for (let i = 0; i < items.length; i++) {
    characters += items[i].text.length;
    if (i > start && (i - start >= most || characters > CHARACTERS_AT_ONCE)) {
      yield [start, i];
      start = i;
      characters = items[i].text.length;
    }
  }
  if (items.length > start) yield [start, items.length];
}

async function send(path, { body, signal, key = keys.api } = {}) {
  const headers = body ? { "content-type": "application/json" } : {};
  if (key.get()) {
    if (!/^[\x21-\x7e]+$/.test(key.get())) throw new Failure("That is no API key: keys are of letters, digits and signs.", 401);
    headers.authorization = `Bearer ${key.get()}`;
  }
  let answer;
  try {
    const init = { headers, signal, credentials: "omit", cache: "no-store", redirect: "error" };
    answer = await fetch(path, body ? { ...init, method: "POST", body: JSON.stringify(body) } : init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("The server can’t be reached. Is it still running?");
  }
  if (!answer.ok) throw await inWords(answer, key);
  return answer;
}

async function inWords(answer, key) {
  const said = await answer.json().then((body) => body.error?.message ?? body.error ?? "", () => "");
  const words = {
    401: key.get() ? "The API key is not valid." : "This server asks for an API key.",
    429: `The server is busy: too much waits in its queue. Try again in ${answer.headers.get("retry-after") ?? 1} s.`,
  }[answer.status];
  return new Failure(words ?? sentence(said || `The server answered ${answer.status}`), answer.status);
}

const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}${/[.!?)]$/.test(words) ? "" : "."}`;

function floats(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}
