// The filter explorer: one or two grids of filters, their history, one neuron of each enlarged, and the patches that excite it.
//
// Comes after common.js (see khnb.widgets.base.module).

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", TYPES = { f4: Float32Array, f8: Float64Array, u1: Uint8Array, u4: Uint32Array };

/** Little-endian numbers as khnb.widgets.filters packs them: `kind` is f4, f8, u1 or u4. */
export function unpack(bytes, { kind, offset, length }) {
  const type = TYPES[kind];
  return new type(bytes.slice(offset, offset + length * type.BYTES_PER_ELEMENT).buffer);
}

/** One filter (C, w, w) as RGBA pixels, scaled to its own range as in fig. 8.1. */
export const tile = (weight, channels) => rgba(weight, channels, Math.min(...weight), Math.max(...weight));

/** A weight in [-1, 1] as a colour: blue below zero, white at zero, vermilion above. */
export function diverging(value) {
  const end = value < 0 ? [0, 114, 178] : [213, 94, 0], share = Math.min(1, Math.abs(value));
  return end.map((v) => Math.round(255 + share * (v - 255)));
}

/** The name of a column: A to Z, then AA. */
export const column = (x) => (x < LETTERS.length ? LETTERS[x] : column(Math.floor(x / 26) - 1) + LETTERS[x % 26]);

const signOf = (smallest, largest) => {
  if (smallest > 0) return "all positive";
  if (largest < 0) return "all negative";
  return smallest < 0 ? "some negative" : "none negative, some zero";
};

const thousands = (number) => String(number).replace(/\B(?=(\d{3})+$)/g, ",");

/** A tolerance as the book writes it: 1e-4. */
const short = (tolerance) => readable(tolerance.toExponential(0));

/** A layer with all its numbers read: what there is to know of filter f after the e-th of its epochs. */
function makeLayer(header, bytes) {
  const { name, kind, p, shape, epochs, tolerances, patches } = header, [E, F, C, w] = shape, D = C * w * w;
  const { weights, ...others } = header.parts;
  const read = Object.fromEntries(Object.entries(others).map(([part, place]) => [part, unpack(bytes, place)]));
  const columns = Math.ceil(Math.sqrt(F));
  return {
    name, kind, p, C, w, F, epochs, columns, last: E - 1, patches, read,
    tolerances: (e) => tolerances[e],
    rows: Math.ceil(F / columns),
    nameOf: (f) => `${column(f % columns)}${Math.floor(f / columns) + 1}`,
    weight: (e, f) => decodeHalf(bytes, weights.offset + 2 * (e * F + f) * D, D, read.scale[e * F + f]),
    norm: (e, f) => read.norms[e * F + f],
    range: (e, f) => [read.smallest[e * F + f], read.largest[e * F + f]],
    isFeature: (e, f, tolerance) => read.smallest[e * F + f] > 0 && Math.abs(read.norms[e * F + f] - 1) < tolerance,
    count: (e, test) => Array.from({ length: F }, (_, f) => test(e, f)).filter(Boolean).length,
    patch: (f, i) => read.pixels.subarray((f * patches + i) * D, (f * patches + i + 1) * D),
    answer: (f, i, data) => ({ kind: data.classes[read.label[f * patches + i]], activity: readable(read.activity[f * patches + i].toPrecision(3)) }),
    when: (e) => (epochs ? `after epoch ${epochs[e]}` : "trained"),
  };
}

