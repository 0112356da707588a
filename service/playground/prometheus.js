/** Prometheus' text format, and what two scrapes of it say of the time between. Knows nothing of the page. */

/** Every series of a page: [{name, labels, value}]. */
export function parse(page) {
  const found = [];
  for (const line of page.split("\n")) {
    const parts = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (parts) found.push({ name: parts[1], labels: labelsOf(parts[2] ?? ""), value: number(parts[3]) });
  }
  return found;
}

/** The sum of the series of a name whose labels count. */
export const sum = (series, name, counts = () => true) =>
  series.filter((one) => one.name === name && counts(one.labels)).reduce((total, { value }) => total + value, 0);

/** The quantile of a histogram, in what it measures; NaN if it is empty. By linear steps within a bucket. */
export function quantile(share, now, before, name, counts = () => true) {
  const totals = new Map();
  for (const [series, sign] of [[now, 1], [before, -1]]) {
    for (const one of series) {
      if (one.name !== `${name}_bucket` || !counts(one.labels)) continue;
      const bound = number(one.labels.le);
      totals.set(bound, (totals.get(bound) ?? 0) + sign * one.value);
    }
  }
  const bounds = [...totals.keys()].sort((a, b) => a - b);
  const wanted = share * (totals.get(Infinity) ?? 0);
  if (!wanted) return NaN;
  let lower = 0, under = 0;
  for (const bound of bounds) {
    const upTo = totals.get(bound);
    if (upTo >= wanted) return bound === Infinity ? lower : lower + (bound - lower) * ((wanted - under) / (upTo - under));
    [lower, under] = [bound, upTo];
  }
  return lower;
}

const number = (word) => (word === "+Inf" ? Infinity : Number(word));

function labelsOf(inside) {
  const labels = {};
  for (const [, name, value] of inside.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
    labels[name] = value.replace(/\\(.)/g, (_, escaped) => (escaped === "n" ? "\n" : escaped));
  }
  return labels;
}
