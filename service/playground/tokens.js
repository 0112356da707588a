/** How each text is read, token by token: what the template, the instruction and the text are, what is pooled or cut. */

import { count, el, nothing, put, whole } from "./dom.js";

// Of a run of tokens, so many are drawn at first: its beginning, and its end where it meets the next.
const AT_FIRST = 90;
const AT_THE_END = 12;

let withIds = false;

/** Show texts {label} and their rows of tokens, as `/v1/prompts/preview` gives them; `left` texts are not shown. */
export function showTokens(panel, texts, rows, limit, left) {
  if (!rows.length) {
    put(panel, nothing("Type a query or a document to see its tokens."));
    return;
  }
  const list = el("div", { class: "token-rows" }, rows.map((row, i) => article(texts[i], row, limit)));
  list.classList.toggle("ids", withIds);
  const ids = el("label", { class: "check" }, el("input", { type: "checkbox", checked: withIds, onchange: (event) => {
    withIds = event.target.checked;
    list.classList.toggle("ids", withIds);
  } }), "Token ids");
  put(panel,
    el("div", { class: "bar" }, el("h2", {}, "Tokens"), ids),
    legend(),
    list,
    left > 0 && el("p", { class: "note" }, `${count(left, "more text")} not shown here.`),
  );
}

function legend() {
  const entries = [["text pooled", "text, pooled"], ["instruction", "instruction, not pooled"], ["template", "template or special"], ["cut", "cut, not read"]];
  return el("p", { class: "legend note" }, entries.map(([classes, words]) =>
    el("span", { class: "key-of" }, el("span", { class: `token ${classes}`, "aria-hidden": "true" }, "abc"), words)));
}

function article({ label }, row, limit) {
  const tally = [`${count(row.token_count, "token")}`, `${whole(row.pooled_count)} pooled`];
  const more = [];
  if (row.cut_count) more.push(el("strong", { class: "warn" }, `${whole(row.cut_count)} cut`));
  if (row.over_limit) more.push(el("strong", { class: "warn" }, `${whole(row.over_limit)} more than the ${whole(limit)} that are read`));
  return el("article", { class: "token-row" },
    el("h3", {}, el("span", { class: "label" }, label), el("span", { class: "note" }, tally.join(" · "), more.map((one) => [" · ", one]))),
    el("p", { class: "tokens" }, runs(row.tokens).map(run)));
}

/** Neighbours that are alike, together. */
function runs(tokens) {
  const found = [];
  for (const token of tokens) {
    const kind = `${token.part} ${token.pooled} ${token.cut}`;
    if (found.at(-1)?.kind === kind) found.at(-1).tokens.push(token);
    else found.push({ kind, tokens: [token] });
  }
  return found;
}

function run({ tokens }) {
  const { part, pooled, cut } = tokens[0];
  const said = cut ? "cut, not read" : `${part}, ${pooled ? "pooled" : "not pooled"}`;
  const drawn = el("span", { class: "run" }, el("span", { class: "unseen" }, ` ${said}: `));
  const folded = tokens.slice(AT_FIRST, -AT_THE_END);
  if (folded.length <= AT_THE_END) {
    drawn.append(...tokens.map(chip));
    return drawn;
  }
  const unfold = () => button.replaceWith(...folded.map(chip));
  const button = el("button", { type: "button", class: "plain fold", onclick: unfold }, `… ${whole(folded.length)} more …`);
  drawn.append(...tokens.slice(0, AT_FIRST).map(chip), button, ...tokens.slice(-AT_THE_END).map(chip));
  return drawn;
}

function chip({ id, token, text, part, pooled, cut }) {
  const classes = ["token", cut ? "cut" : part, pooled && "pooled"].filter(Boolean).join(" ");
  // A byte of a character, and a mark such as <bos>, have no text of their own.
  const words = text === "" || text.includes("\ufffd") ? token : text;
  return el("span", { class: classes, title: `${token}  id ${id}` }, visible(words), el("small", {}, id));
}

const visible = (words) => words.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "\u00b7");
