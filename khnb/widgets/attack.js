// The attack lab: a small network and its attacks, computed in the page.
//
// Comes after common.js (see khnb.widgets.base.module). The first half computes (float64 throughout) and touches no page, so
// that it can be tested on its own; the second half draws.

// --------------------------------------------------------------------------------------------------------- the model

/**
 * A network of one convolution, max-pooling, sigma(.)^n and a linear classifier, from its header and the packed bytes.
 *
 * header: shapes {filters [F, C, w, w], linear [classes, features]} and offsets in the bytes: filters (what an image is
 * convolved with, float32), linear (int16, of the largest weight of its class and filter), top (these, float32 [classes, F]);
 * norm: p of the patch norm, or null for none; bias: F numbers or null; linear_bias; side; sigma, n, w_pool, s_pool. An
 * image is C*side*side numbers in [0, 1]: channel, row, column.
 *
 * Returns {logits(x), probabilities(x), guess(x), gradient(x, label)}; the gradient is that of the cross-entropy.
 */
export function makeNetwork(header, packed) {
  const bytes = toBytes(packed), view = new DataView(bytes.buffer, bytes.byteOffset), at = header.offsets;
  const [F, C, w] = header.shapes.filters, [classes, features] = header.shapes.linear;
  const { side, n, norm: p, w_pool: wPool, s_pool: sPool } = header;
  const D = C * w * w, filters = new Float64Array((F + 1) * D);  // one empty filter at the end: they go in pairs
  for (let i = 0; i < F * D; i++) filters[i] = view.getFloat32(at.filters + 4 * i, true);
  const linear = new Float64Array(classes * features);  // a feature's weights side by side
  for (let i = 0; i < classes * features; i++) {
    const c = Math.floor(i / features), k = i % features, f = Math.floor((k * F) / features);
    linear[k * classes + c] = (view.getInt16(at.linear + 2 * i, true) * view.getFloat32(at.top + 4 * (c * F + f), true)) / 32767;
  }
  const bias = header.bias, linearBias = header.linear_bias;
  const [sigma, slope] = ACTIVATIONS[header.sigma];

  const across = side - w + 1, places = across * across;
  const pooledAcross = Math.floor((across - wPool) / sPool) + 1, pooledPlaces = pooledAcross * pooledAcross;
  if (features !== F * pooledPlaces) throw new Error("the classifier does not fit the convolution");
  const columns = new Float64Array(D * places);  // row d: input d of every patch
  const powers = new Float64Array(side * side), norms = new Float64Array(places), empty = new Uint8Array(places);
  const maps = [new Float64Array(places), new Float64Array(places)];  // the activities of two filters
  const pooled = new Float64Array(features), where = new Int32Array(features);
  const active = new Float64Array(features);
  const offsets = new Int32Array(D);  // of a patch's inputs from its corner in the image
  for (let d = 0; d < D; d++) {
    const c = Math.floor(d / (w * w)), i = Math.floor(d / w) % w, j = d % w;
    offsets[d] = (c * side + i) * side + j;
  }

  function patchNorms(x) {
    powers.fill(0);
    for (let c = 0; c < C; c++) {
      for (let i = 0; i < side * side; i++) {
        const v = x[c * side * side + i];
        powers[i] += p === 2 ? v * v : Math.abs(v) ** p;
      }
    }
    for (let y = 0, at = 0; y < across; y++) {
      for (let z = 0; z < across; z++, at++) {
        let sum = 0;
        for (let i = 0; i < w; i++) for (let j = 0; j < w; j++) sum += powers[(y + i) * side + z + j];
        empty[at] = sum > 0 ? 0 : 1;
        norms[at] = sum > 0 ? (p === 2 ? Math.sqrt(sum) : sum ** (1 / p)) : 1;
      }
    }
  }

  // Two filters and four inputs a pass: most of the time goes here, and this reads each number least often.
  function convolve(f) {
    const [one, two] = maps;
    one.fill(bias ? bias[f] : 0);
    two.fill(bias && f + 1 < F ? bias[f + 1] : 0);
    let d = 0;
    for (let a = f * D, b = a + D; d + 3 < D; d += 4) {
      const a0 = filters[a + d], a1 = filters[a + d + 1], a2 = filters[a + d + 2], a3 = filters[a + d + 3];
      const b0 = filters[b + d], b1 = filters[b + d + 1], b2 = filters[b + d + 2], b3 = filters[b + d + 3];
      const c0 = d * places, c1 = c0 + places, c2 = c1 + places, c3 = c2 + places;
      for (let at = 0; at < places; at++) {
        const v0 = columns[c0 + at], v1 = columns[c1 + at], v2 = columns[c2 + at], v3 = columns[c3 + at];
        one[at] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3;
        two[at] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3;
      }
    }
    for (; d < D; d++) {
      const a = filters[f * D + d], b = filters[f * D + D + d], c = d * places;
      for (let at = 0; at < places; at++) {
        one[at] += a * columns[c + at];
        two[at] += b * columns[c + at];
      }
    }
  }

  function pool(f, map) {
    if (p) for (let at = 0; at < places; at++) map[at] *= 1 / norms[at]; // as the library does, to the last bit: where activities are equal rounding picks the place
    for (let y = 0, k = f * pooledPlaces; y < pooledAcross; y++) {
      for (let z = 0; z < pooledAcross; z++, k++) {
        let best = -Infinity, place = 0;
        for (let i = 0; i < wPool; i++) {
          const row = (y * sPool + i) * across + z * sPool;
          for (let j = 0; j < wPool; j++) if (map[row + j] > best) best = map[(place = row + j)];
        }
        pooled[k] = best;
        where[k] = place;
        active[k] = sigma(best);
      }
    }
  }

  function classify(logits, row, y) {
    for (let c = 0; c < classes; c++) logits[c] += linear[row + c] * y;
  }

  function forward(x) {
    for (let d = 0; d < D; d++) {
      for (let y = 0; y < across; y++) {
        const from = offsets[d] + y * side, to = d * places + y * across;
        for (let z = 0; z < across; z++) columns[to + z] = x[from + z];
      }
    }
    if (p) patchNorms(x);
    for (let f = 0; f < F; f += 2) {
      convolve(f);
      pool(f, maps[0]);
      if (f + 1 < F) pool(f + 1, maps[1]);
    }
    const logits = Float64Array.from(linearBias);
    for (let k = 0; k < features; k++) classify(logits, k * classes, power(active[k], n));
    return logits;
  }

  function softmax(logits) {
    const top = Math.max(...logits), e = Array.from(logits, (v) => Math.exp(v - top));
    const sum = e.reduce((a, b) => a + b, 0);
    return e.map((v) => v / sum);
  }

  const argmax = (values) => values.reduce((best, v, i) => (v > values[best] ? i : best), 0);

  function spread(grad, corner, f, g) {
    for (let d = 0; d < D; d++) grad[corner + offsets[d]] += g * filters[f + d];
  }

  // Back from the loss to the image. Only the place a maximum came from sees its gradient. With a patch norm N the
  // activity is h = z / N, so a patch v gets (filter - h dN/dv) / N, and dN/dv = sgn(v) |v / N|^(p-1).
  function gradient(x, label) {
    const back = Float64Array.from(softmax(forward(x)));
    back[label] -= 1;
    const grad = new Float64Array(x.length), toNorm = new Float64Array(places);
    for (let k = 0; k < features; k++) {
      let g = 0;
      for (let c = 0; c < classes; c++) g += back[c] * linear[k * classes + c];
      g *= n * power(active[k], n - 1) * slope(pooled[k], active[k]);
      if (g === 0) continue;
      const at = where[k], corner = Math.floor(at / across) * side + (at % across);
      if (p) {
        g /= norms[at];
        if (!empty[at]) toNorm[at] -= g * pooled[k];
      }
      const f = Math.floor(k / pooledPlaces) * D;
      spread(grad, corner, f, g);
    }
    if (p) {
      for (let at = 0; at < places; at++) {
        if (toNorm[at] === 0) continue;
        const corner = Math.floor(at / across) * side + (at % across);
        for (let d = 0; d < D; d++) {
          const v = x[corner + offsets[d]] / norms[at];
          grad[corner + offsets[d]] += toNorm[at] * (p === 2 ? v : Math.sign(v) * Math.abs(v) ** (p - 1));
        }
      }
    }
    return grad;
  }

  return {
    logits: forward,
    probabilities: (x) => softmax(forward(x)),
    guess: (x) => argmax(forward(x)),
    gradient,
  };
}

