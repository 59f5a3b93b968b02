// What the book's widgets share: reading bytes, activation functions, making parts of a page,
// controls tied to a trait, axes.
//
// `khnb.widgets.base.module` puts this text before that of each widget, so that every widget is one plain ES module that
// asks for no other file. Parts are built with `make` and `svg`, colours are the eight of Okabe and Ito.

export const COLOURS = { blue: "#0072b2", vermilion: "#d55e00", green: "#009e73", orange: "#e69f00", sky: "#56b4e9", purple: "#cc79a7", yellow: "#f0e442", grey: "#7a7a7a" };

/** Bytes out of whatever a host hands over: DataView, ArrayBuffer or typed array. */
export function toBytes(value) {
  if (value instanceof ArrayBuffer) return new Uint8Array(value);
  return new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
}

/** Little-endian float16 numbers, by hand: not every browser knows Float16Array. */
export function decodeHalf(bytes, offset, count, scale = 1) {
  const out = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    const low = bytes[offset + 2 * i], high = bytes[offset + 2 * i + 1];
    const exponent = (high >> 2) & 31, mantissa = ((high & 3) << 8) | low;
    let value;
    if (exponent === 0) value = mantissa * 2 ** -24;
    else if (exponent === 31) value = mantissa ? NaN : Infinity;
    else value = (1 + mantissa / 1024) * 2 ** (exponent - 15);
    out[i] = (high & 128 ? -value : value) / scale;
  }
  return out;
}

/** A generator of numbers in [0, 1) from a whole number (mulberry32): the same seed, the same page. */
export function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

// --------------------------------------------------------------------------------------------- activation functions

/** The error function by its series of positive terms, which is exact to rounding on the whole range. */
export function erf(x) {
  const a = Math.abs(x);
  if (!(a < 6)) return Number.isNaN(a) ? NaN : Math.sign(x);
  let term = a, sum = a;
  for (let i = 1; term > 1e-17 * sum; i++) {
    term *= (2 * a * a) / (2 * i + 1);
    sum += term;
  }
  return Math.sign(x) * Math.min(1, (2 / Math.sqrt(Math.PI)) * Math.exp(-a * a) * sum);
}

const PRELU_SLOPE = 0.25;
const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const normal = (x) => 0.5 * (1 + erf(x / Math.SQRT2));

/** The functions of `khnb.models.ACTIVATIONS`, each as [value, derivative with respect to x, given x and the value]. */
export const ACTIVATIONS = {
  sigmoid: [sigmoid, (x, y) => y * (1 - y)],
  tanh: [Math.tanh, (x, y) => 1 - y * y],
  relu: [(x) => (x > 0 ? x : 0), (x) => (x > 0 ? 1 : 0)],
  prelu: [(x) => (x > 0 ? x : PRELU_SLOPE * x), (x) => (x > 0 ? 1 : PRELU_SLOPE)],
  elu: [(x) => (x > 0 ? x : Math.expm1(x)), (x, y) => (x > 0 ? 1 : y + 1)],
  gelu: [(x) => x * normal(x), (x, y) => (x === 0 ? 0.5 : y / x) + (x * Math.exp(-0.5 * x * x)) / Math.sqrt(2 * Math.PI)],
  rexp: [(x) => (x > 0 ? Math.expm1(x) : 0), (x, y) => (x > 0 ? y + 1 : 0)],
};

/** x^n for n >= 0; a broken n wants x >= 0. */
export function power(x, n) {
  if (n === 0) return 1;
  if (!Number.isInteger(n)) return Math.pow(x, n);
  let result = 1;
  for (; n; n >>= 1, x *= x) if (n & 1) result *= x;
  return result;
}

// ------------------------------------------------------------------------------------------------- parts of a page

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** An HTML element. */
export const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

/** An SVG element. */
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** C*width*height numbers, channel by channel (C 1 or 3), as RGBA pixels: `low` is black, `high` white. */
export function rgba(values, channels, low = 0, high = 1) {
  const places = values.length / channels, range = high > low ? high - low : 1;
  const pixels = new Uint8ClampedArray(4 * places);
  for (let i = 0; i < places; i++) {
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = (255 * (values[(channels === 3 ? c : 0) * places + i] - low)) / range;
    pixels[4 * i + 3] = 255;
  }
  return pixels;
}

