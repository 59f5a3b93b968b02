// The Krotov-Hopfield rule in the plane: the winner is pulled to the input, the filter of rank m pushed away.
//
// Comes after common.js (see khnb.widgets.base.module).

const INPUTS = 200, SPREAD = 0.05, REACH = 2;  // inputs; their spread round a clump, in radians; end of the axes
const dot = (a, b) => a.reduce((sum, v, i) => sum + v * b[i], 0);

/** (sum |v|^p)^(1/p) */
export const norm = (v, p) => v.reduce((sum, x) => sum + Math.abs(x) ** p, 0) ** (1 / p);

/** The place on the unit circle of the p-norm in the direction of an angle. */
function onCircle(angle, p) {
  const v = [Math.cos(angle), Math.sin(angle)], size = norm(v, p);
  return v.map((x) => x / size);
}

/** Activities h_k = <W_k, v>_k (eq. 4.3) of all filters for each input: a function of v. */
export function activities(W, p) {
  const synapses = W.map((w) => w.map((x) => Math.sign(x) * Math.abs(x) ** (p - 1)));
  return (v) => synapses.map((s) => dot(s, v));
}

/**
 * The change that inputs V ask of filters W, eqs. 4.3, 4.6 and 4.7 summed over V, eta left out: `khnb.learning.kh_update`.
 * On a tie the lower index ranks higher. Returns {change, pulled, pushed}: which filters the last input moved.
 */
export function khUpdate(W, V, m, delta, p) {
  const change = W.map((w) => w.map(() => 0)), activity = activities(W, p);
  let pulled, pushed;
  for (const v of V) {
    const h = activity(v), order = h.map((_, k) => k).sort((a, b) => h[b] - h[a] || a - b);
    [pulled, pushed] = [order[0], order[m - 1]];
    for (const [k, g] of [[pulled, 1], [pushed, -delta]]) v.forEach((x, i) => { change[k][i] += g * (x - h[k] * W[k][i]); });
  }
  return { change, pulled, pushed };
}

/**
 * Filters that learn: {V, at(t)}, where at(t) is what there is after t steps, {W, batch, pulled, pushed}. A step's summed change is divided
 * by its largest entry and multiplied by the learning rate, which falls to zero along the `last` steps. Inputs, first filters and the order
 * of inputs come from three generators, so that one more filter does not change the rest.
 */
export function learner({ clumps, filters, m, delta, p, eta, batch, seed, last }) {
  const [forInputs, forFilters, forOrder] = [0, 1, 2].map((i) => random(3 * seed + i));
  const normal = (draw) => Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw());
  const V = Array.from({ length: INPUTS }, () => {
    const clump = clumps[Math.floor(clumps.length * forInputs())];
    return onCircle(clump + SPREAD * normal(forInputs), p);
  });
  const states = [{ W: Array.from({ length: filters }, () => [normal(forFilters), normal(forFilters)]), batch: [] }];
  function step() {
    const { W } = states.at(-1), chosen = Array.from({ length: batch }, () => Math.floor(INPUTS * forOrder()));
    const { change, ...moved } = khUpdate(W, chosen.map((i) => V[i]), m, delta, p);
    const rate = (eta * (1 - (states.length - 1) / last)) / Math.max(1e-12, ...change.flat().map(Math.abs));
    states.push({ W: W.map((w, k) => w.map((x, i) => x + rate * change[k][i])), batch: chosen, ...moved });
  }
  return { V, at: (t) => { while (states.length <= t) step(); return states[t]; } };
}