// -------------------------------------------------------------------------------------------------------- the attacks

const clip = (v, low = 0, high = 1) => Math.min(Math.max(v, low), high);

/** x moved by epsilon along a direction of signs, kept in [0, 1] (eq. 7.3). */
export const move = (x, direction, epsilon) => Float64Array.from(x, (v, i) => clip(v + epsilon * direction[i]));

const breathe = () => new Promise((done) => setTimeout(done, 0));

/** Lets the page answer whenever 25 ms have passed; resolves to false when `wanted` says that nobody waits any more. */
function pacer(wanted) {
  let last = Date.now();
  return async () => {
    if (Date.now() - last > 25) {
      await breathe();
      last = Date.now();
    }
    return wanted();
  };
}

/**
 * The adversarial radius along the ray of one FGSM gradient: 0 where the image itself is wrong, Infinity where no
 * strength up to 1 fools the network. Scans in steps of 1e-3 and halves the first interval down to 1e-6, as
 * khnb.attacks.fgsm_radius does. Resolves to null when `wanted` turns false.
 */
export async function fgsmRadius(network, x, label, wanted = () => true) {
  const pace = pacer(wanted), grain = 1000, last = 1e6;
  if (network.guess(x) !== label) return 0;
  const direction = network.gradient(x, label).map(Math.sign);
  const wrong = (at) => network.guess(move(x, direction, at * 1e-6)) !== label;
  for (let at = grain; at <= last; at += grain) {
    if (!(await pace())) return null;
    if (!wrong(at)) continue;
    let low = at - grain, high = at;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (wrong(middle)) high = middle;
      else low = middle;
    }
    return high * 1e-6;
  }
  return Infinity;
}

