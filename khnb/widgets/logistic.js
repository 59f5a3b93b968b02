// The generalised logistic curve (eq. 7.6), its inflection point and its slope.
//
// Comes after common.js (see khnb.widgets.base.module).

/** f(eps) = 1 - (1 + nu e^z)^(-1/nu) with z = -k (eps - R). */
export const curve = (eps, { k, R, nu }) => -Math.expm1(-Math.log1p(nu * Math.exp(-k * (eps - R))) / nu);

/** f'(eps) = -k e^z (1 + nu e^z)^(-1/nu - 1). */
export function slope(eps, { k, R, nu }) {
  const z = -k * (eps - R);
  return -k * Math.exp(z - (1 / nu + 1) * Math.log1p(nu * Math.exp(z)));
}

const LOW = -0.02, HIGH = 0.08, POINTS = 401;  // of the charts; where there is no attack there is a grey ground

function render({ model, el }) {
  const ranges = model.get("header");
  const sliders = [
    slider(model, "k", "Steepness k", ranges.k),
    slider(model, "R", "Inflection R", { ...ranges.R, text: (v) => readable(v.toFixed(3)) }),
    slider(model, "nu", "Asymmetry ν", { ...ranges.nu, text: (v) => v.toFixed(2) }),
  ];
  const charts = [make("div", { class: "khnb-panel" }), make("div", { class: "khnb-panel" })];
  const summary = frame(el, sliders.map(({ field }) => field), charts);
  const points = Array.from({ length: POINTS }, (_, i) => LOW + ((HIGH - LOW) * i) / (POINTS - 1));

  const mark = (x, y, text, down = false) => [
    svg("circle", { cx: x, cy: y, r: 5, fill: COLOURS.vermilion, stroke: "currentColor" }),
    svg("text", { x: x + 9, y: y + (down ? 16 : -6) }, text),
  ];

  function chart(name, label, high, height) {
    const made = axes({ name, width: 380, height: 280, x: { label: "attack strength ε", low: LOW, high: HIGH }, y: { label, low: 0, high } });
    const { plot, px, py } = made;
    plot.append(svg("rect", { x: px(LOW), y: py(high), width: px(0) - px(LOW), height: py(0) - py(high), class: "khnb-ground" }));
    plot.append(svg("path", { d: path(points.map((eps) => [eps, height(eps)]), px, py), fill: "none", stroke: COLOURS.blue, "stroke-width": 2.5 }));
    return made;
  }

  return follow(model, ["k", "R", "nu"], () => {
    const given = { k: model.get("k"), R: model.get("R"), nu: model.get("nu") }, { R } = given;
    sliders.forEach((part) => part.show());
    const start = curve(0, given), middle = curve(R, given), steepest = slope(R, given), attacked = R > 0;

    const one = chart("Relative accuracy against attack strength", "relative accuracy f", 1.1, (eps) => curve(eps, given));
    const { px, py } = one, end = (eps) => `${px(eps)} ${py(middle + steepest * (eps - R))}`;
    one.plot.append(svg("path", { d: `M${end(R - 1)}L${end(R + 1)}`, class: "khnb-tangent", "stroke-dasharray": "6 4" }));
    one.plot.append(svg("rect", { x: px(0) - 4, y: py(start) - 4, width: 8, height: 8, fill: COLOURS.orange, stroke: "currentColor" }));
    one.plot.append(...mark(px(R), py(middle), "f(R)"));

    const two = chart("Slope of the curve against attack strength", "−f′: fooled per unit of ε", -1.2 * steepest, (eps) => -slope(eps, given));
    two.plot.append(...mark(two.px(R), two.py(-steepest), "steepest"));
    charts.forEach((place, i) => place.replaceChildren([one, two][i].figure));

    const verdict = attacked ? `It is steepest at ε = R = ${R.toFixed(3)}, where f = ${middle.toFixed(3)} and the slope is ${readable(steepest.toFixed(1))}.`
      : `No inflection in ε > 0: R = ${readable(R.toFixed(3))}, so for every attack the curve falls ever more gently, and R says nothing of robustness.`;
    summary.textContent = `f(0) = ${start.toFixed(4)} (square). ${verdict}`;
  });
}

export default { render };
