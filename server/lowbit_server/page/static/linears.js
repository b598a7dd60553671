// Which scheme each quantized linear has and how large its error is, by its role and layer.

import { bytes, h, number, s, significant } from "./dom.js";

const SHADES = 6; // of an error, from the smallest to the largest of the checkpoint

export function linears(manifest) {
  const errors = manifest.roles.flatMap((role) => role.layers.map((one) => one.error)).filter((one) => one > 0);
  const range = [Math.min(...errors), Math.max(...errors)];
  return h(
    "section",
    { class: "card" },
    h("h3", {}, "Schemes by module"),
    h(
      "ul",
      { class: "groups" },
      manifest.groups.map((group) =>
        h("li", {}, h("b", {}, `${number(group.linears)} × ${group.scheme}`), ` ${inWords(group)}`),
      ),
    ),
    manifest.roles.length
      ? h(
          "p",
          { class: "quiet" },
          "Each square is a layer. The stronger its colour, the larger the squared error of the output on the calibration text, relative to the output's own square.",
        )
      : null,
    errors.length
      ? h(
          "p",
          { class: "shades quiet" },
          significant(range[0], 2),
          Array.from({ length: SHADES }, (_, at) => h("span", { class: `shade-${at}` })),
          significant(range[1], 2),
        )
      : null,
    h(
      "div",
      { class: "wide", tabindex: 0, role: "region", "aria-label": "Schemes by module" },
      table(manifest.roles, range),
    ),
    unquantized(manifest),
  );
}

function inWords(group) {
  const size = group.group_size === null ? "channels" : `groups of ${group.group_size}`;
  const bits =
    group.bits_per_weight === null
      ? ""
      : `, ${significant(group.bits_per_weight)} bits per weight in ${bytes(group.bytes)}`;
  return `in ${size} by ${group.methods.join(", then ")}${bits}`;
}

function table(roles, range) {
  return h(
    "table",
    { class: "roles" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        ["module", "scheme", "linears", "mean error", "by layer"].map((name) => h("th", { scope: "col" }, name)),
      ),
    ),
    h(
      "tbody",
      {},
      roles.map((role) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, role.role),
          h("td", {}, role.schemes.join(" + ")),
          h("td", {}, number(role.linears)),
          h("td", {}, significant(mean(role.layers), 2)),
          h("td", {}, squares(role, range)),
        ),
      ),
    ),
  );
}

function mean(layers) {
  const known = layers.map((one) => one.error).filter((one) => typeof one === "number");
  return known.length ? known.reduce((sum, one) => sum + one, 0) / known.length : null;
}

function squares(role, [low, high]) {
  const span = Math.log(high / low) || 1;
  const shade = (value) => (value > 0 ? Math.min(SHADES - 1, Math.floor((Math.log(value / low) / span) * SHADES)) : 0);
  return s(
    "svg",
    {
      class: "squares",
      viewBox: `0 0 ${role.layers.length * 12} 12`,
      width: role.layers.length * 12,
      height: 12,
      "aria-hidden": "true",
    },
    role.layers.map((one, index) =>
      s(
        "rect",
        { x: index * 12, y: 0, width: 11, height: 12, rx: 2, class: `shade-${shade(one.error)}` },
        s("title", {}, `layer ${one.layer ?? "–"}: ${one.scheme}, error ${significant(one.error, 2)}`),
      ),
    ),
  );
}

function unquantized(manifest) {
  const kept = Object.entries(manifest.unquantized_because);
  if (!kept.length) return null;
  return h(
    "details",
    {},
    h("summary", {}, `What stays unquantized, and why (${kept.length})`),
    h(
      "dl",
      { class: "facts" },
      kept.map(([name, why]) => h("div", {}, h("dt", {}, name), h("dd", {}, why))),
    ),
  );
}