/**
 * Projected gradient descent (eq. 7.5) from the image itself, up to the first iterate that is wrong. Resolves to
 * {x, steps, fooled, distance}, or to null when `wanted` turns false.
 */
export async function pgd(network, start, label, { step, radius, maxSteps }, wanted = () => true) {
  const pace = pacer(wanted);
  let x = Float64Array.from(start), steps = 0, fooled = network.guess(x) !== label;
  for (; !fooled && steps < maxSteps; steps++) {
    if (!(await pace())) return null;
    const g = network.gradient(x, label);
    x = x.map((v, i) => clip(clip(v + step * Math.sign(g[i]), start[i] - radius, start[i] + radius)));
    fooled = network.guess(x) !== label;
  }
  const distance = x.reduce((most, v, i) => Math.max(most, Math.abs(v - start[i])), 0);
  return { x, steps, fooled, distance };
}

// ----------------------------------------------------------------------------------------------------------- the page

const percent = (v) => `${(100 * v).toFixed(1)} %`;
const SHOWN = { dash: ["", "6 3", "2 3", "8 3 2 3"], colour: [COLOURS.blue, COLOURS.vermilion, COLOURS.green, COLOURS.purple] };  // of each model

/** The share of sorted radii below `radius`, linear between quantiles (`radii`: the quantiles from 0 to 1, evenly). */
export function below(radii, radius) {
  const last = radii.length - 1;
  if (radius <= radii[0]) return 0;
  if (radius >= radii[last]) return 1;
  const i = radii.findIndex((r) => r > radius);
  return (i - 1 + (radius - radii[i - 1]) / (radii[i] - radii[i - 1])) / last;
}

