/** Numbers: cosines, rankings, and the two directions in which vectors differ most. Knows nothing of the page. */

/** The cosine of two vectors, of whatever length they are. */
function cosine(a, b) {
  const squares = dot(a, a) * dot(b, b);
  return squares ? dot(a, b) / Math.sqrt(squares) : 0;
}

/** The cosine of each row and each column. */
export const cosines = (rows, columns) => rows.map((row) => columns.map((column) => cosine(row, column)));

/** The places of the values, the largest value's first; equals keep their order. */
export const ranking = (values) => [...values.keys()].sort((a, b) => values[b] - values[a]);

/**
 * Principal components of (n, width) vectors: points (n, 2), and the share of the variance along either axis.
 *
 * By subspace iteration on the n × n matrix of products, as there are fewer texts than dimensions. An axis points to
 * where its farthest point is, so that equal vectors always give an equal picture.
 */
export function principal(vectors) {
  const n = vectors.length, width = n ? vectors[0].length : 0;
  const mean = new Float64Array(width);
  for (const vector of vectors) for (let i = 0; i < width; i++) mean[i] += vector[i] / n;
  const centred = vectors.map((vector) => Float64Array.from(vector, (value, i) => value - mean[i]));
  const products = centred.map(() => new Float64Array(n));
  let variance = 0;
  for (let i = 0; i < n; i++) {
    for (let j = i; j < n; j++) products[i][j] = products[j][i] = dot(centred[i], centred[j]);
    variance += products[i][i];
  }
  const axes = [0, 1].map((k) => Float64Array.from({ length: n }, (_, i) => Math.cos((i + 1) * (k + 1) * 1.7)));
  const sizes = [0, 0];
  for (let round = 0; round < 500; round++) {
    let moved = 0;
    axes.forEach((axis, k) => {
      const next = Float64Array.from(products, (row) => dot(row, axis));
      if (k) {
        const along = dot(next, axes[0]);
        for (let i = 0; i < n; i++) next[i] -= along * axes[0][i];
      }
      const size = Math.sqrt(dot(next, next));
      moved = Math.max(moved, Math.abs(size - sizes[k]));
      sizes[k] = size;
      for (let i = 0; i < n; i++) axis[i] = size > 1e-12 * variance ? next[i] / size : 0;
    });
    if (moved <= 1e-12 * variance) break;
  }
  const signs = axes.map((axis) => Math.sign(axis.reduce((far, value) => (Math.abs(value) > Math.abs(far) ? value : far), 0)));
  const points = vectors.map((_, i) => axes.map((axis, k) => signs[k] * axis[i] * Math.sqrt(sizes[k])));
  return { points, shares: sizes.map((size) => (variance ? size / variance : 0)) };
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}