/** Draws RGBA pixels on a canvas, which takes their size. */
export function paint(canvas, pixels, width) {
  canvas.width = width;
  canvas.height = pixels.length / 4 / width;
  canvas.getContext("2d").putImageData(new ImageData(pixels, width), 0, 0);
}

/** A number with a real minus sign, for people. */
export const readable = (text) => String(text).replace("-", "−");

/** The frame of a small widget: its controls, panels side by side, and a sentence that tells what is seen, which is returned. */
export function frame(el, controls, panels) {
  const summary = make("p", { class: "khnb-summary", "aria-live": "polite" });
  el.classList.add("khnb-widget");
  el.replaceChildren(make("div", { class: "khnb-small" },
    make("div", { class: "khnb-controls" }, ...controls), make("div", { class: "khnb-panels" }, ...panels), summary));
  return summary;
}

/** A name that no other part of the page has. Each widget of a page has its own copy of this module, so the page does the counting. */
export function uniqueId(what) {
  globalThis.khnbParts = (globalThis.khnbParts ?? 0) + 1;
  return `khnb-${what}-${globalThis.khnbParts}`;
}

// -------------------------------------------------------------------------------------- controls tied to one trait

const change = (model, name, value) => { model.set(name, value); model.save_changes(); };

/** A labelled select for a trait. `options`: values, or pairs of value and text. Returns {field, input, show}. */
export function choice(model, name, label, options) {
  const input = make("select", { id: uniqueId(name) });
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  for (const [value, text] of pairs) input.append(make("option", { value }, text));
  input.addEventListener("change", () => change(model, name, pairs[input.selectedIndex][0]));  // a number stays one
  const field = make("div", { class: "khnb-field" }, make("label", { for: input.id }, label), input);
  return { field, input, show: () => { input.value = model.get(name); } };
}

/** A labelled slider for a number. `text` says its value for people. Returns {field, input, show}. */
export function slider(model, name, label, { min, max, step, text = String }) {
  const input = make("input", { type: "range", id: uniqueId(name), min, max, step });
  const output = make("output", { for: input.id });
  input.addEventListener("input", () => change(model, name, Number(input.value)));
  const field = make("div", { class: "khnb-field" }, make("label", { for: input.id }, label), input, output);
  const show = () => {
    const value = model.get(name);
    input.value = value;
    output.value = text(value);
    input.setAttribute("aria-valuetext", output.value);
  };
  return { field, input, show };
}

/** A button that says what it does. */
export function button(text, act, attributes = {}) {
  const input = make("button", { type: "button", class: "khnb-button", ...attributes }, text);
  input.addEventListener("click", act);
  return input;
}

/**
 * A slider for a whole number, and buttons that move it: to 0, one back, one on, and a run by `stride` every `every` milliseconds, up to
 * `last()`; who wants no motion is taken there at once. While it runs, `summary()`, the live sentence, is not read out. A value beyond
 * `last()` counts as that. Returns {field, show, stop, at}: `at()` is where it stands.
 */
export function player(model, name, label, { last, summary, stride = 1, every = 60, text = (v) => `${v} of ${last()}` }) {
  let timer = 0;
  const at = () => Math.min(model.get(name), last());
  const go = (to) => change(model, name, Math.min(Math.max(to, 0), last()));
  const place = slider(model, name, label, { min: 0, max: last(), step: 1, text: () => text(at()) });
  const running = (id) => {
    timer = id;
    run.textContent = id ? "Pause" : "Run";
    summary().setAttribute("aria-live", id ? "off" : "polite");
  };
  const stop = () => {
    clearInterval(timer);
    running(0);
  };
  const tick = () => {
    if (at() + stride >= last()) stop();  // before the last sentence, which is to be read out
    go(at() + stride);
  };
  const by = (what, to) => button(what, () => { stop(); go(to()); });
  const run = button("Run", () => {
    if (timer) return stop();
    if (at() >= last()) go(0);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return go(last());
    running(setInterval(tick, every));
  });
  place.input.addEventListener("input", stop);
  const moves = [by("Reset", () => 0), by("Back", () => at() - 1), by("Step", () => at() + 1)];
  const buttons = make("div", { class: "khnb-row" }, ...moves, run);
  const show = () => {
    place.input.max = last();
    place.show();
  };
  return { field: make("div", { class: "khnb-player" }, buttons, place.field), show, stop, at };
}