function render({ model, el }) {
  const { models, shape, labels, classes, max_steps: maxSteps } = model.get("header");
  const weights = model.get("weights"), pixels = toBytes(model.get("pixels"));
  const [N, C, side] = shape, size = C * side * side;
  const set = (values) => { model.set(values); model.save_changes(); };

  const networks = new Map();
  const network = (name) => {
    if (!networks.has(name)) networks.set(name, makeNetwork(models.find((m) => m.name === name), weights));
    return networks.get(name);
  };
  const modelName = () => (models.find((m) => m.name === model.get("model_name")) ?? models[0]).name;

  // What is attacked: a test image, or what the reader drew or brought ("own", which has the shape of a test image).
  const testImage = (i) => pixels.subarray(i * size, (i + 1) * size);
  const testName = (i) => `${classes[labels[i]]}, image ${i + 1} of ${N}`;
  const imageIndex = () => Math.min(Math.max(model.get("image"), 0), N - 1);
  const own = () => toBytes(model.get("own"));
  const isOwn = () => own().length === size;
  const current = () => {
    const i = imageIndex(), mine = isOwn(), bytes = mine ? own() : testImage(i);
    return { bytes, x: Float64Array.from(bytes, (v) => v / 255), label: mine ? model.get("own_label") : labels[i], name: mine ? "your own image" : testName(i), key: mine ? bytes.join() : i };
  };

  // ------------------------------------------------------------------------------------------------------- the parts
  const modelSelect = choice(model, "model_name", "Model", models.map((m) => m.name)), attackSelect = choice(model, "attack", "Attack", ["FGSM", "PGD"]);
  const digits = (count) => (value) => value.toFixed(count);
  const strength = slider(model, "epsilon", "Strength ε", { min: 0, max: 0.1, step: 0.0005, text: digits(4) });
  const ofPgd = [
    slider(model, "step", "Step", { min: 0.0005, max: 0.01, step: 0.0005, text: digits(4) }),
    slider(model, "radius", "Ball S", { min: 0.001, max: 0.14, step: 0.001, text: digits(3) }),
  ];
  const controls = [modelSelect, attackSelect, strength, ...ofPgd];

  const thumbs = Array.from({ length: N }, (_, i) => {
    const canvas = make("canvas", { "aria-hidden": "true" });
    paint(canvas, rgba(testImage(i), C, 0, 255), side);
    const button = make("button", { type: "button", "aria-label": testName(i), title: testName(i) }, canvas);
    button.addEventListener("click", () => set({ image: i, own: new DataView(new ArrayBuffer(0)) }));
    return button;
  });
  const gallery = make("div", { class: "khnb-thumbs", role: "group", "aria-label": "Test image; move with the arrow keys" }, ...thumbs);
  gallery.addEventListener("keydown", (event) => {
    const at = imageIndex();
    const to = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: N - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (!thumbs[to]) return;
    thumbs[to].click();
    thumbs[to].focus();
  });

  const pictures = ["original", "perturbation", "attacked"].map((name) => {
    const canvas = make("canvas", { role: "img", "aria-label": name }), caption = make("figcaption", {}, name);
    return { canvas, caption, figure: make("figure", {}, canvas, caption) };
  });
  const bars = classes.map((name) => {
    const fill = make("span", { class: "khnb-fill" }), before = make("span", { class: "khnb-before" }), value = make("td", { class: "khnb-number" });
    const label = make("th", { scope: "row" }, name);
    return { fill, before, value, label, row: make("tr", {}, label, make("td", {}, make("span", { class: "khnb-track" }, fill, before)), value) };
  });
  const chart = make("table", { class: "khnb-bars" },
    make("caption", {}, "Probability of each class: bars for the attacked image, marks for the original"),
    make("tbody", {}, ...bars.map((bar) => bar.row)));
  const radii = models.map((m) => ({ name: m.name, value: make("dd", {}) }));
  const radiusList = make("dl", { class: "khnb-facts" }, ...radii.flatMap(({ name, value }) => [make("dt", {}, name), value]));
  const curves = models.some((m) => m.curve) ? curveChart(models) : null;
  const summary = make("p", { class: "khnb-summary", "aria-live": "polite" });
  const editor = imageEditor();

  el.classList.add("khnb-widget");
  el.replaceChildren(make("div", { class: "khnb-attack" },
    gallery, editor.part,
    make("div", { class: "khnb-controls" }, ...controls.map((part) => part.field)),
    make("div", { class: "khnb-panels" },
      make("div", { class: "khnb-pictures" },
        make("div", { class: "khnb-row" }, ...pictures.map((p) => p.figure)),
        make("p", { class: "khnb-note" }, "Adversarial radius of this image (FGSM), in units of the pixel range:"), radiusList),
      make("div", { class: "khnb-chart" }, chart),
      ...(curves ? [make("figure", { class: "khnb-curves" }, curves.figure, make("figcaption", {}, curves.caption))] : [])),
    summary));

  // Draw on the image or bring another one: a brush for mouse, pen and finger, a cursor for the keyboard, a file.
  function imageEditor() {
    const canvas = make("canvas", { tabindex: 0, role: "application", "aria-label": `Drawing board of ${side} by ${side} pixels: move with the arrow keys, paint with the space bar` });
    const colour = make("input", { type: "color", id: uniqueId("colour"), value: "#ffffff" });
    const width = make("select", { id: uniqueId("brush") }, ...[1, 2, 4].map((v) => make("option", { value: v }, v === 1 ? "1 pixel" : `${v} pixels`)));
    const file = make("input", { type: "file", id: uniqueId("file"), accept: "image/*" });
    const label = choice(model, "own_label", "Its true class", classes.map((name, i) => [i, name]));
    const reset = button("Back to the test image", () => set({ own: new DataView(new ArrayBuffer(0)) }));
    const said = make("p", { class: "khnb-note", role: "status" });
    let cursor = [side >> 1, side >> 1], last = null;

    const take = (bytes, ownLabel) => set({ own: new DataView(bytes.buffer), own_label: ownLabel });
    function dab(...places) {
      const { bytes, label: now } = current(), next = Uint8Array.from(bytes), b = Number(width.value);
      const rgb = [1, 3, 5].map((at) => parseInt(colour.value.slice(at, at + 2), 16)), grey = Math.round(rgb.reduce((a, v) => a + v) / 3);
      for (const [x, y] of places) {
        for (let i = y - (b >> 1); i < y - (b >> 1) + b; i++) {
          for (let j = x - (b >> 1); j < x - (b >> 1) + b; j++) {
            if (i >= 0 && j >= 0 && i < side && j < side) for (let c = 0; c < C; c++) next[(c * side + i) * side + j] = C === 3 ? rgb[c] : grey;
          }
        }
      }
      take(next, now);
    }
    const placeOf = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top].map((v, k) => clip(Math.floor((v / (k ? box.height : box.width)) * side), 0, side - 1));
    };
    function stroke(event) {  // all pixels between two events, so that a quick stroke has no gaps
      const to = placeOf(event), from = last ?? to, steps = Math.max(1, ...to.map((v, k) => Math.abs(v - from[k])));
      dab(...Array.from({ length: steps + 1 }, (_, s) => from.map((v, k) => Math.round(v + ((to[k] - v) * s) / steps))));
      last = cursor = to;
    }
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); last = null; stroke(event); });
    canvas.addEventListener("pointermove", (event) => { if (last) stroke(event); });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
    canvas.addEventListener("keydown", (event) => {
      const go = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!go && event.key !== " " && event.key !== "Enter") return;
      event.preventDefault();
      if (go) cursor = cursor.map((v, k) => clip(v + go[k], 0, side - 1));
      else dab(cursor);
      show();
    });
    for (const event of ["focus", "blur"]) canvas.addEventListener(event, () => show());
    file.addEventListener("change", async () => {
      if (!file.files[0]) return;
      try {
        const bytes = await shrink(file.files[0], C, side), net = network(modelName());
        take(bytes, net.guess(Float64Array.from(bytes, (v) => v / 255)));
        said.textContent = "The middle square of your picture, made smaller; nothing leaves this page. Its class is what the model sees in it: choose another if that is wrong.";
      } catch {
        said.textContent = `"${file.files[0].name}" is not a picture that this browser can read.`;
      }
      file.value = "";
    });

    function show() {
      const { bytes } = current();
      paint(canvas, rgba(bytes, C, 0, 255), side);
      if (document.activeElement === canvas) {  // the keyboard's cursor: a pixel of the opposite lightness
        const context = canvas.getContext("2d"), [x, y] = cursor, at = y * side + x;
        context.fillStyle = bytes[at] > 127 ? "#000" : "#fff";
        context.fillRect(x, y, 1, 1);
      }
      label.field.hidden = reset.hidden = !isOwn();
      label.show();
    }
    const labelled = (text, control) => make("div", { class: "khnb-field" }, make("label", { for: control.id }, text), control);
    const part = make("details", { class: "khnb-own" }, make("summary", {}, "Draw on the image, or bring your own"),
      make("div", { class: "khnb-row" }, canvas,
        make("div", { class: "khnb-tools" }, labelled("Colour", colour), labelled("Brush", width), labelled("A picture of yours", file), label.field, reset, said)));
    return { part, show };
  }

  // --------------------------------------------------------------------------------------------------- what they show
  const known = new Map();  // results that stay true: starting points and radii, by model and image
  const remember = (key, compute) => {
    if (!known.has(key)) known.set(key, compute());
    return known.get(key);
  };

  function show(image, attacked, perturbation, caption, start, now, text) {
    [[image.x, "original"], [perturbation, caption], [attacked, "attacked image"]].forEach(([picture, name], i) => {
      paint(pictures[i].canvas, rgba(picture, C), side);
      pictures[i].canvas.setAttribute("aria-label", i === 0 ? `original: ${image.name}` : name);
      pictures[i].caption.textContent = name;
    });
    const top = now.indexOf(Math.max(...now));
    bars.forEach((bar, c) => {
      bar.fill.style.width = percent(now[c]).replace(" ", "");
      bar.before.style.left = percent(start[c]).replace(" ", "");
      bar.value.textContent = percent(now[c]);
      bar.label.textContent = c === image.label ? `${classes[c]} (true)` : classes[c];
      bar.row.className = c === image.label ? "khnb-true" : c === top ? "khnb-wrong" : "";
    });
    const verdict = top === image.label ? "right" : "wrong";
    summary.textContent = `${modelName()} on ${image.name}: ${text}. It answers ${classes[top]} (${percent(now[top])}), which is ${verdict}.`;
  }

  let turn = 0;  // a newer turn makes older computations stop

  async function draw() {
    const mine = ++turn, wanted = () => mine === turn;
    const name = modelName(), image = current(), { x, label, key } = image, net = network(name), attack = model.get("attack");
    controls.forEach((part) => part.show());
    strength.field.hidden = attack !== "FGSM";
    ofPgd.forEach((part) => { part.field.hidden = attack !== "PGD"; });
    thumbs.forEach((thumb, k) => { thumb.setAttribute("aria-pressed", !isOwn() && k === imageIndex()); thumb.tabIndex = k === imageIndex() ? 0 : -1; });
    editor.show();
    const { start, direction } = remember(`start ${name} ${label} ${key}`, () => ({ start: net.probabilities(x), direction: net.gradient(x, label).map(Math.sign) }));

    if (attack === "FGSM") {
      const eps = model.get("epsilon"), attacked = move(x, direction, eps);
      show(image, attacked, direction.map((v) => (v + 1) / 2), "sign of the gradient", start, net.probabilities(attacked), `FGSM with ε = ${eps.toFixed(4)}`);
    } else {
      summary.textContent = `PGD is at work on ${image.name} …`;
      const bound = model.get("radius");
      const result = await pgd(net, x, label, { step: model.get("step"), radius: bound, maxSteps }, wanted);
      if (!result) return;
      const change = result.x.map((v, k) => 0.5 + (0.5 * (v - x[k])) / bound);
      const steps = `${result.steps} step${result.steps === 1 ? "" : "s"}`;
      const text = result.steps === 0 ? "wrong without an attack"
        : result.fooled ? `PGD fools it in ${steps}, at distance ${result.distance.toFixed(4)}` : `PGD does not fool it in ${steps}`;
      show(image, result.x, change, "change, ± S", start, net.probabilities(result.x), text);
    }
    await drawRadii(x, label, key, wanted);
  }

  async function drawRadii(x, label, key, wanted) {
    const keyOf = (name) => `radius ${name} ${label} ${key}`;
    const tell = (name, value) => {
      const radius = value === 0 ? "0 (wrong already)" : value === Infinity ? "never fooled, up to 1" : value.toFixed(4);
      const curve = models.find((m) => m.name === name).curve;
      return curve && value > 0 ? `${radius}, larger than for ${percent(below(curve.radii, value))} of its images` : radius;
    };
    const showAll = () => {
      for (const { name, value } of radii) value.textContent = known.has(keyOf(name)) ? tell(name, known.get(keyOf(name))) : "…";
      curves?.mark(models.map((m) => known.get(keyOf(m.name))), model.get("attack") === "FGSM" ? model.get("epsilon") : null);
    };
    showAll();
    for (const { name } of radii) {
      if (known.has(keyOf(name))) continue;
      await breathe();
      const found = await fgsmRadius(network(name), x, label, wanted);
      if (found === null) return;
      known.set(keyOf(name), found);
      showAll();
    }
  }

  const unfollow = follow(model, ["image", "own", "own_label", "model_name", "attack", "epsilon", "step", "radius"], draw);
  return () => {
    turn++;
    unfollow();
  };
}

