// Small live charts: a line or two over the last minute, and one bar of parts. Numbers stand beside as text.

import { h, s } from "./dom.js";

const SPAN_S = 60;
const WIDTH = 300;
const HEIGHT = 64;
const TOP = 4; // room for the line's own width

/** Readings over time, each {t, values}; old ones are forgotten. */
export class TimeChart {
  /** `scale`: the largest value is at least this; `most`: it is fixed, for shares. */
  constructor(title, names, { scale = 1, most = null, write = String } = {}) {
    Object.assign(this, { title, names, scale, most, write });
    this.readings = [];
    this.paths = names.map((_, at) => [
      s("path", { class: `area series-${at}` }),
      s("path", { class: `line series-${at}`, "vector-effect": "non-scaling-stroke" }),
    ]);
    this.picture = s(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      s("path", { class: "grid", d: grid(), "vector-effect": "non-scaling-stroke" }),
      s("path", { class: "base", d: `M0 ${HEIGHT}H${WIDTH}`, "vector-effect": "non-scaling-stroke" }),
      this.paths.flat(),
    );
    this.top = h("span", { class: "top" });
    this.element = h("div", { class: "chart" }, this.picture, this.top);
    this.draw(0);
  }

  add(t, values) {
    this.readings.push({ t, values });
    while (this.readings.length > 2 && this.readings[1].t < t - SPAN_S) this.readings.shift();
    this.draw(t);
  }

  draw(now) {
    const known = this.readings.flatMap((one) => one.values).filter(Number.isFinite);
    const highest = Math.max(0, ...known);
    const most = this.most ?? niceAbove(Math.max(this.scale, highest));
    const x = (t) => WIDTH * (1 - (now - t) / SPAN_S);
    const y = (value) => HEIGHT - (HEIGHT - TOP) * Math.min(1, value / most);
    this.names.forEach((_, at) => {
      const points = this.readings.map((one) => [x(one.t), y(one.values[at] ?? 0)].map((n) => n.toFixed(1)).join(" "));
      const line = points.length > 1 ? `M${points.join("L")}` : "";
      this.paths[at][1].setAttribute("d", line);
      this.paths[at][0].setAttribute("d", line && `${line}V${HEIGHT}H${x(this.readings[0].t).toFixed(1)}Z`);
    });
    this.top.textContent = this.write(most);
    const last = this.readings.at(-1)?.values ?? [];
    const words = this.names.map((name, at) => `${name} ${this.write(last[at] ?? 0)}`).join(", ");
    this.picture.setAttribute("aria-label", `${this.title}, last minute: now ${words}; highest ${this.write(highest)}`);
  }
}

function grid() {
  return [0.25, 0.5, 0.75].map((share) => `M0 ${(HEIGHT * share).toFixed(1)}H${WIDTH}`).join("");
}

/** The next of 1, 2, 5, 10, 20, 50, … */
function niceAbove(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

/** One bar whose parts are shares of a whole: [{key, name, share, words}]. */
export function stack(title, parts) {
  let left = 0;
  const rects = parts.map((part) => {
    const width = Math.max(0, part.share * WIDTH);
    const rect = s("rect", {
      x: left.toFixed(2),
      y: 0,
      width: width.toFixed(2),
      height: 12,
      class: `part-${part.key}`,
    });
    left += width;
    return rect;
  });
  const label = `${title}: ${parts.map((part) => `${part.name} ${part.words}`).join(", ")}`;
  return s(
    "svg",
    { class: "stack", viewBox: `0 0 ${WIDTH} 12`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    rects,
  );
}
