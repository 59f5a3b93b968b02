// A binary Hopfield network that recalls letters.
//
// Comes after common.js (see khnb.widgets.base.module).

const SIDE = 8, N = SIDE * SIDE;
const range = (count) => Array.from({ length: count }, (_, i) => i);

/** Letters as text, # and ., as numbers 1 and -1, and back. */
export const spins = (text) => Array.from(text, (c) => (c === "#" ? 1 : -1));
const textOf = (state) => state.map((s) => (s > 0 ? "#" : ".")).join("");

/** T_ij = sum over patterns of xi_i xi_j (eq. 4.1). */
export const weights = (patterns) => range(N).map((i) => range(N).map((j) => patterns.reduce((sum, xi) => sum + xi[i] * xi[j], 0)));

/** E = -1/2 sum over i and j of sigma_i T_ij sigma_j (eq. 4.1). */
export const energy = (T, state) => -0.5 * state.reduce((sum, s, i) => sum + s * T[i].reduce((h, t, j) => h + t * state[j], 0), 0);

/** Overlap of a state with a pattern, in [-1, 1]. */
export const overlap = (state, pattern) => state.reduce((sum, s, i) => sum + s * pattern[i], 0) / N;

const flipped = (state, i) => state.map((s, j) => (j === i ? -s : s));

