/** The texts as points: near where their vectors are alike, as far as two dimensions can show it. */

import { clip, el, nothing, put, svg } from "./dom.js";
import { principal } from "./math.js";

const WIDE = { width: 720, height: 440 }, NARROW = { width: 340, height: 340 };
const EDGE = 34;
const MOST_LABELS = 40;
const REACH = 24; // from where the pointer finds a text

/** Draw texts {label, text, kind: "query" | "document"} by their vectors. */
export function showMap(panel, texts, vectors) {
  if (texts.length < 2) {
    put(panel, nothing("A map needs two texts at least: type some, then press Embed."));
    return;
  }
  const { points, shares } = principal(vectors);
  const size = matchMedia("(max-width: 860px)").matches ? NARROW : WIDE;
  const place = fit(points, size);
  const tip = el("div", { class: "tip", hidden: true, role: "tooltip" });
  const places = points.map(place);
  const marks = texts.map((text, i) => mark(text, places[i], texts.length <= MOST_LABELS));
  const [x, y] = place([0, 0]);
  const drawing = svg("svg", { viewBox: `0 0 ${size.width} ${size.height}`, class: "map", role: "group", "aria-label": `Map of ${texts.length} texts. Arrow keys go from one to the next.` },
    svg("path", { class: "axes", d: `M0 ${y}H${size.width}M${x} 0V${size.height}` }), marks);
  const frame = el("div", { class: "map-frame" }, drawing, tip);
  marks[0].setAttribute("tabindex", "0");

  const hide = () => {
    tip.hidden = true;
    drawing.querySelector(".near")?.classList.remove("near");
  };
  const show = (i) => {
    hide();
    marks[i].classList.add("near");
    put(tip, el("span", { class: "label" }, texts[i].label), ` ${clip(texts[i].text, 240)}`);
    tip.hidden = false;
    const of = frame.getBoundingClientRect(), at = marks[i].firstChild.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(at.x + at.width / 2 - of.x - own.width / 2, 4), of.width - own.width - 4);
    const above = at.y - of.y - own.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : at.y - of.y + at.height + 8}px`;
  };
  const go = (from, to) => {
    marks[from].setAttribute("tabindex", "-1");
    marks[to].setAttribute("tabindex", "0");
    marks[to].focus();
  };
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  marks.forEach((element, i) => {
    element.addEventListener("focus", () => show(i));
    element.addEventListener("blur", hide);
    element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hide();
      const to = { Home: 0, End: texts.length - 1 }[event.key] ?? (event.key in steps ? i + steps[event.key] : null);
      if (to === null) return;
      event.preventDefault();
      if (to in marks) go(i, to);
    });
  });

  const look = (event) => {
    const box = drawing.getBoundingClientRect(), scale = size.width / box.width;
    const i = nearest(places, (event.clientX - box.x) * scale, (event.clientY - box.y) * scale);
    if (i === null) hide();
    else show(i);
  };
  drawing.addEventListener("pointermove", look);
  drawing.addEventListener("pointerdown", look);
  drawing.addEventListener("pointerleave", hide);

  const percent = (share) => `${Math.round(share * 100)} %`;
  put(panel,
    el("div", { class: "bar" }, el("h2", {}, "Map"), el("p", { class: "legend note" },
      el("span", { class: "key-of" }, sample("query"), "query"), el("span", { class: "key-of" }, sample("document"), "document"))),
    frame,
    el("p", { class: "note" }, `The first two principal components: ${percent(shares[0])} and ${percent(shares[1])} of how the vectors differ. `,
      "Point at a text to read it, or press Tab and the arrow keys."),
  );
}

/** From points to places in the drawing, as large as they fit; a length is as long across as it is down. */
function fit(points, { width, height }) {
  const [across, down] = [0, 1].map((axis) => {
    const values = points.map((point) => point[axis]);
    return { low: Math.min(...values), high: Math.max(...values) };
  });
  const scale = Math.min((width - 2 * EDGE) / (across.high - across.low || 1), (height - 2 * EDGE) / (down.high - down.low || 1));
  return ([x, y]) => [
    width / 2 + (x - (across.low + across.high) / 2) * scale,
    height / 2 - (y - (down.low + down.high) / 2) * scale,
  ].map((value) => value.toFixed(1));
}

/** The place nearest to a point, if it is near. */
function nearest(places, x, y) {
  const distances = places.map(([ownX, ownY]) => Math.hypot(ownX - x, ownY - y));
  const least = Math.min(...distances);
  return least <= REACH ? distances.indexOf(least) : null;
}

function mark({ label, text, kind }, [x, y], labelled) {
  const name = kind === "query" ? "Query" : "Document";
  return svg("g", { class: `mark ${kind}`, transform: `translate(${x} ${y})`, role: "img", tabindex: "-1", "aria-label": `${name} ${label.slice(1)}: ${clip(text, 240)}` },
    svg("circle", { class: "reach", r: 12 }), shape(kind),
    labelled && svg("text", { x: 9, y: 4 }, label));
}

const shape = (kind) => (kind === "query"
  ? svg("rect", { class: "point", x: -5, y: -5, width: 10, height: 10, transform: "rotate(45)" })
  : svg("circle", { class: "point", r: 5 }));

const sample = (kind) => svg("svg", { viewBox: "-9 -9 18 18", width: 14, height: 14, "aria-hidden": "true" }, svg("g", { class: `mark ${kind}` }, shape(kind)));
