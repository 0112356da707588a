/** The request as code to copy. Its texts and instructions are those on the page; a key never is. */

import { choices, el, nothing, put } from "./dom.js";
import { lengthFields } from "./api.js";

// So many texts of each kind: what is shown is to be read.
const MOST = 8;

const LANGUAGES = { curl: "curl", openai: "openai for Python", langchain: "LangChain", llamaindex: "LlamaIndex" };
const KEY = "LLM2VEC_KEY";

let language = "curl";

/** Show a request {url, model, queries, documents, instruction, documentInstruction, tooLong, isDefault, hasKey}. */
export function showCode(panel, request) {
  if (!request.queries.length && !request.documents.length) {
    put(panel, nothing("Type a query or a document to see the request for it."));
    return;
  }
  const code = el("code");
  const draw = (chosen) => {
    language = chosen;
    code.textContent = snippet(language, request);
  };
  const said = el("span", { class: "note", role: "status" });
  const copy = el("button", { type: "button", onclick: async () => { said.textContent = (await copied(code)) ? "Copied" : "Selected: press Ctrl+C"; } }, "Copy");
  const left = Math.max(request.queries.length - MOST, 0) + Math.max(request.documents.length - MOST, 0);
  put(panel,
    el("div", { class: "bar" }, el("h2", {}, "Code"), choices("Client", "language", LANGUAGES, language, draw), el("span", { class: "row" }, said, copy)),
    el("pre", { tabindex: 0, role: "region", "aria-label": "Code" }, code),
    left > 0 && el("p", { class: "note" }, `${left} of the texts are left out.`),
    request.hasKey && el("p", { class: "note" }, `The key is read from the variable ${KEY}.`),
  );
  draw(language);
}

/** The code in one of the languages. */
export function snippet(chosen, request) {
  const sides = [
    ["query", request.queries, request.instruction],
    ["document", request.documents, request.documentInstruction],
  ].filter(([, texts]) => texts.length).map(([side, texts, instruction]) => ({
    side,
    texts: texts.slice(0, MOST),
    // Where the server has an instruction for those who name none, none has to be named.
    fields: { ...(instruction || request.hasDefault ? { instruction } : {}), ...lengthFields(request.tooLong) },
  }));
  return { curl, openai, langchain, llamaindex }[chosen](request, sides);
}

function curl({ url, model, hasKey }, sides) {
  const key = hasKey ? `  -H "authorization: Bearer $${KEY}" \\\n` : "";
  return sides.map(({ texts, fields }) =>
    `curl -s ${url}/v1/embeddings -H 'content-type: application/json' \\\n${key}`
    + `  -d ${quoted(JSON.stringify({ model, input: texts, ...fields }, null, 2))}\n`).join("\n");
}

function openai({ url, model, hasKey }, sides) {
  return imports(hasKey, "from openai import OpenAI")
    + `client = OpenAI(base_url=${python(`${url}/v1`)}, api_key=${keyOf(hasKey)})\n`
    + sides.map(({ side, texts, fields }) => `\n${assigned(side, texts)}`
      + `answer = client.embeddings.create(${args(`model=${python(model)}`, `input=${plural(side)}`, extra("extra_body", fields))})\n`
      + `${side}_vectors = [item.embedding for item in answer.data]\n`).join("");
}

function langchain({ url, model, hasKey }, sides) {
  return imports(hasKey, "from langchain_openai import OpenAIEmbeddings")
    + `server = dict(base_url=${python(`${url}/v1`)}, api_key=${keyOf(hasKey)}, model=${python(model)}, check_embedding_ctx_length=False)\n`
    + sides.map(({ side, texts, fields }) => `\n${assigned(side, texts)}`
      + `for_${plural(side)} = OpenAIEmbeddings(${args("**server", nested("model_kwargs", fields))})\n`
      + (side === "query"
        ? `query_vectors = [for_queries.embed_query(query) for query in queries]\n`
        : `document_vectors = for_documents.embed_documents(documents)\n`)).join("");
}

function llamaindex({ url, model, hasKey }, sides) {
  return imports(hasKey, "from llama_index.embeddings.openai_like import OpenAILikeEmbedding")
    + `server = dict(api_base=${python(`${url}/v1`)}, api_key=${keyOf(hasKey)}, model_name=${python(model)})\n`
    + sides.map(({ side, texts, fields }) => `\n${assigned(side, texts)}`
      + `for_${plural(side)} = OpenAILikeEmbedding(${args("**server", nested("additional_kwargs", fields))})\n`
      + (side === "query"
        ? `query_vectors = [for_queries.get_query_embedding(query) for query in queries]\n`
        : `document_vectors = for_documents.get_text_embedding_batch(documents)\n`)).join("");
}

const plural = (side) => ({ query: "queries", document: "documents" })[side];

const imports = (hasKey, line) => `${hasKey ? "import os\n\n" : ""}${line}\n\n`;

const keyOf = (hasKey) => (hasKey ? `os.environ["${KEY}"]` : '"none"');

const assigned = (side, texts) => `${plural(side)} = [\n${texts.map((text) => `    ${python(text)},\n`).join("")}]\n`;

const extra = (name, fields) => Object.keys(fields).length > 0 && `${name}={${Object.entries(fields).map(([field, value]) => `"${field}": ${python(value)}`).join(", ")}}`;

const nested = (name, fields) => {
  const inner = extra("extra_body", fields);
  return inner && `${name}={"extra_body": ${inner.slice("extra_body=".length)}}`;
};

const args = (...parts) => parts.filter(Boolean).join(", ");

/** A string of JSON is one of Python, too. */
const python = (text) => JSON.stringify(text);

/** One word of a POSIX shell. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Whether the code is in the clipboard; where a page may not write there, it is selected instead. */
async function copied(code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(code);
    return false;
  }
}