function shuffled(draw) {
  const order = range(N);
  for (let i = N - 1; i > 0; i--) {
    const j = Math.floor((i + 1) * draw());
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

/** A pattern with a share of its pixels flipped; a larger share flips the same ones and more. */
export function noisy(pattern, share, seed) {
  return shuffled(random(2 * seed)).slice(0, Math.round(share * N)).reduce(flipped, pattern);
}

/**
 * Recall: one neuron at a time takes the sign that lowers the energy, given the others; on a tie it stays. Each sweep visits all of them in a
 * new order, and a sweep that changes nothing is the last. Returns a list of {state, energy, neuron}, the start first.
 */
export function recall(T, start, seed) {
  const draw = random(2 * seed + 1), steps = [{ state: start, energy: energy(T, start), neuron: -1 }];
  for (let changed = true; changed;) {
    changed = false;
    for (const i of shuffled(draw)) {
      const { state, energy: before } = steps.at(-1), field = T[i].reduce((h, t, j) => h + t * state[j], 0) - T[i][i] * state[i];
      if (field * state[i] >= 0) { steps.push({ state, energy: before, neuron: i }); continue; }
      steps.push({ state: flipped(state, i), energy: before + 2 * field * state[i], neuron: i });
      changed = true;
    }
  }
  return steps;
}

function render({ model, el }) {
  const header = model.get("header"), letters = header.letters.map(({ name, pixels }) => ({ name, pattern: spins(pixels) }));
  const patternOf = (name) => letters.find((letter) => letter.name === name).pattern;
  const start = () => (model.get("start") ? spins(model.get("start")) : noisy(patternOf(model.get("letter")), model.get("noise"), model.get("seed")));
  let known, course;
  const steps = () => {
    const key = ["stored", "start", "letter", "noise", "seed"].map((name) => model.get(name)).join();
    if (key !== known) course = recall(weights(letters.slice(0, model.get("stored")).map(({ pattern }) => pattern)), start(), model.get("seed"));
    known = key;
    return course;
  };
  const last = () => steps().length - 1;
  const begin = (text) => { updates.stop(); model.set("updates", 0); model.set("start", text); model.save_changes(); };

  const stored = slider(model, "stored", "Stored", { ...header.stored, text: (v) => (v === 1 ? "1 letter" : `${v} letters`) });
  const letter = choice(model, "letter", "Start from", letters.map(({ name }) => name));
  const noise = slider(model, "noise", "Pixels flipped", { ...header.noise, text: (v) => `${Math.round(v * N)} of ${N}` });
  const seed = slider(model, "seed", "Seed", header.seed);
  const updates = player(model, "updates", "Updates", { last, summary: () => summary, every: 30 });
  for (const { input } of [letter, noise, seed]) input.addEventListener("input", () => begin(""));  // own pixels are given up

  const pixels = range(N).map((i) => button("", () => begin(textOf(flipped(steps()[updates.at()].state, i)))));
  const board = make("div", { role: "group", class: "khnb-board", "aria-label": "Pixels; move with the arrow keys, flip with the space bar" }, ...pixels);
  let focus = 0;
  board.addEventListener("keydown", (event) => {
    const to = arrow(event, focus, SIDE, N);
    if (to !== undefined) pixels[to].focus();
  });
  pixels.forEach((pixel, i) => {
    pixel.className = "khnb-pixel";
    pixel.addEventListener("focus", () => { pixels[focus].tabIndex = -1; pixel.tabIndex = 0; focus = i; });
    pixel.tabIndex = i === 0 ? 0 : -1;
  });
  const chart = make("div", { class: "khnb-panel" }), body = make("tbody");
  const rows = letters.map(({ name, pattern }) => {
    const thumb = make("canvas", { "aria-hidden": "true", class: "khnb-thumb" }), value = make("td");
    const bar = make("span", { class: "khnb-signed" }, make("span"));
    paint(thumb, rgba(pattern.map((s) => -s), 1, -1, 1), SIDE);
    return { bar: bar.firstChild, value, row: make("tr", {}, make("th", { scope: "row" }, thumb, ` ${name}`), make("td", {}, bar), value) };
  });
  body.append(...rows.map(({ row }) => row));
  const table = make("table", { class: "khnb-table" }, make("caption", {}, "Overlap, from −1 to 1, with"), body);
  const summary = frame(el, [stored.field, letter.field, noise.field, seed.field, updates.field],
    [make("figure", {}, board, make("figcaption", {}, "flip pixels: click, or arrow keys and space")), chart, table]);

  function draw() {
    const t = updates.at(), all = steps(), { state, energy: now, neuron } = all[t], count = model.get("stored");
    [stored, letter, noise, seed, updates].forEach((part) => part.show());
    pixels.forEach((pixel, i) => {
      pixel.setAttribute("aria-pressed", state[i] > 0);
      pixel.setAttribute("aria-label", `row ${Math.floor(i / SIDE) + 1}, column ${(i % SIDE) + 1}${i === neuron ? ", updated last" : ""}`);
      pixel.classList.toggle("khnb-last", i === neuron);
    });

    const energies = all.map((step) => step.energy), low = energies.at(-1), high = energies[0], room = Math.max(0.06 * (high - low), 10);
    const { figure, plot, px, py } = axes({
      name: `Energy, from ${readable(high)} at the start to ${readable(now)}`, width: 310, height: 240,
      x: { label: "updates", low: 0, high: 1.04 * last() }, y: { label: "energy E", low: low - room, high: high + room },
    });
    plot.append(
      svg("path", { d: path(energies.slice(0, t + 1).map((e, i) => [i, e]), px, py), fill: "none", stroke: COLOURS.blue, "stroke-width": 2.5 }),
      svg("circle", { cx: px(t), cy: py(now), r: 5, fill: COLOURS.vermilion, stroke: "currentColor" }),
    );
    chart.replaceChildren(figure);

    const overlaps = letters.map(({ pattern }) => overlap(state, pattern));
    rows.forEach(({ bar, value, row }, i) => {
      row.hidden = i >= count;
      bar.style.left = `${50 + 50 * Math.min(overlaps[i], 0)}%`;
      bar.style.width = `${50 * Math.abs(overlaps[i])}%`;
      value.textContent = readable(overlaps[i].toFixed(2));
    });
    const kept = overlaps.slice(0, count), best = kept.reduce((b, v, i) => (Math.abs(v) > Math.abs(kept[b]) ? i : b), 0);
    const { name } = letters[best];
    const near = `The nearest stored pattern is ${name}, at overlap ${readable(kept[best].toFixed(2))}`;
    const verdict = t < last() ? `${near}.` : kept[best] === 1 ? `It has settled on ${name}, exactly.`
      : kept[best] === -1 ? `It has settled on the negative of ${name}, which has the same energy.` : `It has settled on a mixture that was never stored. ${near}.`;
    const [network, when] = [`${count === 1 ? "1 pattern" : `${count} patterns`} in ${N} neurons`, `After ${t} of ${last()} updates`];
    summary.textContent = `${network}. ${when} the energy is ${readable(now)} (${readable(high)} at the start). ${verdict}`;
  }

  const unfollow = follow(model, ["stored", "letter", "noise", "seed", "start", "updates"], draw);
  return () => { updates.stop(); unfollow(); };
}

export default { render };
