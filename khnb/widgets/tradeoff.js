// The trade-off explorer: accuracy against robustness, one point a model.
//
// Comes after common.js (see khnb.widgets.base.module). The first part computes and touches no page, so that it can be
// tested on its own. Points are drawn on a canvas, which is quick for tens of thousands; the axes, and what marks a few
// of the points, are SVG above it.

/** A header whose columns have the places of their rows as numbers, where they came as one letter a row. */
export function unpack({ columns, ...header }) {
  const numbers = ({ at, ...column }) => ({ ...column, at: typeof at === "string" ? Uint8Array.from(at, (letter) => letter.charCodeAt(0) - 48) : at });
  return { ...header, columns: Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, numbers(column)])) };
}

/** A function from the name of a column to the function from a row's number to its value. */
export const reader = (columns) => (name) => {
  const { values, at } = columns[name];
  return at ? (i) => values[at[i]] : (i) => values[i];
};

/** Whether a row has an R and passes the rules; a rule of 0 passes any. */
export function ruler(columns, { min_images, min_r2 }) {
  const [R, images, r2] = ["R", "images", "r2"].map(reader(columns));
  return (i) => R(i) !== null && !(min_images && images(i) <= min_images) && !(min_r2 && r2(i) <= min_r2);
}

/** The rows of one attack and threshold: how many, how many have no R, fail a rule or are filtered out, and those shown. */
export function sift({ count, columns }, { attack, confidence, filters, ...rules }) {
  const read = reader(columns), [attackOf, confidenceOf, R] = ["attack", "confidence", "R"].map(read), passes = ruler(columns, rules);
  const wanted = Object.entries(filters).map(([name, values]) => [read(name), new Set(values)]);
  const found = { all: 0, without: 0, ruled: 0, filtered: 0, shown: [] };
  for (let i = 0; i < count; i++) {
    if (attackOf(i) !== attack || confidenceOf(i) !== confidence) continue;
    found.all++;
    if (R(i) === null) found.without++;
    else if (!passes(i)) found.ruled++;
    else if (!wanted.every(([value, set]) => set.has(value(i)))) found.filtered++;
    else found.shown.push(i);
  }
  return found;
}

/** The places of numbers in rising order. */
export const order = (values) => Array.from(values, (_, i) => i).sort((a, b) => values[a] - values[b] || a - b);

/** Spearman's rank correlation: that of the ranks, where equal numbers share the mean of theirs. NaN where one side does not vary. */
export function spearman(x, y, orders = [order(x), order(y)]) {
  const [a, b] = [x, y].map((values, axis) => {
    const sorted = orders[axis], centred = new Float64Array(values.length);
    for (let start = 0, end; start < sorted.length; start = end) {
      for (end = start; end < sorted.length && values[sorted[end]] === values[sorted[start]];) end++;
      for (let k = start; k < end; k++) centred[sorted[k]] = (start + end - values.length) / 2;
    }
    return centred;
  });
  const dot = (p, q) => p.reduce((sum, v, i) => sum + v * q[i], 0);
  return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
}

/** The place of the point nearest to (x, y) and no further away than `reach`, or -1. */
export function nearest(xs, ys, x, y, reach) {
  let found = -1, least = reach * reach;
  for (let i = 0; i < xs.length; i++) {
    const distance = (xs[i] - x) ** 2 + (ys[i] - y) ** 2;
    if (distance <= least) [found, least] = [i, distance];
  }
  return found;
}

/** A picture with its RGBA bytes as whole pixels too. */
export const inWords = ({ data, width, height }) => ({ data, width, height, words: new Uint32Array(data.buffer) });

/**
 * Lays a small square picture over a large one (both of `inWords`), its centre at (x, y). As drawImage would; but for tens
 * of thousands of points that takes several times as long.
 */
