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
function snippet(chosen, request) {
  const side = (one, all, texts, instruction) => ({
    one,
    all,
    texts: texts.slice(0, MOST),
    // Where the server has an instruction for those who name none, none has to be named.
    fields: { ...(instruction || request.hasDefault ? { instruction } : {}), ...lengthFields(request.tooLong) },
  });
  const sides = [
    side("query", "queries", request.queries, request.instruction),
    side("document", "documents", request.documents, request.documentInstruction),
  ].filter(({ texts }) => texts.length);
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
    + sides.map(({ one, all, texts, fields }) => `\n${assigned(all, texts)}`
      + `answer = client.embeddings.create(${args(`model=${python(model)}`, `input=${all}`, extra(fields, (dict) => `extra_body=${dict}`))})\n`
      + `${one}_vectors = [item.embedding for item in answer.data]\n`).join("");
}

function langchain({ url, model, hasKey }, sides) {
  return imports(hasKey, "from langchain_openai import OpenAIEmbeddings")
    + `server = dict(base_url=${python(`${url}/v1`)}, api_key=${keyOf(hasKey)}, model=${python(model)}, check_embedding_ctx_length=False)\n`
    + sides.map((side) => embedder(side, "OpenAIEmbeddings", "model_kwargs", "embed_query", "embed_documents")).join("");
}

function llamaindex({ url, model, hasKey }, sides) {
  return imports(hasKey, "from llama_index.embeddings.openai_like import OpenAILikeEmbedding")
    + `server = dict(api_base=${python(`${url}/v1`)}, api_key=${keyOf(hasKey)}, model_name=${python(model)})\n`
    + sides.map((side) => embedder(side, "OpenAILikeEmbedding", "additional_kwargs", "get_query_embedding", "get_text_embedding_batch")).join("");
}

/** A side of the request by a library that has one object for each instruction. */
const embedder = ({ one, all, texts, fields }, name, option, ofQuery, ofDocuments) => `\n${assigned(all, texts)}`
  + `for_${all} = ${name}(${args("**server", extra(fields, (dict) => `${option}={"extra_body": ${dict}}`))})\n`
  + (one === "query"
    ? `query_vectors = [for_queries.${ofQuery}(query) for query in queries]\n`
    : `document_vectors = for_documents.${ofDocuments}(documents)\n`);

const imports = (hasKey, line) => `${hasKey ? "import os\n\n" : ""}${line}\n\n`;

const keyOf = (hasKey) => (hasKey ? `os.environ["${KEY}"]` : '"none"');

const assigned = (name, texts) => `${name} = [\n${texts.map((text) => `    ${python(text)},\n`).join("")}]\n`;

/** An argument that holds a request's fields as a dict, where there are any. */
const extra = (fields, argument) => {
  const items = Object.entries(fields).map(([field, value]) => `"${field}": ${python(value)}`);
  return items.length > 0 && argument(`{${items.join(", ")}}`);
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
