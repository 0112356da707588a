/** The cosine matrix as a heat map, and the ranking of documents for each query: with the instruction and without. */

import { choices, clip, count, decimal, el, nothing, put, signed } from "./dom.js";
import { ranking } from "./math.js";

// A larger matrix is not read: the rankings have all of it.
const MOST_ROWS = 60;
const MOST_COLUMNS = 40;
const SHADES = 10;
const RANKED_AT_FIRST = 5;

const VIEWS = { with: "With instruction", without: "Without", change: "Change" };

let view = "with";

/**
 * Show a result in a panel: {rows, columns} of {label, text}, `matrices` {with, without} of cosines, and whether there
 * was an `instruction`, without which both are the same.
 */
export function showSimilarity(panel, result) {
  if (!result) {
    put(panel, nothing("Type a query and some documents, then press Embed."));
    return;
  }
  const draw = (chosen) => {
    view = chosen;
    put(body, parts(result, result.instruction ? view : "with"));
  };
  const body = el("div");
  const bar = result.instruction
    ? choices("Which cosines", "view", VIEWS, view, draw)
    : el("p", { class: "note" }, "There is no instruction, so nothing changes without it.");
  put(panel, el("div", { class: "bar" }, el("h2", {}, "Cosines"), bar), body);
  draw(view);
}

function parts(result, shown) {
  const { rows, columns, matrices } = result;
  const values = shown === "change"
    ? matrices.with.map((row, i) => row.map((value, j) => value - matrices.without[i][j]))
    : matrices[shown];
  const ranked = columns === rows ? [] : rows.map((row, i) => rankingOf(row, i, result, shown));
  const about = shown === "without" ? "compared with the instruction’s" : "compared with no instruction";
  return [
    heatMap(rows, columns, values, shown === "change"),
    ranked.length > 0 && el("div", { class: "bar ranked" }, el("h2", {}, "Rankings"), result.instruction && el("p", { class: "note" }, `Places and cosines, ${about}`)),
    ranked,
  ];
}

function heatMap(rows, columns, values, isChange) {
  const own = (i, j) => rows === columns && i === j;
  const size = isChange ? Math.abs : Number;
  const sizes = values.flatMap((row, i) => row.filter((_, j) => !own(i, j))).map((value) => size(value));
  const low = isChange ? 0 : Math.min(...sizes), high = Math.max(...sizes);
  const shade = (value) => `heat-${Math.round((high > low ? (size(value) - low) / (high - low) : 0) * SHADES)}`;
  const words = isChange ? signed : decimal;
  const cell = (value, i, j) => el("td", { class: own(i, j) ? "self" : shade(value) }, el("data", { value }, words(value)));
  const table = el("table", { class: "matrix" },
    el("caption", { class: "unseen" }, isChange ? "How much the instruction changes each cosine" : "Cosine of each row and each column"),
    el("thead", {}, el("tr", {}, el("td", {}),
      columns.slice(0, MOST_COLUMNS).map((text) => el("th", { scope: "col" }, heading(text))))),
    el("tbody", {}, rows.slice(0, MOST_ROWS).map((text, i) => el("tr", {}, el("th", { scope: "row" }, heading(text)),
      values[i].slice(0, MOST_COLUMNS).map((value, j) => cell(value, i, j))))));
  const isCut = rows.length > MOST_ROWS || columns.length > MOST_COLUMNS;
  const shown = `${Math.min(rows.length, MOST_ROWS)} × ${Math.min(columns.length, MOST_COLUMNS)}`;
  return [
    el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": "Cosine matrix" }, table),
    legend(isChange, low, high, words),
    isCut && el("p", { class: "note" }, `The first ${shown} of ${rows.length} × ${columns.length} cosines are shown.`),
  ];
}

const heading = ({ label, text }) => [el("span", { class: "label" }, label), el("span", { class: "words" }, clip(text, 160))];

function legend(isChange, low, high, words) {
  const ends = isChange ? ["0", `±${decimal(high)}`] : [words(low), words(high)];
  return el("p", { class: "legend note" }, isChange ? "Shaded by how far the instruction moves it" : "Shaded from the least to the most similar",
    el("span", { class: "scale" }, el("span", {}, ends[0]),
      el("span", { class: "ramp", "aria-hidden": "true" },
        Array.from({ length: SHADES + 1 }, (_, i) => el("i", { class: `heat-${i}` }))),
      el("span", {}, ends[1])));
}

function rankingOf(query, i, { columns, matrices, instruction }, shown) {
  const [own, other] = shown === "without" ? ["without", "with"] : ["with", "without"];
  const values = matrices[own][i], others = matrices[other][i];
  const places = new Map(ranking(others).map((j, place) => [j, place + 1]));
  const entry = (j, place) => el("li", {},
    el("span", { class: "place" }, place + 1),
    el("span", { class: "cosine" }, el("data", { value: values[j] }, decimal(values[j])), bar(values[j])),
    el("span", { class: "label" }, columns[j].label),
    el("span", { class: "words" }, clip(columns[j].text, 300)),
    instruction && change(place + 1, places.get(j), values[j] - others[j], other));
  const order = ranking(values).map(entry);
  const list = el("ol", {}, order.slice(0, RANKED_AT_FIRST));
  const rest = order.slice(RANKED_AT_FIRST);
  const more = rest.length > 0 && el("button", { type: "button", class: "plain", onclick: (event) => {
    list.append(...rest);
    rest[0].tabIndex = -1;
    rest[0].focus();
    event.target.remove();
  } }, `Show ${rest.length} more`);
  return el("section", { class: "ranking" },
    el("h3", {}, el("span", { class: "label" }, query.label), ` ${clip(query.text, 200)}`),
    el("p", { class: "unseen" }, `${count(columns.length, "document")}, the most similar first`), list, more);
}

function change(place, otherPlace, difference, other) {
  const moved = otherPlace - place;
  const arrow = moved ? `${moved > 0 ? "▲" : "▼"} ${otherPlace} → ${place}` : "same place";
  const said = moved ? `place ${place}, ${other} the instruction ${otherPlace}` : "the same place";
  return el("span", { class: moved ? "change moved" : "change" },
    el("span", { "aria-hidden": "true" }, `${arrow} · ${signed(difference)}`),
    el("span", { class: "unseen" }, `${said}; cosine ${signed(difference)} from ${other} the instruction`));
}

/** A bar as long as a cosine of 0 to 1. */
function bar(cosine) {
  const meter = el("i", { class: "bar-mark", "aria-hidden": "true" });
  meter.style.setProperty("--share", Math.min(Math.max(cosine, 0), 1).toFixed(3));
  return meter;
}