export function stamp(picture, small, x, y) {
  const { data: into, width, height } = picture, { data: from, width: side } = small, left = Math.round(x - side / 2), top = Math.round(y - side / 2);
  for (let row = Math.max(0, -top); row < side && top + row < height; row++) {
    for (let column = Math.max(0, -left); column < side && left + column < width; column++) {
      const a = row * side + column, b = (top + row) * width + left + column, alpha = from[4 * a + 3];
      if (alpha === 255 || (alpha && !into[4 * b + 3])) picture.words[b] = small.words[a];  // nothing to mix
      else if (alpha) {
        for (let c = 0; c < 3; c++) into[4 * b + c] += (alpha / 255) * (from[4 * a + c] - into[4 * b + c]);
        into[4 * b + 3] += (alpha / 255) * (255 - into[4 * b + 3]);
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------- how points look

const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"], SHADES = 64;
const EDGE = "#808080";  // seen on a light page and on a dark one, around the darkest and the lightest colour
const SHAPES = [
  "M1 0A1 1 0 1 1-1 0A1 1 0 1 1 1 0Z", "M-.9-.9H.9V.9H-.9Z", "M0-1.2L1.1.8H-1.1Z", "M0-1.3L1.3 0 0 1.3-1.3 0Z", "M0 1.2L1.1-.8H-1.1Z",
  "M-.4-1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z", "M1.2 0L-.8 1.1V-1.1Z", "M-1-1.1H1L-1 1.1H1Z", "M-1.2 0L.8 1.1V-1.1Z",
  "M0-.5L.6-1.1 1.1-.6 .5 0 1.1.6 .6 1.1 0 .5-.6 1.1-1.1.6-.5 0-1.1-.6-.6-1.1Z",
];

/** A share from 0 to 1 as a colour, dark to light, that colour-blind readers can order. */
export function shade(share) {
  const at = share * (VIRIDIS.length - 1), k = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const [a, b] = [VIRIDIS[k], VIRIDIS[k + 1]].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return `rgb(${a.map((v, i) => Math.round(v + (at - k) * (b[i] - v))).join(" ")})`;
}

/** The looks {colour, shape, value} that a column gives its rows, `index` from a row to its look, and for a colour bar its ends. */
export function looksOf({ values, at }, bar) {
  const none = { colour: COLOURS.grey, shape: 9, value: null };
  if (bar) {
    const numbers = values.filter((v) => v !== null), [low, high] = numbers.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    const looks = Array.from({ length: SHADES }, (_, k) => ({ colour: shade(k / (SHADES - 1)), shape: 0 }));
    const place = (v) => (v === null ? SHADES : high > low ? Math.round(((SHADES - 1) * (v - low)) / (high - low)) : 0);
    return { looks: [...looks, none], index: (i) => place(values[at ? at[i] : i]), ends: numbers.length ? [low, high] : null };
  }
  const known = values.filter((v) => v !== null), palette = Object.values(COLOURS).slice(0, 7);
  const looks = values.map((value, k) => value === null ? none : {
    value, shape: k % (SHAPES.length - 1), colour: typeof value === "string" ? palette[k % palette.length] : shade(known.length > 1 ? k / (known.length - 1) : 0),
  });
  return { looks, index: (i) => at[i], ends: null };
}

// ----------------------------------------------------------------------------------------------------------- the page

const SIFTING = ["attack", "confidence", "filters", "min_images", "min_r2"];
const number = (v, digits) => (v === null ? "none" : readable(v.toFixed(digits)));
const plural = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
const DIGITS = { accuracy: 4, R: 5, R_err: 5, r2: 4 };
const LISTED = 200;  // rows of the table: more would take long to lay out

function render({ model, el }) {
  const header = unpack(model.get("header")), { columns, labels, asked, vary, choices } = header, read = reader(columns);
  const [R, error, low, high, accuracy, idOf] = ["R", "R_err", "R_low", "R_high", "accuracy", "id"].map(read);
  const set = (name, value) => { model.set(name, value); model.save_changes(); };
  const label = (name) => labels[name] ?? name;
  const say = (name, v) => (v === null ? "none" : name in DIGITS ? number(v, DIGITS[name]) : name === "n" && v === 0 ? "rExp" : typeof v === "number" ? readable(v) : v);
  const percent = (v) => `at least ${+(100 * v).toFixed(1)}% sure`;
  const withError = (i) => (R(i) === null ? "none" : `${say("R", R(i))} ± ${say("R_err", error(i))}`);
  const brief = (i) => header.brief.map((name) => [name, read(name)(i)]).filter(([, v]) => v !== null)
    .map(([name, v]) => (typeof v === "string" ? v : `${name}\u00a0=\u00a0${say(name, v)}`)).join(", ");

  // ------------------------------------------------------------------------------------------------------- the parts
  const named = (names) => names.map((name) => [name, label(name)]);
  const selects = [
    choice(model, "attack", "Attack", choices.attack), choice(model, "confidence", "Images", choices.confidence.map((v) => [v, percent(v)])),
    choice(model, "colour_by", "Colour by", named(choices.colour_by)), choice(model, "filter_by", "Filter by", named(choices.filter_by)),
  ];
  function box(text, changed) {
    const input = make("input", { type: "checkbox" }), words = make("span", {}, text);
    input.addEventListener("change", () => changed(input.checked));
    return { input, words, field: make("label", { class: "khnb-check" }, input, words) };
  }
  const last = { min_images: 500, min_r2: 0.95 };  // a rule that is switched on again is what it was
  const rules = [["min_images", (v) => `more than ${v} images`], ["min_r2", (v) => `R² of the fit above ${v}`]].map(([name, text]) => {
    const part = box("", (on) => set(name, on ? last[name] : 0));
    return { field: part.field, text: () => (model.get(name) ? text(model.get(name)) : null), show() { last[name] = model.get(name) || last[name]; part.input.checked = model.get(name) > 0; part.words.textContent = text(last[name]); } };
  });
  const values = make("div", { class: "khnb-row", role: "group" }), chips = make("div", { class: "khnb-row khnb-chips" });
  const canvas = make("canvas", { "aria-hidden": "true" }), drawing = make("div"), tip = make("div", { class: "khnb-tip", "aria-hidden": "true" });
  const cloud = make("div", {
    class: "khnb-cloud", role: "application", tabindex: 0,
    "aria-label": "Cloud of models: left and right move along robustness, up and down along accuracy, Enter selects, at most two",
  }, canvas, drawing, tip);
  const nothing = make("div", { class: "khnb-nothing" }), legend = make("div", { class: "khnb-legend" });
  const spoken = make("p", { class: "khnb-unseen", "aria-live": "polite" }), facts = make("div", { class: "khnb-compare" });
  const summary = make("p", { class: "khnb-summary", "aria-live": "polite" });
  const list = make("div", { class: "khnb-list", role: "region", tabindex: 0, "aria-label": "Table of the models shown" });
  const details = make("details", {}, make("summary", {}, "Show as a table"), list);
  const constant = asked.filter((name) => !vary.includes(name) && name !== "model").map((name) => `${label(name)} = ${say(name, columns[name].values[0])}`);
  el.classList.add("khnb-widget");
  el.replaceChildren(make("div", { class: "khnb-tradeoff" },
    make("div", { class: "khnb-controls" }, ...selects.slice(0, 3).map((part) => part.field)),
    make("div", { class: "khnb-controls", role: "group", "aria-label": "The thesis's rules" }, make("strong", {}, "The thesis's rules"), ...rules.map((part) => part.field)),
    make("div", { class: "khnb-controls" }, selects[3].field, values), chips, summary,
    make("div", { class: "khnb-panels" }, make("div", { class: "khnb-picture" }, cloud, nothing, legend), facts),
    spoken, details,
    ...(constant.length ? [make("details", {}, make("summary", {}, "What all these models share"), make("p", { class: "khnb-note" }, constant.join("; ")))] : [])));

  // -------------------------------------------------------------------------------------------------------- filters
  let boxes = [], boxesOf = null;

  function filter(name, wanted) {
    const { [name]: _, ...others } = model.get("filters");
    set("filters", wanted === null || wanted.length === columns[name].values.length ? others : { ...others, [name]: wanted });
  }

  const filterText = ([name, wanted]) => `${label(name)}: ${wanted.map((v) => say(name, v)).join(", ") || "nothing"}`;

  function drawFilters() {
    selects[3].show();
    const name = model.get("filter_by"), filters = model.get("filters"), every = columns[name].values, chosen = filters[name] ?? every;
    if (boxesOf !== name) {
      boxesOf = name;
      boxes = every.map((value) => box(say(name, value), (on) => {
        const now = model.get("filters")[name] ?? every;
        filter(name, every.filter((v) => (v === value ? on : now.includes(v))));
      }));
      values.setAttribute("aria-label", `Values of ${label(name)} to show`);
      values.replaceChildren(...boxes.map((part) => part.field));
    }
    boxes.forEach((part, k) => { part.input.checked = chosen.includes(every[k]); });
    chips.hidden = !Object.keys(filters).length;
    chips.replaceChildren("Only", ...Object.entries(filters).map(([key, wanted]) =>
      button(`${filterText([key, wanted])} ✕`, () => { filter(key, null); selects[3].input.focus(); }, { title: "Remove this filter" })));
  }

  // ------------------------------------------------------------------------------------------------------- the cloud
  let found, look, orders, xs, ys, chart, width, current = null;

  /** The ends of the axes hold all that passes the rules, whatever the attack and the filters: what changes is the points. */
  function ends() {
    const passes = ruler(columns, { min_images: model.get("min_images"), min_r2: model.get("min_r2") }), x = [Infinity, -Infinity], y = [Infinity, -Infinity];
    const widen = (range, a, b) => { if (a < range[0]) range[0] = a; if (b > range[1]) range[1] = b; };
    for (let i = 0; i < header.count; i++) {
      if (passes(i)) { widen(x, low(i) ?? R(i), high(i) ?? R(i)); widen(y, accuracy(i), accuracy(i)); }
    }
    return [x, y].map(([a, b]) => { const margin = 0.03 * (b - a) || 0.01; return { low: Math.max(0, a - margin), high: b + margin }; });
  }

  function draw() {
    found = sift(header, Object.fromEntries(SIFTING.map((name) => [name, model.get(name)])));
    const { shown } = found, pairs = [R, accuracy].map((of) => Float64Array.from(shown, of));
    orders = pairs.map((numbers) => order(numbers));
    if (!shown.includes(current)) current = null;
    [...selects, ...rules].forEach((part) => part.show());
    drawFilters();
    drawSummary(...pairs);
    drawLooks();
    details.hidden = !shown.length;
    if (details.open) drawList();
  }

  function drawLooks() {
    selects[2].show();
    look = looksOf(columns[model.get("colour_by")], header.many.includes(model.get("colour_by")));
    drawCloud();
    drawLegend();
  }

  function drawCloud() {
    const { shown } = found;
    cloud.hidden = legend.hidden = !shown.length;
    nothing.hidden = shown.length > 0;
    if (!shown.length) return drawNothing();
    width = Math.max(280, cloud.clientWidth || 560);
    const height = Math.round(Math.min(440, Math.max(280, 0.68 * width)));
    const [alongX, alongY] = ends();
    chart = axes({
      name: `Accuracy against robustness of ${plural(shown.length, "model")}`, width, height,
      x: { label: "robustness R (pixel range 0 to 1)", ...alongX }, y: { label: "test accuracy", ...alongY },
    });
    drawing.replaceChildren(chart.figure);
    xs = Float32Array.from(shown, (i) => chart.px(R(i)));
    ys = Float32Array.from(shown, (i) => chart.py(accuracy(i)));
    const fine = Math.max(2, window.devicePixelRatio || 1), radius = Math.min(5, Math.max(2.5, 5 * (600 / shown.length) ** 0.25)), side = Math.ceil(3.2 * radius * fine);
    const one = make("canvas", { width: side, height: side }).getContext("2d", { willReadFrequently: true });
    const stamps = look.looks.map(({ colour, shape }) => {
      one.clearRect(0, 0, side, side);
      one.setTransform(radius * fine, 0, 0, radius * fine, side / 2, side / 2);
      Object.assign(one, { lineWidth: 0.16, fillStyle: colour, strokeStyle: EDGE });
      one.fill(new Path2D(SHAPES[shape]));
      one.stroke(new Path2D(SHAPES[shape]));
      one.resetTransform();
      return inWords(one.getImageData(0, 0, side, side));
    });
    canvas.width = Math.round(width * fine);
    canvas.height = Math.round(height * fine);
    const image = new ImageData(canvas.width, canvas.height), picture = inWords(image);
    shown.forEach((i, k) => stamp(picture, stamps[look.index(i)], xs[k] * fine, ys[k] * fine));
    canvas.getContext("2d").putImageData(image, 0, 0);
    mark();
  }

  function drawNothing() {
    const attack = model.get("attack"), confidence = model.get("confidence"), possible = choices.confidence.filter((v) => sift(header, { attack, confidence: v, filters: {} }).all);
    if (!found.all) {
      nothing.replaceChildren(make("p", {}, `No model here was attacked by ${attack} on images it is ${percent(confidence)} of.`), ...possible.map((v) => button(`Take images that it is ${percent(v)} of`, () => set("confidence", v))));
    } else {
      nothing.replaceChildren(make("p", {}, "No model passes the filters and the rules."), button("Show all models", () => { set("filters", {}); set("min_images", 0); set("min_r2", 0); }));
    }
    drawFacts();
  }

  function drawLegend() {
    const name = model.get("colour_by"), counts = new Map();
    for (const i of found.shown) counts.set(look.index(i), (counts.get(look.index(i)) ?? 0) + 1);
    const entry = ({ colour, shape, value }, count) => make("li", {},
      svg("svg", { viewBox: "-1.6 -1.6 3.2 3.2", "aria-hidden": "true" }, svg("path", { d: SHAPES[shape], fill: colour, stroke: EDGE, "stroke-width": 0.2 })), `${say(name, value)} (${count})`);
    const bar = look.ends && make("div", { class: "khnb-colours" }, make("div", { style: `background: linear-gradient(to right, ${VIRIDIS.join(", ")})` }),
      make("div", { class: "khnb-ends" }, ...[0, 0.5, 1].map((t) => make("span", {}, say(name, +(look.ends[0] + t * (look.ends[1] - look.ends[0])).toPrecision(3))))));
    const entries = look.looks.flatMap((one, k) => (counts.has(k) && one.value !== undefined ? [entry(one, counts.get(k))] : []));
    legend.replaceChildren(make("strong", {}, label(name)), ...(bar ? [bar] : []), make("ul", {}, ...entries));
  }

  function drawSummary(robustness, accuracies) {
    const { all, shown, without, ruled, filtered } = found, range = (numbers, sorted, digits) => `${number(numbers[sorted[0]], digits)} to ${number(numbers[sorted.at(-1)], digits)}`;
    const left = [[without, "without R"], [ruled, `by the rules (${rules.flatMap((part) => part.text() ?? []).join(", ")})`], [filtered, `by the filters (only ${Object.entries(model.get("filters")).map(filterText).join("; ")})`]].filter(([count]) => count).map(([count, why]) => `${count.toLocaleString("en")} ${why}`).join(", ");
    const rho = shown.length > 2 ? spearman(robustness, accuracies, orders) : NaN;
    summary.textContent = `${shown.length.toLocaleString("en")} of ${plural(all, "model")} shown (${model.get("attack")}, ${percent(model.get("confidence"))})${left ? `; left out: ${left}` : ""}. ` +
      (shown.length ? `Accuracy ${range(accuracies, orders[1], 3)}, R ${range(robustness, orders[0], 4)}; rank correlation of the two (Spearman): ${Number.isNaN(rho) ? "none, too few models differ" : number(rho, 2)}.` : "");
  }

  // ----------------------------------------------------------------------------------------- one model, and two models
  const rowOf = (id) => { for (let i = 0; i < header.count; i++) if (idOf(i) === id && read("attack")(i) === model.get("attack") && read("confidence")(i) === model.get("confidence")) return i; return null; };

  /** Rings, letters and intervals of the model pointed at and of those selected. */
  function mark() {
    const ids = model.get("selected"), picked = ids.map(rowOf), at = found.shown.indexOf(current);
    chart.plot.replaceChildren(...[...picked, current].flatMap((i, k) => {
      const place = found.shown.indexOf(i);
      if (place < 0 || (k === ids.length && picked.includes(i))) return [];
      const [x, y] = [xs[place], ys[place]];
      return [
        ...(low(i) === null ? [] : [svg("path", { class: "khnb-interval", d: `M${chart.px(low(i))} ${y - 4}v8m0-4H${chart.px(high(i))}m0-4v8` })]),
        svg("circle", { class: "khnb-ring", cx: x, cy: y, r: 9 }),
        ...(k < ids.length ? [svg("text", { x: x + (x > width - 40 ? -20 : 11), y: y - 7 }, "AB"[k])] : []),
      ];
    }));
    tip.hidden = at < 0;
    if (at >= 0) {
      tip.replaceChildren(make("b", {}, brief(current)), make("br"), `accuracy ${say("accuracy", accuracy(current))}, R ${withError(current)}`);
      tip.style.cssText = `${xs[at] > width / 2 ? `right: ${width - xs[at] + 14}px` : `left: ${xs[at] + 14}px`}; ${ys[at] > 150 ? `bottom: calc(100% - ${ys[at] - 8}px)` : `top: ${ys[at] + 8}px`}; max-width: ${Math.min(300, Math.max(xs[at], width - xs[at]) - 24)}px`;
    }
    drawFacts();
  }

  /** Intervals of R on one scale, so that two can be compared. */
  function intervalBar(i, rows) {
    const known = rows.filter((r) => r !== null && low(r) !== null), a = Math.min(...known.map(low)), b = Math.max(...known.map(high)), x = (v) => 5 + (90 * (v - a)) / (b - a || 1);
    return svg("svg", { class: "khnb-bar95", viewBox: "0 0 100 12", role: "img", "aria-label": `from ${low(i)} to ${high(i)}` },
      svg("path", { class: "khnb-interval", d: `M${x(low(i))} 2v8m0-4H${x(high(i))}m0-4v8` }), svg("circle", { cx: x(R(i)), cy: 6, r: 2, fill: "currentColor" }));
  }

  function drawFacts() {
    const ids = model.get("selected"), picked = ids.map(rowOf), pointed = ids.length < 2 && current !== null && !picked.includes(current);
    const rows = pointed ? [...picked, current] : picked;
    if (!rows.length) return facts.replaceChildren(make("p", { class: "khnb-note" }, "Point at a model, or move among them with the arrow keys, to see what it is. A click, a tap or Enter selects it; two selected models are compared."));
    const line = (name, text = (i) => say(name, read(name)(i)), title = label(name)) => ({ title, texts: rows.map((i) => (i === null ? "" : text(i))) });
    const lines = [
      line("accuracy", undefined, "test accuracy"), line("R", withError, "R ± bootstrap error"),
      { ...line("R", (i) => (low(i) === null ? "none" : `${number(low(i), 5)} to ${number(high(i), 5)}`), "95% interval of R"), bar: true },
      line("images"), line("n_survived", undefined, "never fooled"), line("r2", undefined, "R² of the fit"),
      ...[...vary, "f"].map((name) => line(name)).filter(({ texts }) => texts.some((text) => text !== "none")),
      line("id", undefined, "record of the model"), line("record", undefined, "record of the attack"), ...["computed", "hardware", "code"].map((name) => line(name)),
    ];
    const heads = rows.map((i, k) => make("th", { scope: "col" }, k < ids.length ? "AB"[k] : "pointed at", ...(k < ids.length ? [" ", button("✕", () => { set("selected", ids.filter((_, at) => at !== k)); cloud.focus(); }, { "aria-label": `Take ${"AB"[k]} away` })] : [])));
    const body = lines.map(({ title, texts, bar }) => {
      const differ = rows.length === 2 && texts[0] !== texts[1];
      const cells = texts.map((text, k) => make("td", {}, ...(bar && rows[k] !== null && low(rows[k]) !== null ? [intervalBar(rows[k], rows)] : []), text));
      return make("tr", { class: differ ? "khnb-differs" : "" }, make("th", { scope: "row" }, title), ...cells, ...(rows.length === 2 ? [make("td", {}, differ ? "≠" : "")] : []));
    });
    const caption = rows.includes(null) ? "Not every selected model was attacked like this." : rows.length === 2 ? "Two models; ≠ and bold type mark what differs." : "One model; select another to compare.";
    facts.replaceChildren(make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, make("td"), ...heads, ...(rows.length === 2 ? [make("td")] : []))), make("tbody", {}, ...body)));
  }

  function drawList() {
    const names = ["accuracy", "R", "R_err", "images", "r2", ...vary, "f", "id", "record"], rows = orders[0].map((k) => found.shown[k]).slice(0, LISTED);
    list.replaceChildren(make("table", {},
      make("caption", {}, `${rows.length < found.shown.length ? `The first ${LISTED} of ${plural(found.shown.length, "model")}` : plural(rows.length, "model")}, from the smallest R to the largest`),
      make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, { R_err: "± error", r2: "R² of the fit", id: "model", model: "kind" }[name] ?? label(name))))),
      make("tbody", {}, ...rows.map((i) => make("tr", {}, ...names.map((name) => make("td", {}, say(name, read(name)(i)))))))));
  }

  // ------------------------------------------------------------------------------------------------- mouse, touch, keys
  const point = (i) => { if (i !== current) { current = i; mark(); } };
  const toggle = (i) => { const id = idOf(i), now = model.get("selected"); set("selected", now.includes(id) ? now.filter((v) => v !== id) : [...now, id].slice(-2)); };
  const under = (event, reach) => {
    const area = cloud.getBoundingClientRect(), unit = width / area.width;
    return found.shown[nearest(xs, ys, (event.clientX - area.left) * unit, (event.clientY - area.top) * unit, reach)] ?? null;
  };
  cloud.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch") point(under(event, 14)); });
  cloud.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") point(null); });
  cloud.addEventListener("click", (event) => {
    const i = under(event, 22);  // a finger is wider than a mouse
    point(i);
    if (i !== null) toggle(i);
  });
  cloud.addEventListener("blur", () => point(null));
  cloud.addEventListener("keydown", (event) => {
    const [along, sign] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowDown: [1, -1], ArrowUp: [1, 1], Home: [0, -Infinity], End: [0, Infinity] }[event.key] ?? [];
    if (along !== undefined) {
      const sorted = orders[along], from = current ?? rowOf(model.get("selected").at(-1)), at = sorted.indexOf(found.shown.indexOf(from));
      point(found.shown[sorted[Math.min(Math.max(at < 0 && sign < 0 ? 0 : at + sign, 0), sorted.length - 1)]]);
    } else if ((event.key === "Enter" || event.key === " ") && current !== null) toggle(current);
    else if (event.key === "Escape") point(null);
    else return;
    event.preventDefault();
    const letter = current === null ? -1 : model.get("selected").indexOf(idOf(current));
    spoken.textContent = current === null ? "" : `${brief(current)}: accuracy ${say("accuracy", accuracy(current))}, R ${withError(current)}${letter < 0 ? "" : `; selected as ${"AB"[letter]}`}`;
  });
  details.addEventListener("toggle", () => { if (details.open) drawList(); });

  const undo = [follow(model, SIFTING, draw), follow(model, ["colour_by"], drawLooks), follow(model, ["filter_by"], drawFilters), follow(model, ["selected"], () => (found.shown.length ? mark() : drawFacts()))];
  const watch = new ResizeObserver(() => { if (cloud.clientWidth && cloud.clientWidth !== width) drawCloud(); });
  watch.observe(el);
  return () => { watch.disconnect(); undo.forEach((call) => call()); };
}

export default { render };
