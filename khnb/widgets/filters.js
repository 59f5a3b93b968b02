// The filter explorer: a grid of filters, their history, and one neuron enlarged.
//
// Comes after common.js (see khnb.widgets.base.module).

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

/** One filter (C, w, w) as RGBA pixels, scaled to its own range as in fig. 8.1. */
export const tile = (weight, channels) => rgba(weight, channels, Math.min(...weight), Math.max(...weight));

/** A weight in [-1, 1] as a colour: blue below zero, white at zero, vermilion above. */
export function diverging(value) {
  const end = value < 0 ? [0, 114, 178] : [213, 94, 0], share = Math.min(1, Math.abs(value));
  return end.map((v) => Math.round(255 + share * (v - 255)));
}

function render({ model, el }) {
  const header = model.get("header"), bytes = toBytes(model.get("weights"));
  const chosen = () => header.models.find((m) => m.name === model.get("model_name")) ?? header.models[0];
  const epochAt = (m) => {
    const last = m.shape[0] - 1, at = model.get("epoch");
    return at < 0 || at > last ? last : at;
  };
  const weightOf = (m, e, f) => {
    const size = m.shape[2] * m.shape[3] * m.shape[4];
    return decodeHalf(bytes, m.offset + 2 * (e * m.shape[1] + f) * size, size, m.scale[e][f]);
  };
  const epochText = () => String(chosen().epochs?.[epochAt(chosen())] ?? "");
  const columnsOf = (m) => Math.ceil(Math.sqrt(m.shape[1]));
  const neuronOf = (m) => Math.min(Math.max(model.get("neuron"), 0), m.shape[1] - 1);
  const column = (x) => (x < LETTERS.length ? LETTERS[x] : column(Math.floor(x / 26) - 1) + LETTERS[x % 26]);
  const nameOf = (m, f) => `${column(f % columnsOf(m))}${Math.floor(f / columnsOf(m)) + 1}`;
  const set = (name, value) => { model.set(name, value); model.save_changes(); };

  // ------------------------------------------------------------------------------------------------------- the parts
  const select = choice(model, "model_name", "Model", header.models.map((m) => m.name));
  const time = slider(model, "epoch", "After epoch", { min: 0, step: 1, max: 0, text: () => epochText() });
  const grid = make("div", { role: "grid", class: "khnb-grid" });
  const score = make("p", { class: "khnb-note" });
  const title = make("h4", { class: "khnb-title" });
  const picture = make("canvas", { role: "img" }), channels = make("div", { class: "khnb-row" });
  const bar = make("canvas", { class: "khnb-bar", "aria-hidden": "true" });
  const ends = make("div", { class: "khnb-ends" });
  const facts = make("dl", { class: "khnb-facts" });
  const summary = make("p", { class: "khnb-summary", "aria-live": "polite" });

  el.classList.add("khnb-widget");
  el.replaceChildren(make("div", { class: "khnb-filters" },
    make("div", { class: "khnb-controls" }, select.field, time.field),
    make("div", { class: "khnb-panels" },
      make("div", { class: "khnb-gridbox" }, grid, score),
      make("div", { class: "khnb-detail" }, title,
        make("div", { class: "khnb-row" }, make("figure", {}, picture, make("figcaption", {}, "as in the grid")), channels),
        make("div", { class: "khnb-scale" }, bar, ends, make("p", { class: "khnb-note" }, "weight: one scale for all channels")),
        facts)),
    summary));

  const pixels = new Uint8ClampedArray(4 * 101);
  for (let i = 0; i <= 100; i++) pixels.set([...diverging((i - 50) / 50), 255], 4 * i);
  paint(bar, pixels, 101);

  // ------------------------------------------------------------------------------------------------------- the grid
  let cells = [], shown = null;

  function build(m) {
    shown = m.name;
    const K = columnsOf(m);
    grid.style.setProperty("--columns", K);
    grid.setAttribute("aria-label", `${m.shape[1]} filters of ${m.name}; move with the arrow keys`);
    grid.setAttribute("aria-rowcount", Math.ceil(m.shape[1] / K) + 1);
    grid.setAttribute("aria-colcount", K + 1);
    const heads = make("div", { role: "row" }, make("span", { role: "columnheader", "aria-label": "row" }));
    for (let x = 0; x < K; x++) heads.append(make("span", { role: "columnheader" }, column(x)));
    cells = [];
    const rows = [heads];
    for (let f = 0; f < m.shape[1]; f++) {
      if (f % K === 0) rows.push(make("div", { role: "row" }, make("span", { role: "rowheader" }, String(f / K + 1))));
      const cell = make("div", { role: "gridcell", tabindex: -1, "aria-label": nameOf(m, f) }, make("canvas", { "aria-hidden": "true" }));
      cell.addEventListener("click", () => set("neuron", f));
      rows.at(-1).append(cell);
      cells.push(cell);
    }
    grid.replaceChildren(...rows);
  }

  grid.addEventListener("keydown", (event) => {
    const m = chosen(), to = arrow(event, neuronOf(m), columnsOf(m), cells.length);
    if (to === undefined) return;
    set("neuron", to);
    cells[to].focus();
  });

  const isFeature = (m, e, f) => m.smallest[e][f] > 0 && Math.abs(m.norms[e][f] - 1) < header.tolerance;

  function drawGrid() {
    const m = chosen(), e = epochAt(m), [, , C, w] = m.shape;
    if (shown !== m.name) build(m);
    select.show();
    time.field.hidden = m.shape[0] < 2;
    time.input.max = m.shape[0] - 1;
    time.show();
    time.input.value = e;
    cells.forEach((cell, f) => paint(cell.firstChild, tile(weightOf(m, e, f), C), w));
    const good = cells.filter((_, f) => isFeature(m, e, f)).length;
    score.textContent = `${good} of ${cells.length} filters are features: no weight below or at zero, ` +
      `norm within ${header.tolerance} of 1.`;
    drawNeuron();
  }

  // ------------------------------------------------------------------------------------------------------ the neuron
  function drawNeuron() {
    const m = chosen(), e = epochAt(m), f = neuronOf(m), [, , C, w] = m.shape;
    cells.forEach((cell, i) => {
      cell.tabIndex = i === f ? 0 : -1;
      cell.setAttribute("aria-selected", i === f);
    });
    const weight = weightOf(m, e, f), most = Math.max(...weight.map(Math.abs)) || 1;
    title.textContent = `Neuron ${nameOf(m, f)}`;
    paint(picture, tile(weight, C), w);
    picture.setAttribute("aria-label", `filter ${nameOf(m, f)} as a colour picture`);
    channels.replaceChildren(...Array.from({ length: C }, (_, c) => {
      const name = C === 3 ? ["red", "green", "blue"][c] : "weights", canvas = make("canvas", { role: "img", "aria-label": `${name} weights` });
      const part = weight.subarray(c * w * w, (c + 1) * w * w), pixels = new Uint8ClampedArray(4 * w * w);
      part.forEach((v, i) => pixels.set([...diverging(v / most), 255], 4 * i));
      paint(canvas, pixels, w);
      return make("figure", {}, canvas, make("figcaption", {}, name));
    }));
    ends.replaceChildren(...[-most, 0, most].map((v) => make("span", {}, v === 0 ? "0" : readable(v.toPrecision(2)))));
    const norm = m.norms[e][f], smallest = m.smallest[e][f], feature = isFeature(m, e, f);
    const last = e === m.shape[0] - 1;
    const entries = {
      [`${m.p}-norm`]: norm.toFixed(6),
      "smallest weight": `${readable(smallest.toPrecision(3))} (${smallest > 0 ? "all positive" : smallest < 0 ? "some negative" : "some zero"})`,
      "feature": feature ? "yes" : "no",
      "win rate": !m.wins ? "not recorded" : last ? `${(100 * m.wins[f]).toFixed(2)} % of patches` : "recorded for the last epoch only",
    };
    facts.replaceChildren(...Object.entries(entries).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
    summary.textContent = `${m.name}${m.epochs ? `, after epoch ${m.epochs[e]}` : ""}: neuron ${nameOf(m, f)} has ${m.p}-norm ` +
      `${norm.toFixed(4)} and smallest weight ${readable(smallest.toPrecision(2))}; it is ${feature ? "a feature" : "not a feature"}.`;
  }

  return follow(model, ["model_name", "epoch", "neuron"], drawGrid);
}

export default { render };