/** The curves of fig. 9.2: each model's share of images still right against the strength, and where this image's radius lies. */
function curveChart(models) {
  const drawn = models.map((m, i) => ({ ...m.curve, name: m.name, i })).filter((m) => m.radii);
  const most = Math.max(...drawn.map((m) => m.radii[Math.floor(0.98 * (m.radii.length - 1))]));
  const { figure, plot, px, py } = axes({ name: "Relative accuracy against FGSM strength", x: { label: "attack strength ε (pixel range)", low: 0, high: most }, y: { label: "relative accuracy", low: 0, high: 1 } });
  const marks = svg("g");
  const key = svg("g", { class: "khnb-key" });
  drawn.forEach(({ name, radii, i }, k) => {
    const line = { fill: "none", stroke: SHOWN.colour[i % 4], "stroke-width": 2, "stroke-dasharray": SHOWN.dash[i % 4] };
    plot.append(svg("path", { ...line, d: path([[0, 1], ...radii.map((r, q) => [r, 1 - q / (radii.length - 1)])], px, py) }));
    key.append(svg("line", { ...line, x1: 300, x2: 330, y1: 26 + 18 * k, y2: 26 + 18 * k }), svg("text", { x: 336, y: 30 + 18 * k }, name));
  });
  plot.append(marks);
  figure.append(key);
  const caption = "The curve of each model over the test images that it gets right and is sure of. A dot marks this image's radius, the grey line the strength chosen.";

  function mark(values, epsilon) {
    const found = drawn.filter((m) => values[m.i] > 0 && Number.isFinite(values[m.i]));
    marks.replaceChildren(
      ...(epsilon === null ? [] : [svg("line", { x1: px(epsilon), x2: px(epsilon), y1: py(0), y2: py(1), stroke: "currentColor", "stroke-opacity": 0.5, "stroke-width": 1.5 })]),
      ...found.map((m) => svg("circle", { cx: px(Math.min(values[m.i], most)), cy: py(1 - below(m.radii, values[m.i])), r: 6, fill: SHOWN.colour[m.i % 4], stroke: "currentColor" })));
    figure.setAttribute("aria-label", `Relative accuracy against FGSM strength for ${drawn.map((m) => m.name).join(" and ")}. ` +
      found.map((m) => `This image's radius under ${m.name} is ${values[m.i].toFixed(4)}, where ${percent(1 - below(m.radii, values[m.i]))} of its images are still right.`).join(" "));
  }
  return { figure, caption, mark };
}

/** The middle square of a picture file as C*side*side bytes. Rejects what is no picture. */
async function shrink(file, C, side) {
  const picture = await createImageBitmap(file), edge = Math.min(picture.width, picture.height);
  const canvas = make("canvas", { width: side, height: side }), context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, (picture.width - edge) / 2, (picture.height - edge) / 2, edge, edge, 0, 0, side, side);
  const { data } = context.getImageData(0, 0, side, side), bytes = new Uint8Array(C * side * side);
  for (let i = 0; i < side * side; i++) {
    for (let c = 0; c < C; c++) bytes[c * side * side + i] = C === 3 ? data[4 * i + c] : (data[4 * i] + data[4 * i + 1] + data[4 * i + 2]) / 3;
  }
  return bytes;
}

export default { render };
