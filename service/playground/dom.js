/** Elements made in code. Whatever comes from a person or the server becomes text, never markup. */

const SVG = "http://www.w3.org/2000/svg";

/** An element. Attributes named on… are listeners; false and null leave one out; children are nodes or text. */
export const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);

/** As `el`, for drawings. */
export const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

export const byId = (id) => document.getElementById(id);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (isLeftOut(value)) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...there(children));
  return element;
}

/** Put these in the place of what an element holds. */
export const put = (element, ...children) => element.replaceChildren(...there(children));

const there = (children) => children.flat(Infinity).filter((child) => !isLeftOut(child));

/** Whether a condition that fails stands in an attribute's or a child's place. */
const isLeftOut = (value) => value === false || value === null || value === undefined;

/** A few choices of which one holds: radio buttons that look like one bar. */
export function choices(legend, name, options, chosen, onchange) {
  return el("fieldset", { class: "choices" }, el("legend", { class: "unseen" }, legend),
    Object.entries(options).map(([value, label]) => el("label", {},
      el("input", { type: "radio", name, value, checked: value === chosen, onchange: () => onchange(value) }),
      el("span", {}, label))));
}

/** A panel's words where it has nothing else to show. */
export const nothing = (words) => el("p", { class: "empty" }, words);

/** A number of things in words: `3 texts`, `1 text`. */
export const count = (number, thing) => `${whole(number)} ${thing}${number === 1 ? "" : "s"}`;

export const whole = (number) => Math.round(number).toLocaleString("en-US");

/** A number to three digits, by a minus that is as wide as a plus. */
export const decimal = (number) => (number < 0 ? "−" : "") + Math.abs(number).toFixed(3);

/** As `decimal`, with a plus where there is no minus. */
export const signed = (number) => (number < 0 ? "" : "+") + decimal(number);

export const clip = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
