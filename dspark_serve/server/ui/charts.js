// Small charts in SVG: lines, areas, bars and dots over two axes. Must not know: what the numbers mean.

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 340;
const HEIGHT = 96;
const LEFT = 38;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 18;

function element(name, attributes, ...children) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** The next number of 1, 2, 5, 10, ... that is at least `value`. */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((n) => n * unit >= value * 0.999) * unit;
}

/** A number with as many digits as one reads. */
export function short(value) {
  if (value >= 1000) return `${+(value / 1000).toFixed(value >= 10000 ? 0 : 1)}k`;
  return String(+value.toFixed(value >= 10 || value === 0 ? 0 : value >= 1 ? 1 : 2));
}

/**
 * Draw anew. x: {min, max, log, ticks: [[value, text]]}, y: {max, text: value => string};
 * layers: [{kind: "line" | "area" | "bars" | "dots", className, points: [[x, y]], width}], bars `width` in units of x.
 */
export function draw(svg, { label, x, y, layers }) {
  const across = (value) => (x.log ? Math.log2(value / x.min) / Math.log2(x.max / x.min) : (value - x.min) / (x.max - x.min));
  const px = (value) => LEFT + Math.min(Math.max(across(value), 0), 1) * (WIDTH - LEFT - RIGHT);
  const py = (value) => HEIGHT - BOTTOM - Math.min(Math.max(value / y.max, 0), 1) * (HEIGHT - TOP - BOTTOM);
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const at = py(share * y.max);
    parts.push(element("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }));
    parts.push(element("text", { class: "tick y", x: LEFT - 5, y: at + 3 }, (y.text ?? short)(share * y.max)));
  }
  for (const [value, text] of x.ticks) {
    const side = across(value) < 0.04 ? "first" : across(value) > 0.96 ? "last" : "";
    parts.push(element("text", { class: `tick x ${side}`, x: px(value), y: HEIGHT - 4 }, text));
  }
  for (const layer of layers) parts.push(...shapes(layer, px, py));
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  svg.replaceChildren(...parts);
}

function shapes({ kind, className, points, width }, px, py) {
  if (!points.length) return [];
  const path = points.map(([a, b]) => `${px(a).toFixed(1)},${py(b).toFixed(1)}`).join(" ");
  if (kind === "line") return [element("polyline", { class: className, points: path })];
  if (kind === "area") {
    const corners = [points.at(-1)[0], points[0][0]].map((a) => `${px(a).toFixed(1)},${py(0)}`).join(" ");
    return [element("polygon", { class: `${className} area`, points: `${path} ${corners}` }), element("polyline", { class: className, points: path })];
  }
  if (kind === "dots") return points.map(([a, b]) => element("circle", { class: className, cx: px(a), cy: py(b), r: 2.2 }));
  return points.filter(([, b]) => b > 0).map(([a, b]) => {
    const [start, end] = [px(a - width / 2), px(a + width / 2)];
    return element("rect", { class: className, x: start, width: Math.max(end - start, 0.8), y: py(b), height: py(0) - py(b) });
  });
}
