// Activation functions, their powers and their slopes.
//
// Comes after common.js (see khnb.widgets.base.module).

/** [sigma(x)^n, n sigma(x)^(n-1) sigma'(x)]; a broken n has neither where sigma is negative. */
export function powered(name, n, x) {
  const [sigma, slope] = ACTIVATIONS[name], y = sigma(x);
  return [power(y, n), n * power(y, n - 1) * slope(x, y)];
}

const LOW = -4, HIGH = 4, POINTS = 321, TANGENT = 40;  // of the charts; half the length of a tangent, in their units

const number = (v) => readable(Number.isNaN(v) ? "undefined" : Math.abs(v) < 1e4 ? v.toFixed(4) : v.toExponential(2));

function render({ model, el }) {
  const { curves, n: powers, x: places } = model.get("header");
  const chosen = () => curves.filter(({ name }) => model.get("functions").includes(name));
  const n = slider(model, "n", "Power n", powers), x = slider(model, "x", "Place x", { ...places, text: (v) => readable(v.toFixed(2)) });

  // The legend is the control, and holds the numbers.
  const rows = curves.map((curve) => {
    const input = make("input", { type: "checkbox", id: uniqueId(curve.name) });
    input.addEventListener("change", () => {
      const names = curves.map(({ name }) => name).filter((name) => (name === curve.name ? input.checked : model.get("functions").includes(name)));
      if (!names.length) input.checked = true;  // the last one stays
      else { model.set("functions", names); model.save_changes(); }
    });
    const sample = svg("svg", { viewBox: "0 0 44 10", class: "khnb-sample", "aria-hidden": "true" }, line(curve, "M0 5H44"));
    const cells = [make("td"), make("td")];
    const label = make("label", { for: input.id }, input, sample, curve.label);
    return { name: curve.name, input, cells, row: make("tr", {}, make("th", { scope: "row" }, label), ...cells) };
  });
  const head = () => make("thead", {}, make("tr", {}, ...["function", "value", "slope"].map((text) => make("th", { scope: "col" }, text))));
  const table = (part) => make("table", { class: "khnb-table" }, head(), make("tbody", {}, ...part.map(({ row }) => row)));
  const charts = [make("div", { class: "khnb-panel" }), make("div", { class: "khnb-panel" })];
  const summary = frame(el, [n.field, x.field], [...charts, table(rows.slice(0, 4)), table(rows.slice(4))]);

  function line({ colour, dash }, d, width = 2) {
    return svg("path", { d, fill: "none", stroke: colour, "stroke-width": width, ...(dash ? { "stroke-dasharray": dash } : {}) });
  }

  function chart(which, at, power) {
    const label = which ? "slope" : power === 1 ? "σ(x)" : "σ(x)ⁿ";
    const name = `${which ? "Slopes" : "Values"} of ${chosen().map((c) => c.label).join(", ")} for x from ${readable(LOW)} to ${HIGH}`;
    const { figure, plot, px, py } = axes({ name, width: 380, height: 280, x: { label: "x", low: LOW, high: HIGH }, y: { label, low: -2, high: 6 } });
    plot.append(svg("path", { d: `M${px(LOW)} ${py(0)}H${px(HIGH)}M${px(at)} ${py(-2)}V${py(6)}`, class: "khnb-guide" }));
    for (const curve of chosen()) {
      const points = Array.from({ length: POINTS }, (_, i) => LOW + ((HIGH - LOW) * i) / (POINTS - 1));
      plot.append(line(curve, path(points.map((v) => [v, powered(curve.name, power, v)[which]]), px, py)));
    }
    for (const curve of chosen()) {
      const [value, slope] = powered(curve.name, power, at);
      if (Number.isNaN(value)) continue;
      const cx = px(at), cy = py(which ? slope : value), run = px(1) - px(0), rise = (py(1) - py(0)) * slope, part = TANGENT / Math.hypot(run, rise);
      if (!which) plot.append(line({ colour: curve.colour }, `M${cx - part * run} ${cy - part * rise}L${cx + part * run} ${cy + part * rise}`, 1.5));
      plot.append(svg("circle", { cx, cy, r: 4, fill: curve.colour, stroke: "currentColor" }));
    }
    return figure;
  }

  return follow(model, ["functions", "n", "x"], () => {
    const power = model.get("n"), at = model.get("x");
    n.show();
    x.show();
    charts.forEach((place, which) => place.replaceChildren(chart(which, at, power)));
    const told = rows.map(({ name, input, cells }, i) => {
      const shown = model.get("functions").includes(name), pair = powered(name, power, at).map(number);
      input.checked = shown;
      cells.forEach((cell, which) => { cell.textContent = shown ? pair[which] : ""; });
      return shown ? `${curves[i].label} ${pair[0]}, slope ${pair[1]}` : "";
    });
    summary.textContent = `At x = ${readable(at.toFixed(2))}${power === 1 ? "" : `, to the power ${power}`}: ${told.filter(Boolean).join("; ")}.`;
  });
}

export default { render };