/** A grid of filters and one of them enlarged. `choose(f)` is called with the neuron that the reader wants. */
function makeView(data, choose) {
  const heading = make("h4", { class: "khnb-title" }), grid = make("div", { role: "grid", class: "khnb-grid" });
  const score = make("p", { class: "khnb-note" });
  const title = make("h5", { class: "khnb-title khnb-neuron" });
  const steps = [["previous neuron", "‹", -1], ["next neuron", "›", 1]].map(([name, sign, by]) =>
    ({ button: button(sign, () => choose(neuron + by), { "aria-label": name, title: name }), by }));
  const pictures = make("div", { class: "khnb-channels" });
  const bar = make("canvas", { "aria-hidden": "true" }), ends = make("div", { class: "khnb-ends" });
  const facts = make("dl", { class: "khnb-facts" });
  const excited = make("div", { class: "khnb-excited" });
  const node = make("section", { class: "khnb-view" },
    heading,
    make("div", { class: "khnb-gridbox" }, grid, score),
    make("div", { class: "khnb-detail" },
      make("div", { class: "khnb-row khnb-which" }, title, ...steps.map((step) => step.button)),
      pictures,
      make("div", { class: "khnb-scale" }, bar, ends, make("p", { class: "khnb-note" }, "weight; one scale for the three channels")),
      facts, excited));
  const scaleNote = node.querySelector(".khnb-scale p");

  const pixels = new Uint8ClampedArray(4 * 101);
  for (let i = 0; i <= 100; i++) pixels.set([...diverging((i - 50) / 50), 255], 4 * i);
  paint(bar, pixels, 101);

  let layer = null, neuron = 0, cells = [], painted = -1;

  function build() {
    const { F, columns, rows, name, nameOf } = layer;
    grid.style.setProperty("--columns", columns);
    grid.setAttribute("aria-label", `${F} filters of ${name}; move with the arrow keys`);
    grid.setAttribute("aria-rowcount", rows + 1);
    grid.setAttribute("aria-colcount", columns + 1);
    const heads = make("div", { role: "row" }, make("span", { role: "columnheader", "aria-label": "row" }));
    for (let x = 0; x < columns; x++) heads.append(make("span", { role: "columnheader" }, column(x)));
    const lines = [heads];
    cells = Array.from({ length: F }, (_, f) => {
      if (f % columns === 0) lines.push(make("div", { role: "row" }, make("span", { role: "rowheader" }, String(f / columns + 1))));
      const cell = make("div", { role: "gridcell", tabindex: -1 }, make("canvas", { "aria-hidden": "true" }));
      cell.addEventListener("click", () => choose(f));
      lines.at(-1).append(cell);
      return cell;
    });
    grid.replaceChildren(...lines);
  }

  grid.addEventListener("keydown", (event) => {
    const to = arrow(event, neuron, layer.columns, layer.F);
    if (to === undefined) return;
    choose(to);
    cells[to].focus();
  });

  function drawScore(e) {
    const [loose, strict] = layer.tolerances(e), { F } = layer;
    const features = layer.count(e, (_, f) => layer.isFeature(e, f, loose)), dead = layer.count(e, (_, f) => layer.range(e, f)[1] <= 0);
    score.textContent = `${features} of ${F} filters are features at tolerance ${short(loose)} (f = ${(features / F).toFixed(2)})` +
      (strict ? `, ${layer.count(e, (_, f) => layer.isFeature(e, f, strict))} at ${short(strict)}.` : "; this epoch is kept in half precision, which tells no finer.") +
      (dead ? ` ${dead} ${dead === 1 ? "has" : "have"} no positive weight${layer.kind === "LL" ? ": no patch excites them" : ""}.` : "");
    return { features, dead };
  }

  function drawPictures(e) {
    const { C, w } = layer, weight = layer.weight(e, neuron), most = Math.max(...weight.map(Math.abs)) || 1;
    const figure = (pixels, label, text) => {
      const canvas = make("canvas", { role: "img", "aria-label": label });
      paint(canvas, pixels, w);
      return make("figure", {}, canvas, make("figcaption", {}, text));
    };
    const parts = Array.from({ length: C }, (_, c) => {
      const name = C === 3 ? ["red", "green", "blue"][c] : "weights", pixels = new Uint8ClampedArray(4 * w * w);
      weight.subarray(c * w * w, (c + 1) * w * w).forEach((v, i) => pixels.set([...diverging(v / most), 255], 4 * i));
      return figure(pixels, C === 3 ? `${name} weights` : name, name);
    });
    pictures.replaceChildren(figure(tile(weight, C), `filter ${layer.nameOf(neuron)} as a colour picture`, "filter"), ...parts);
    ends.replaceChildren(...[-most, 0, most].map((v) => make("span", {}, v === 0 ? "0" : readable(v.toPrecision(2)))));
    scaleNote.textContent = C === 3 ? "weight; one scale for the three channels" : "weight";
  }

  function drawFacts(e) {
    const { read, p } = layer, [smallest, largest] = layer.range(e, neuron), exact = layer.tolerances(e).length > 1, atEnd = e === layer.last;
    const percent = (share) => `${(100 * share).toFixed(2)} %`;
    const later = "known after the last epoch only", rates = [];
    if (read.seen_wins) rates.push(`${percent(read.seen_wins[neuron])} of test patches`);
    if (read.wins) rates.push(`${percent(read.wins[neuron])} in the last epoch of training`);
    const entries = {
      [`${p}-norm`]: layer.norm(e, neuron).toFixed(exact ? 6 : 3),
      "sign": signOf(smallest, largest),
      "weights": `${readable(smallest.toPrecision(3))} to ${readable(largest.toPrecision(3))}`,
      "feature": layer.tolerances(e).map((t) => `${layer.isFeature(e, neuron, t) ? "yes" : "no"} at ${short(t)}`).join(", "),
      "win rate": !rates.length ? "not recorded" : atEnd ? rates.join(", ") : later,
    };
    if (read.mean) entries["mean activity"] = atEnd ? `${readable(read.mean[neuron].toPrecision(3))} over test patches` : later;
    facts.replaceChildren(...Object.entries(entries).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  }

  function drawExcited(e) {
    const { read, w, C, patches } = layer;
    excited.hidden = !read.pixels;
    if (!read.pixels) return;
    const all = data.images * (data.side - w + 1) ** 2;
    if (e !== layer.last) {
      excited.replaceChildren(make("p", { class: "khnb-note" }, "What excites it: after the last epoch. Move the slider to its end."));
      return;
    }
    // A KH neuron sees patches of unit norm: they are drawn as bright as they can be, or many of them would be all but black.
    const bright = layer.kind === "LL", strongest = Array.from({ length: patches }, (_, i) => {
      const k = neuron * patches + i, { kind, activity } = layer.answer(neuron, i, data), patch = layer.patch(neuron, i);
      const canvas = make("canvas", { role: "img", "aria-label": `patch of the class ${kind}, activity ${activity}` });
      paint(canvas, rgba(patch, C, 0, bright ? Math.max(...patch) : 255), w);
      const place = `test image ${read.image[k]}, row ${read.corner[2 * k] + 1}, column ${read.corner[2 * k + 1] + 1}`;
      return make("figure", { title: place }, canvas, make("figcaption", {}, kind, make("br"), activity));
    });
    const none = read.activity[neuron * patches] <= 0 ? "No patch excites it. These come closest, " : "These patches excite it most, ";
    excited.replaceChildren(
      make("p", { class: "khnb-note" }, `${none}of the ${thousands(all)} in ${thousands(data.images)} test images, one an image` +
        `${bright ? ", brightened (brightness is lost on this layer)" : ""}: class and activity.`),
      make("div", { class: "khnb-strongest" }, ...strongest));
  }

  /** Shows a layer after its e-th epoch, a neuron of it, and an emphasis; returns what a summary says of that. */
  function draw(next, e, at, emphasis) {
    if (layer !== next) {
      layer = next;
      painted = -1;
      build();
    }
    neuron = Math.min(Math.max(at, 0), layer.F - 1);
    const tolerance = layer.tolerances(e)[0], good = (f) => layer.isFeature(e, f, tolerance);
    if (painted !== e) cells.forEach((cell, f) => paint(cell.firstChild, tile(layer.weight(e, f), layer.C), layer.w));
    painted = e;
    cells.forEach((cell, f) => {
      cell.tabIndex = f === neuron ? 0 : -1;
      cell.setAttribute("aria-selected", f === neuron);
      cell.setAttribute("aria-label", `${layer.nameOf(f)}, ${good(f) ? "feature" : "no feature"}`);
      cell.classList.toggle("khnb-dim", emphasis !== "all" && good(f) !== (emphasis === "features"));
    });
    steps.forEach(({ button, by }) => { button.disabled = neuron + by < 0 || neuron + by >= layer.F; });
    heading.textContent = `${layer.name}, ${layer.when(e)}`;
    title.textContent = `Neuron ${layer.nameOf(neuron)}`;
    const { features, dead } = drawScore(e);
    drawPictures(e);
    drawFacts(e);
    drawExcited(e);
    const [smallest, largest] = layer.range(e, neuron), strongest = layer.read.pixels && e === layer.last ? layer.answer(neuron, 0, data) : null;
    return `${layer.name}, ${layer.when(e)}: ${features} of ${layer.F} filters are features at tolerance ${short(tolerance)}${dead ? `, ${dead} without a positive weight` : ""}. ` +
      `Neuron ${layer.nameOf(neuron)} has ${layer.p}-norm ${layer.norm(e, neuron).toFixed(3)} and weights ${signOf(smallest, largest)}; ` +
      `it is ${good(neuron) ? "a feature" : "no feature"}.` +
      (strongest ? ` Its strongest test patch is of the class ${strongest.kind}, activity ${strongest.activity}.` : "");
  }

  return { node, draw };
}

function render({ model, el }) {
  const header = model.get("header"), bytes = toBytes(model.get("numbers")), layers = new Map();
  const names = header.models.map((m) => m.name);
  const layerOf = (name) => {
    if (!layers.has(name)) layers.set(name, makeLayer(header.models.find((m) => m.name === name), bytes));
    return layers.get(name);
  };
  const first = () => layerOf(names.includes(model.get("model_name")) ? model.get("model_name") : names[0]);
  const second = () => (names.includes(model.get("beside")) ? layerOf(model.get("beside")) : null);
  const set = (name, value) => { model.set(name, value); model.save_changes(); };

  // The slider moves through the epochs of the first model that has several; the other one follows by the numbers of its epochs.
  const timeline = () => (first().last > 0 ? first() : second() ?? first());
  const place = () => {
    const { last } = timeline(), at = model.get("epoch");
    return at < 0 || at > last ? last : at;
  };
  function epochAt(layer) {
    const line = timeline();
    if (layer === line) return place();
    if (place() === line.last || !layer.epochs) return layer.last;
    return Math.max(0, layer.epochs.filter((epoch) => epoch <= line.epochs[place()]).length - 1);
  }
  const alike = () => second() !== null && second().F === first().F;
  const together = () => alike() && model.get("linked");

  const select = choice(model, "model_name", "Model", names), beside = choice(model, "beside", "Beside it", [["", "nothing"], ...names.map((name) => [name, name])]);
  const emphasis = choice(model, "emphasis", "Emphasise", [["all", "nothing"], ["features", "features"], ["others", "what is no feature"]]);
  const time = slider(model, "epoch", "After epoch", { min: 0, step: 1, max: 0, text: () => String(timeline().epochs?.[place()] ?? "") });
  const linked = make("input", { type: "checkbox" });
  linked.addEventListener("change", () => {
    const parted = !linked.checked;  // before a change draws it anew
    if (parted) set("neuron_beside", model.get("neuron"));  // so that the second grid stays where it is
    set("linked", !parted);
  });
  const link = make("label", { class: "khnb-link" }, linked, " same neuron in both");
  const views = [makeView(header.data, (f) => set("neuron", f)), makeView(header.data, (f) => set(together() ? "neuron" : "neuron_beside", f))];
  const summary = make("p", { class: "khnb-summary", "aria-live": "polite" });

  el.classList.add("khnb-widget");
  el.replaceChildren(make("div", { class: "khnb-filters" },
    make("div", { class: "khnb-controls" }, select.field, beside.field, time.field, emphasis.field, link),
    make("div", { class: "khnb-views" }, ...views.map((view) => view.node)),
    summary));

  function draw() {
    const other = second(), { last } = timeline();
    [select, beside, emphasis].forEach((control) => control.show());
    time.field.hidden = last < 1;
    time.input.max = last;
    time.show();
    time.input.value = place();  // -1 is the last
    link.hidden = !alike();
    linked.checked = model.get("linked");
    views[1].node.hidden = !other;
    views[0].node.parentNode.classList.toggle("khnb-two", other !== null);
    const said = [views[0].draw(first(), epochAt(first()), model.get("neuron"), model.get("emphasis"))];
    if (other) said.push(views[1].draw(other, epochAt(other), model.get(together() ? "neuron" : "neuron_beside"), model.get("emphasis")));
    summary.replaceChildren(...said.flatMap((text, i) => (i ? [make("br"), text] : [text])));
  }

  return follow(model, ["model_name", "beside", "epoch", "neuron", "neuron_beside", "linked", "emphasis"], draw);
}

export default { render };
