// Number formats, colors, smoothing. The three scripts of this folder run as one, see chart.js.
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
const FONT = "12px system-ui, sans-serif";
const GRAB = 24; // pixels; the distance within which the cursor selects a point
const charts = [];

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const shade = (name, alpha) => color(name) + Math.round(alpha * 255).toString(16).padStart(2, "0");
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};

// --- number formats --------------------------------------------------------------------------------------------

const scientific = (v) => v.toExponential(2).replace(/\.?0+e/, "e");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });

function format(v) {
  if (v === null || v === undefined) return "-";
  const size = Math.abs(v);
  if (size && (size < 1e-4 || size >= 1e6)) return scientific(v);
  return size >= 1e4 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4));
}

function ticks(u, splits, axis, space, step) {
  const decimals = (String(+step.toPrecision(3)).split(".")[1] || "").length;
  return splits.map((v) => {
    if (v === null || v === 0) return v === 0 ? "0" : v;
    if (Math.abs(v) >= 1e4) return compact.format(v);
    return step < 1e-4 ? scientific(v) : v.toFixed(decimals);
  });
}

// --- smoothing -------------------------------------------------------------------------------------------------

// An exponential moving average with a weight per step and bias correction; values that are several steps apart decay by as
// many steps. undefined means no value at this x, null a gap.
function smoothed(x, y, weight) {
  let sum = 0;
  let norm = 0;
  let last = null;
  return y.map((value, i) => {
    if (value === null || value === undefined) return value;
    const keep = weight ** (last === null ? 1 : Math.max(0, x[i] - last));
    last = x[i];
    sum = keep * sum + (1 - keep) * value;
    norm = keep * norm + (1 - keep);
    return norm ? sum / norm : value;
  });
}

// In downsampled curves, the mean of a stretch is stored at its last point only.
const basis = (s) => (s.mean ? s.mean.map((m, i) => (m === null && s.y[i] !== null ? undefined : m)) : s.y);
