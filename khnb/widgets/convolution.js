// A convolution, one output value at a time.
//
// Comes after common.js (see khnb.widgets.base.module).

/** The kernel as it is laid on the image: turned by half a turn for a convolution, as it is for a correlation. */
export const laid = (kernel, flip) => (flip ? [...kernel].reverse() : kernel);

/**
 * All windows of an image (rows of numbers) under a 3 x 3 kernel (9 numbers, row by row), without padding: a list of
 * {row, column: of the window's corner; products: 9 pairs [pixel, weight]; sum}, and how many stand side by side.
 */
export function windows(image, kernel, flip, stride) {
  const weights = laid(kernel, flip), list = [];
  let columns = 0;
  for (let row = 0; row + 3 <= image.length; row += stride) {
    columns = 0;
    for (let column = 0; column + 3 <= image[0].length; column += stride, columns++) {
      const products = weights.map((weight, i) => [image[row + Math.floor(i / 3)][column + (i % 3)], weight]);
      list.push({ row, column, products, sum: products.reduce((sum, [v, weight]) => sum + v * weight, 0) });
    }
  }
  return { list, columns };
}

const product = ([v, weight]) => `${v}·${weight < 0 ? `(${readable(weight)})` : weight}`;

function render({ model, el }) {
  const { image, kernels, stride: strides } = model.get("header");
  const kernelOf = () => (model.get("kernel") === "own" ? model.get("own") : kernels[model.get("kernel")]);
  const found = () => windows(image, kernelOf(), model.get("flip"), model.get("stride"));
  const last = () => found().list.length - 1;
  const set = (values) => { for (const [name, value] of Object.entries(values)) model.set(name, value); model.save_changes(); };

  const kind = choice(model, "kernel", "Kernel", [...Object.keys(kernels), "own"]);
  const stride = slider(model, "stride", "Stride", strides);
  const flip = make("input", { type: "checkbox", id: uniqueId("flip") });
  flip.addEventListener("change", () => set({ flip: flip.checked }));
  const flipField = make("div", { class: "khnb-field" }, flip, make("label", { for: flip.id }, "Flip the kernel"));
  const position = player(model, "position", "Position", { last, summary: () => summary, every: 500, text: (v) => `${v + 1} of ${last() + 1}` });

  const table = (columns, cells, more = {}) => make("div", { class: "khnb-cells", style: `--columns: ${columns}`, ...more }, ...cells);
  const pixels = image.flat().map(() => make("span")), picture = table(image[0].length, pixels, { role: "img" });
  const weights = Array.from({ length: 9 }, (_, i) => {
    const name = `kernel, row ${Math.floor(i / 3) + 1}, column ${(i % 3) + 1}`;
    const input = make("input", { type: "number", step: 1, min: -99, max: 99, "aria-label": name });
    input.addEventListener("change", () => {
      const value = Math.round(Number(input.value));
      if (Math.abs(value) > 99) input.value = kernelOf()[i];
      else set({ own: kernelOf().map((v, k) => (k === i ? value : v)), kernel: "own" });
    });
    return input;
  });
  const output = make("div", { role: "grid", class: "khnb-cells", "aria-label": "output; move with the arrow keys" });
  const sum = make("p", { class: "khnb-sum" });
  const titled = (text, ...parts) => make("figure", {}, make("figcaption", {}, text), ...parts);
  const used = make("figcaption"), applied = table(3, [], { role: "img" });
  const summary = frame(el, [kind.field, stride.field, flipField, position.field], [
    titled("image", picture),
    make("div", {},
      make("div", { class: "khnb-row" }, titled("kernel (edit it)", table(3, weights)), make("figure", {}, used, applied)),
      titled("sum of products", sum)),
    titled("output", output),
  ]);

  let cells = [];
  function build({ list, columns }) {
    cells = list.map((_, i) => {
      const cell = make("span", { role: "gridcell" });
      cell.addEventListener("click", () => { position.stop(); set({ position: i }); });
      return cell;
    });
    output.style.setProperty("--columns", columns);
    const row = (_, y) => make("div", { role: "row" }, ...cells.slice(y * columns, (y + 1) * columns));
    output.replaceChildren(...Array.from({ length: list.length / columns }, row));
  }
  output.addEventListener("keydown", (event) => {
    const to = arrow(event, position.at(), found().columns, cells.length);
    if (to === undefined) return;
    position.stop();
    set({ position: to });
    cells[to].focus();
  });

  const unfollow = follow(model, ["kernel", "own", "flip", "stride", "position"], () => {
    const { list, columns } = found(), now = position.at(), { row, column, products, sum: total } = list[now];
    [kind, stride, position].forEach((part) => part.show());
    flip.checked = model.get("flip");
    if (cells.length !== list.length) build({ list, columns });
    weights.forEach((input, i) => { input.value = kernelOf()[i]; });
    used.textContent = flip.checked ? "as laid on: flipped" : "as laid on: as it is";
    applied.replaceChildren(...products.map(([, weight]) => make("span", { class: "khnb-window" }, readable(weight))));
    applied.setAttribute("aria-label", `kernel as laid on the image: ${products.map(([, weight]) => readable(weight)).join(" ")}`);
    pixels.forEach((pixel, i) => {
      const y = Math.floor(i / image[0].length) - row, x = (i % image[0].length) - column;
      const inside = y >= 0 && y < 3 && x >= 0 && x < 3;
      pixel.className = inside ? "khnb-window" : "";
      pixel.replaceChildren(String(image[y + row][x + column]), ...(inside ? [make("small", {}, `×${readable(products[3 * y + x][1])}`)] : []));
    });
    const rows = image.map((line) => line.join(" ")).join("; ");
    picture.setAttribute("aria-label", `image: ${rows}; the window begins in row ${row + 1}, column ${column + 1}`);
    cells.forEach((cell, i) => {
      const text = i <= now ? readable(list[i].sum) : "";
      cell.textContent = text;
      cell.tabIndex = i === now ? 0 : -1;
      cell.setAttribute("aria-selected", i === now);
      cell.setAttribute("aria-label", `row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}: ${text || "not reached"}`);
    });
    const terms = products.map(product), lines = [0, 3, 6].map((i) => terms.slice(i, i + 3).join(" + "));
    sum.replaceChildren(...lines.map((text, i) => make("span", {}, `${i ? "+ " : ""}${text}`)), make("strong", {}, `= ${readable(total)}`));
    const where = `row ${Math.floor(now / columns) + 1}, column ${(now % columns) + 1} of ${list.length / columns} × ${columns}`;
    summary.textContent = `Output ${where}: ${terms.join(" + ")} = ${readable(total)}.`;
  });
  return () => { position.stop(); unfollow(); };
}

export default { render };