/** Calls `draw` now and whenever one of the traits changes; returns what undoes it, for `render` to return. */
export function follow(model, names, draw) {
  const call = () => { draw(); };
  for (const name of names) model.on(`change:${name}`, call);
  draw();
  return () => { for (const name of names) model.off(`change:${name}`, call); };
}

/** Where a key leads from place `at` of a grid of `count` places, row by row; undefined for a key that is not for moving. */
export function arrow(event, at, columns, count) {
  const x = at % columns;
  const to = {
    ArrowLeft: x > 0 ? at - 1 : at, ArrowRight: x < columns - 1 ? at + 1 : at, ArrowUp: at - columns, ArrowDown: at + columns,
    Home: event.ctrlKey ? 0 : at - x, End: event.ctrlKey ? count - 1 : Math.min(at - x + columns - 1, count - 1),
  }[event.key];
  if (to === undefined) return undefined;
  event.preventDefault();
  return to < 0 || to >= count ? at : to;
}

// ------------------------------------------------------------------------------------------------------------ axes

/** About `count` round numbers from low to high. */
export function ticks(low, high, count = 5) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((s) => s * power >= rough) * power, digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push({ value: i * step, text: readable((i * step).toFixed(digits)) });
  return found;
}

/**
 * An empty chart with labelled axes. `x`, `y`: {label, low, high}. Returns {figure, plot, px, py}: an SVG element with
 * the text alternative `name`, the group to draw in (clipped to the axes), and functions from numbers to its coordinates.
 */
export function axes({ name, x, y, width = 440, height = 300 }) {
  const heights = ticks(y.low, y.high), widest = Math.max(...heights.map(({ text }) => text.length));
  const left = Math.max(56, 30 + 7 * widest), right = 12, top = 10, bottom = 44, id = uniqueId("clip");
  const px = (v) => left + ((v - x.low) / (x.high - x.low)) * (width - left - right);
  const py = (v) => height - bottom - ((v - y.low) / (y.high - y.low)) * (height - top - bottom);
  const plot = svg("g", { "clip-path": `url(#${id})` }), lines = svg("g", { class: "khnb-axes" });
  for (const { value, text } of ticks(x.low, x.high)) {
    lines.append(svg("line", { x1: px(value), x2: px(value), y1: top, y2: height - bottom }), svg("text", { x: px(value), y: height - bottom + 16, "text-anchor": "middle" }, text));
  }
  for (const { value, text } of heights) {
    lines.append(svg("line", { x1: left, x2: width - right, y1: py(value), y2: py(value) }), svg("text", { x: left - 6, y: py(value) + 4, "text-anchor": "end" }, text));
  }
  const middle = (top + height - bottom) / 2;
  lines.append(
    svg("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, x.label),
    svg("text", { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, y.label),
  );
  const area = { x: left, y: top, width: width - left - right, height: height - top - bottom };
  const figure = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name, class: "khnb-svg" },
    svg("clipPath", { id }, svg("rect", area)), lines, plot);
  return { figure, plot, px, py };
}

/** A line through points [x, y] as the attribute `d` of a path; points that are not finite leave a gap. */
export function path(points, px, py) {
  let pen = "M";
  return points.map(([x, y]) => {
    if (!Number.isFinite(x) || !Number.isFinite(y)) { pen = "M"; return ""; }
    const step = `${pen}${px(x).toFixed(2)} ${py(y).toFixed(2)}`;
    pen = "L";
    return step;
  }).join("");
}
