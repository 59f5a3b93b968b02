// The attack lab: a small network and its attacks, computed in the page.
//
// Comes after common.js (see khnb.widgets.base.module). The first half computes (float64 throughout) and touches no page, so
// that it can be tested on its own; the second half draws.

// --------------------------------------------------------------------------------------------------------- the model

/**
 * A network of one convolution, max-pooling, sigma(.)^n and a linear classifier, from its header and the packed bytes.
 *
 * header: filters {offset, scale, shape [F, C, w, w]}: what an image is convolved with; norm: p of the patch norm, or
 * null for none; bias: F numbers or null; linear {offset, scale, shape [classes, features]}; linear_bias; side; sigma, n,
 * w_pool, s_pool. An image is C*side*side numbers in [0, 1]: channel, row, column.
 *
 * Returns {logits(x), probabilities(x), guess(x), gradient(x, label)}; the gradient is that of the cross-entropy.
 */
export function makeNetwork(header, packed) {
  const bytes = toBytes(packed);
  const take = ({ offset, scale, shape }) => decodeHalf(bytes, offset, shape.reduce((a, b) => a * b, 1), scale);
  const [F, C, w] = header.filters.shape, classes = header.linear.shape[0], features = header.linear.shape[1];
  const { side, n, norm: p, w_pool: wPool, s_pool: sPool } = header;
  const D = C * w * w, filters = new Float64Array((F + 1) * D);  // one empty filter at the end: they go in pairs
  filters.set(take(header.filters));
  const linear = new Float64Array(classes * features);  // a feature's weights side by side
  take(header.linear).forEach((v, i) => { linear[(i % features) * classes + Math.floor(i / features)] = v; });
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
    if (p) for (let at = 0; at < places; at++) map[at] /= norms[at];
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

function render({ model, el }) {
  const { models, shape, labels, classes, max_steps: maxSteps } = model.get("header");
  const weights = model.get("weights"), pixels = toBytes(model.get("pixels"));
  const [N, C, side] = shape, size = C * side * side;
  const imageAt = (i) => Float64Array.from(pixels.subarray(i * size, (i + 1) * size), (v) => v / 255);
  const imageName = (i) => `${classes[labels[i]]}, image ${i + 1} of ${N}`;
  const set = (name, value) => { model.set(name, value); model.save_changes(); };

  const networks = new Map();
  const network = (name) => {
    if (!networks.has(name)) networks.set(name, makeNetwork(models.find((m) => m.name === name), weights));
    return networks.get(name);
  };
  const modelName = () => (models.find((m) => m.name === model.get("model_name")) ?? models[0]).name;
  const imageIndex = () => Math.min(Math.max(model.get("image"), 0), N - 1);

  // ------------------------------------------------------------------------------------------------------- the parts
  const modelSelect = choice(model, "model_name", "Model", models.map((m) => m.name)), attackSelect = choice(model, "attack", "Attack", ["FGSM", "PGD"]);
  const digits = (count) => (value) => value.toFixed(count);
  const strength = slider(model, "epsilon", "Strength ε", { min: 0, max: 0.1, step: 0.0005, text: digits(4) });
  const ofPgd = [
    slider(model, "step", "Step", { min: 0.0005, max: 0.01, step: 0.0005, text: digits(4) }),
    slider(model, "radius", "Radius", { min: 0.001, max: 0.14, step: 0.001, text: digits(3) }),
  ];

  const thumbs = Array.from({ length: N }, (_, i) => {
    const canvas = make("canvas", { "aria-hidden": "true" });
    paint(canvas, rgba(imageAt(i), C), side);
    const button = make("button", { type: "button", "aria-label": imageName(i), title: imageName(i) }, canvas);
    button.addEventListener("click", () => set("image", i));
    return button;
  });
  const gallery = make("div", { class: "khnb-thumbs", role: "group", "aria-label": "Test image; move with the arrow keys" }, ...thumbs);
  gallery.addEventListener("keydown", (event) => {
    const at = imageIndex();
    const to = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: N - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (!thumbs[to]) return;
    set("image", to);
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
  const summary = make("p", { class: "khnb-summary", "aria-live": "polite" });

  el.classList.add("khnb-widget");
  el.replaceChildren(make("div", { class: "khnb-attack" },
    gallery,
    make("div", { class: "khnb-controls" }, ...[modelSelect, attackSelect, strength, ...ofPgd].map((part) => part.field)),
    make("div", { class: "khnb-panels" },
      make("div", { class: "khnb-pictures" },
        make("div", { class: "khnb-row" }, ...pictures.map((p) => p.figure)),
        make("p", { class: "khnb-note" }, "Adversarial radius of this image (FGSM), in units of the pixel range:"), radiusList),
      make("div", { class: "khnb-chart" }, chart)),
    summary));

  // --------------------------------------------------------------------------------------------------- what they show
  const known = new Map();  // results that stay true: starting points and radii, by model and image
  const remember = (key, compute) => {
    if (!known.has(key)) known.set(key, compute());
    return known.get(key);
  };

  function show(x, attacked, perturbation, caption, start, now, text) {
    const label = labels[imageIndex()];
    [[x, "original"], [perturbation, caption], [attacked, "attacked image"]].forEach(([picture, name], i) => {
      paint(pictures[i].canvas, rgba(picture, C), side);
      pictures[i].canvas.setAttribute("aria-label", i === 0 ? `original: ${imageName(imageIndex())}` : name);
      pictures[i].caption.textContent = name;
    });
    const top = now.indexOf(Math.max(...now));
    bars.forEach((bar, c) => {
      bar.fill.style.width = percent(now[c]).replace(" ", "");
      bar.before.style.left = percent(start[c]).replace(" ", "");
      bar.value.textContent = percent(now[c]);
      bar.label.textContent = c === label ? `${classes[c]} (true)` : classes[c];
      bar.row.className = c === label ? "khnb-true" : c === top ? "khnb-wrong" : "";
    });
    const verdict = top === label ? "right" : "wrong";
    summary.textContent = `${modelName()} on ${imageName(imageIndex())}: ${text}. It answers ${classes[top]} (${percent(now[top])}), which is ${verdict}.`;
  }

  let turn = 0;  // a newer turn makes older computations stop

  async function draw() {
    const mine = ++turn, wanted = () => mine === turn;
    const name = modelName(), i = imageIndex(), net = network(name), x = imageAt(i), label = labels[i], attack = model.get("attack");
    [modelSelect, attackSelect, strength, ...ofPgd].forEach((part) => part.show());
    strength.field.hidden = attack !== "FGSM";
    ofPgd.forEach((part) => { part.field.hidden = attack !== "PGD"; });
    thumbs.forEach((thumb, k) => { thumb.setAttribute("aria-pressed", k === i); thumb.tabIndex = k === i ? 0 : -1; });
    const { start, direction } = remember(`start ${name} ${i}`, () => ({ start: net.probabilities(x), direction: net.gradient(x, label).map(Math.sign) }));

    if (attack === "FGSM") {
      const eps = model.get("epsilon"), attacked = move(x, direction, eps);
      show(x, attacked, direction.map((v) => (v + 1) / 2), "sign of the gradient", start, net.probabilities(attacked), `FGSM with ε = ${eps.toFixed(4)}`);
    } else {
      summary.textContent = `PGD is at work on ${imageName(i)} …`;
      const bound = model.get("radius");
      const result = await pgd(net, x, label, { step: model.get("step"), radius: bound, maxSteps }, wanted);
      if (!result) return;
      const change = result.x.map((v, k) => 0.5 + (0.5 * (v - x[k])) / bound);
      const steps = `${result.steps} step${result.steps === 1 ? "" : "s"}`;
      const text = result.steps === 0 ? "wrong without an attack"
        : result.fooled ? `PGD fools it in ${steps}, at distance ${result.distance.toFixed(4)}` : `PGD does not fool it in ${steps}`;
      show(x, result.x, change, "change, ± radius", start, net.probabilities(result.x), text);
    }
    await drawRadii(i, x, label, wanted);
  }

  async function drawRadii(i, x, label, wanted) {
    const tell = (value) => (value === 0 ? "0 (wrong already)" : value === Infinity ? "never fooled, up to 1" : value.toFixed(4));
    for (const { name, value } of radii) {
      const key = `radius ${name} ${i}`;
      value.textContent = known.has(key) ? tell(known.get(key)) : "…";
    }
    for (const { name, value } of radii) {
      const key = `radius ${name} ${i}`;
      if (known.has(key)) continue;
      await breathe();
      const found = await fgsmRadius(network(name), x, label, wanted);
      if (found === null) return;
      known.set(key, found);
      value.textContent = tell(found);
    }
  }

  const unfollow = follow(model, ["image", "model_name", "attack", "epsilon", "step", "radius"], draw);
  return () => {
    turn++;
    unfollow();
  };
}

export default { render };
