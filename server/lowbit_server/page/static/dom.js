// Small ways to make elements. Text goes in as text; only markdown.js makes HTML, through DOMPurify.

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties (`class`, `on…`, attributes) and children, which are nodes or text. */
export function h(name, properties = {}, ...children) {
  return fill(document.createElement(name), properties, children);
}

/** The same in SVG. */
export function s(name, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, name), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((one) => one !== null && one !== undefined && one !== false));
  return element;
}

export const at = (id) => document.getElementById(id);

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** A number with so many digits after the point, or a dash where there is none (null, or "NaN" as JSON writes it). */
export function number(value, digits = 0) {
  if (!known(value)) return "–";
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** To so many significant digits. */
export function significant(value, digits = 3) {
  return known(value)
    ? Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits })
    : "–";
}

export function bytes(value) {
  if (!known(value)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) [value, power] = [value / 1024, power + 1];
  return `${significant(value)} ${units[power]}`;
}

/** A short time: milliseconds below a second. */
export function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${number(ms / 1000, ms < 10000 ? 2 : 1)} s`;
}

/** A button that copies what `text` gives, and says so. */
export function copyButton(text, what = "Copy") {
  const button = h("button", { type: "button", class: "plain", "aria-live": "polite" }, what);
  button.addEventListener("click", async () => {
    let done = "Copied";
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      done = "Not allowed here"; // browsers give the clipboard to HTTPS and localhost only
    }
    button.textContent = done;
    setTimeout(() => (button.textContent = what), 1500);
  });
  return button;
}
