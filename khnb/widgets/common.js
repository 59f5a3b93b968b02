// What the book's widgets share: reading bytes, making parts of a page, controls tied to a trait, axes.
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

let parts = 0;

/** A name that no other part of the page has. */
export const uniqueId = (what) => `khnb-${what}-${++parts}`;

// -------------------------------------------------------------------------------------- controls tied to one trait

const change = (model, name, value) => { model.set(name, value); model.save_changes(); };

/** A labelled select for a trait. `options`: values, or pairs of value and text. Returns {field, input, show}. */
export function choice(model, name, label, options) {
  const input = make("select", { id: uniqueId(name) }), values = [];
  for (const option of options) {
    const [value, text] = Array.isArray(option) ? option : [option, option];
    input.append(make("option", { value }, text));
    values.push(value);  // the trait gets the value in its own type, which an option does not keep
  }
  input.addEventListener("change", () => change(model, name, values[input.selectedIndex]));
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

/** Calls `draw` now and whenever one of the traits changes; returns what undoes it, for `render` to return. */
export function follow(model, names, draw) {
  const call = () => { draw(); };
  for (const name of names) model.on(`change:${name}`, call);
  draw();
  return () => { for (const name of names) model.off(`change:${name}`, call); };
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
  const left = 56, right = 12, top = 10, bottom = 44, id = uniqueId("clip");
  const px = (v) => left + ((v - x.low) / (x.high - x.low)) * (width - left - right);
  const py = (v) => height - bottom - ((v - y.low) / (y.high - y.low)) * (height - top - bottom);
  const plot = svg("g", { "clip-path": `url(#${id})` }), lines = svg("g", { class: "khnb-axes" });
  for (const { value, text } of ticks(x.low, x.high)) {
    lines.append(svg("line", { x1: px(value), x2: px(value), y1: top, y2: height - bottom }), svg("text", { x: px(value), y: height - bottom + 16, "text-anchor": "middle" }, text));
  }
  for (const { value, text } of ticks(y.low, y.high)) {
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