function render({ model, el }) {
  const header = model.get("header"), last = header.steps.max;
  const names = ["inputs", "filters", "m", "delta", "p", "eta", "batch", "seed", "steps"];
  const digits = (count) => (v) => v.toFixed(count);
  const controls = [
    choice(model, "inputs", "Inputs", Object.keys(header.clumps)),
    slider(model, "filters", "Filters", header.filters),
    slider(model, "m", "Rank m", header.m),
    slider(model, "delta", "Strength Δ", { ...header.delta, text: digits(2) }),
    slider(model, "p", "Norm p", { ...header.p, text: digits(1) }),
    slider(model, "eta", "Rate η", { ...header.eta, text: digits(3) }),
    slider(model, "batch", "Inputs a step", header.batch),
    slider(model, "seed", "Seed", header.seed),
    player(model, "steps", "Step", { last: () => last, summary: () => summary, stride: 2, every: 40 }),
  ];
  // Fewer filters have fewer ranks. First in line, so that no picture asks for one that is not there.
  const rank = () => Math.min(model.get("m"), model.get("filters"));
  const picture = make("div", { class: "khnb-panel" }), body = make("tbody");
  const head = make("tr", {}, ...["filter", "norm", `wins of ${INPUTS}`, "state"].map((text) => make("th", { scope: "col" }, text)));
  const table = make("table", { class: "khnb-table" }, make("thead", {}, head), body);
  const note = make("p", { class: "khnb-note" }, "Thin lines: the way they came. Dashed, with a hollow head: wins nothing.");
  const summary = frame(el, controls.map(({ field }) => field), [picture, make("div", {}, table, note)]);
  const colours = [...["blue", "vermilion", "green", "orange", "sky", "purple", "grey"].map((name) => COLOURS[name]), "currentColor"];

  let learns, known;
  function current() {
    const asked = Object.fromEntries(names.map((name) => [name, model.get(name)]));
    const key = JSON.stringify({ ...asked, steps: 0 });
    if (key !== known) learns = learner({ ...asked, m: rank(), clumps: header.clumps[asked.inputs], last });
    known = key;
    return { ...asked, ...learns };
  }

  function draw() {
    controls[2].input.max = Math.min(header.m.max, model.get("filters"));
    if (rank() < model.get("m")) { model.set("m", rank()); model.save_changes(); }
    controls.forEach((part) => part.show());
    const { V, at: stateAt, steps, p, batch, delta, m } = current(), now = stateAt(steps), single = batch === 1 && steps > 0;
    const wins = now.W.map(() => 0), away = now.W.map(() => true), activity = activities(now.W, p);
    for (const v of V) {
      const h = activity(v);
      wins[h.indexOf(Math.max(...h))]++;
      h.forEach((x, k) => { if (x > 0) away[k] = false; });
    }
    const norms = now.W.map((w) => norm(w, p)), unit = (size) => Math.abs(size - 1) < 0.02, settled = norms.filter(unit).length;

    const [x, y] = ["first weight", "second weight"].map((label) => ({ label, low: -REACH, high: REACH }));
    const name = "Inputs on the unit circle of the norm, and filters as arrows from the middle";
    const { figure, plot, px, py } = axes({ name, width: 380, height: 366, x, y });
    const circle = Array.from({ length: 181 }, (_, i) => onCircle((i * Math.PI) / 90, p));
    plot.append(svg("path", { d: path(circle, px, py), class: "khnb-guide" }));
    for (const [x, y] of V) plot.append(svg("circle", { cx: px(x), cy: py(y), r: 2, class: "khnb-dot" }));
    const tags = [];
    now.W.forEach((w, k) => {
      const x = px(w[0]), y = py(w[1]), turn = Math.atan2(y - py(0), x - px(0)), dead = wins[k] === 0, stroke = colours[k];
      const trail = Array.from({ length: steps + 1 }, (_, t) => stateAt(t).W[k]);
      const sign = !single ? "" : k === now.pulled ? " +" : k === now.pushed ? " −" : "";
      plot.append(
        svg("path", { d: path(trail, px, py), fill: "none", stroke, "stroke-width": 1.2, opacity: 0.7 }),
        svg("path", { d: `M${px(0)} ${py(0)}L${x} ${y}`, stroke, "stroke-width": 2.5, ...(dead ? { "stroke-dasharray": "5 4" } : {}) }),
        svg("path", {
          d: "M0 0L-11 -5L-11 5Z", transform: `translate(${x} ${y}) rotate(${(turn * 180) / Math.PI})`,
          fill: dead ? "none" : stroke, stroke, "stroke-width": 1.5,
        }),
      );
      const free = ([a, b]) => tags.every(({ place }) => Math.hypot(place[0] - a, place[1] - b) > 12);
      const at = (far, aside) => [x + far * Math.cos(turn + aside), y + far * Math.sin(turn + aside)];
      const places = [11, 22, 33].flatMap((far) => [0, 0.9, -0.9, 1.8, -1.8].map((aside) => at(far, aside)));
      tags.push({ text: `${k + 1}${sign}`, place: places.find(free) ?? places[0] });
    });
    for (const { text, place } of tags) plot.append(svg("text", { x: place[0], y: place[1] + 4, "text-anchor": "middle", class: "khnb-tag" }, text));
    if (single) plot.append(svg("circle", { cx: px(V[now.batch[0]][0]), cy: py(V[now.batch[0]][1]), r: 7, class: "khnb-ring" }));
    picture.replaceChildren(figure);

    body.replaceChildren(...now.W.map((_, k) => {
      const swatch = make("span", { class: "khnb-swatch", style: `background: ${colours[k]}` });
      const state = wins[k] ? (unit(norms[k]) ? "settled" : "moving") : away[k] ? "points away from all" : "wins nothing";
      const cells = [norms[k].toFixed(3), wins[k], state].map((text) => make("td", {}, String(text)));
      return make("tr", {}, make("th", { scope: "row" }, swatch, ` ${k + 1}`), ...cells);
    }));
    const dead = wins.filter((count) => count === 0).length, lost = away.filter(Boolean).length, F = wins.length;
    const one = single ? ` The last input pulled filter ${now.pulled + 1} and pushed filter ${now.pushed + 1} away.` : "";
    const fate = lost === 0 ? "" : `, ${lost} of them pointing away from every input`;
    const found = `${settled} of ${F} filters have norm 1 (within 0.02), ${dead} win no input${fate}`;
    summary.textContent = `After ${steps} of ${last} steps with Δ = ${delta.toFixed(2)} and m = ${m}: ${found}.${one}`;
  }

  const unfollow = follow(model, names, draw);
  return () => { controls.at(-1).stop(); unfollow(); };
}

export default { render };
