// What was proven of the checkpoint, from its manifest, and what of it is in force in the running engine.

import { at, bytes, h, number, s, significant } from "./dom.js";
import { linears } from "./linears.js";

const ALONE = { kv_cache_alone: "FP8 cache alone", noise_floor: "noise floor: base, serving dtype" };
const IN_FORCE = {
  checkpoint: "The engine runs with the checkpoint's scales, read back from every layer and equal as float32.",
  unit: "The cache is FP8 and runs with scales of 1, because the checkpoint has none that the engine reads.",
  unused: "The cache is not FP8, so no scales are in use.",
};

export function showProof(proof) {
  const manifest = proof.manifest;
  at("served").textContent = proof.model;
  at("welcome-model").textContent = proof.model;
  at("welcome-facts").textContent = oneLine(proof);
  at("proof-body").replaceChildren(
    ...(manifest ? [verdict(manifest), quality(manifest.quality), linears(manifest)] : [unknown()]),
    scales(proof, manifest),
    engine(proof, manifest),
  );
}

function oneLine({ manifest, engine }) {
  if (!manifest)
    return `${engine.quantization ?? engine.dtype}, on vLLM ${engine.vllm}; how close it is to its base is unknown`;
  const schemes = [...new Set(manifest.groups.map((group) => group.scheme))].join(" + ") || "unquantized";
  const kl = error(manifest.quality.mean_kld, manifest.quality.kld_stderr);
  return `${schemes}, ${bytes(manifest.size.bytes)}, KL ${kl} nats per token from its base`;
}

/** `value ± its standard error`, to the digits that the error allows. */
function error(value, stderr, scale = 1, unit = "") {
  if (typeof value !== "number") return "–";
  if (typeof stderr !== "number" || stderr <= 0) return significant(value * scale) + unit;
  const digits = Math.min(6, Math.max(0, 1 - Math.floor(Math.log10(stderr * scale))));
  return `${number(value * scale, digits)} ± ${number(stderr * scale, digits)}${unit}`;
}

function unknown() {
  return h(
    "section",
    { class: "card verdict open" },
    h("h3", {}, "Nothing was proven"),
    h(
      "p",
      {},
      "This directory has no lowbit.json: how close it is to its base model is unknown. ",
      h("code", {}, "lowbit quantize"),
      " measures that and writes it.",
    ),
  );
}

function verdict(manifest) {
  const { gate, quality: q, size } = manifest;
  const limits = Object.entries(gate.limits).map(([name, limit]) => `${name} ${limit}`);
  const words = !gate.accepted
    ? "Rejected by its quality gate"
    : limits.length
      ? "Accepted by its quality gate"
      : "Measured, no limits set";
  const bits = significant(size.linear_bits_per_weight);
  return h(
    "section",
    { class: `card verdict ${gate.accepted ? (limits.length ? "good" : "open") : "bad"}` },
    h("h3", {}, words),
    h(
      "p",
      { class: "quiet" },
      limits.length ? `Limits: ${limits.join(", ")}. ` : "",
      `Base: ${manifest.base.name}, ${manifest.base.dtype}. Made ${String(manifest.created).slice(0, 10)}; ${number(manifest.files)} files checked.`,
    ),
    gate.reasons.length
      ? h(
          "ul",
          {},
          gate.reasons.map((reason) => h("li", {}, reason)),
        )
      : null,
    h(
      "dl",
      { class: "tiles" },
      tile("Mean KL to the base", error(q.mean_kld, q.kld_stderr), "nats per token"),
      tile("Top-1 agreement", error(q.top1_agreement, q.top1_stderr, 100, " %"), "of held-out predictions"),
      tile("Perplexity", error(q.perplexity_ratio, q.perplexity_ratio_stderr), "times the base's"),
      tile("Size", bytes(size.bytes), `of ${bytes(size.base_bytes)}; ${bits} bits per quantized weight`),
    ),
  );
}

function tile(name, value, note) {
  return h("div", {}, h("dt", {}, name), h("dd", {}, h("b", {}, value), h("span", { class: "note" }, note)));
}

function quality(q) {
  const rows = [
    { name: "all held-out text", ...q, kind: "whole" },
    ...Object.entries(q.domains)
      .map(([name, figures]) => ({ name, ...figures, kind: "domain" }))
      .sort((a, b) => (b.mean_kld ?? 0) - (a.mean_kld ?? 0)),
    ...Object.entries(ALONE)
      .filter(([field]) => q[field])
      .map(([field, name]) => ({ name, ...q[field], kind: "floor" })),
  ];
  const most = Math.max(...rows.map((row) => (Number(row.mean_kld) || 0) + (Number(row.kld_stderr) || 0)), 1e-12);
  const cache = q.kv_cache_included ? "with" : "without";
  return h(
    "section",
    { class: "card" },
    h("h3", {}, "KL divergence by text"),
    h(
      "p",
      { class: "quiet" },
      `${number(q.predictions)} predictions of ${number(q.heldout.num_samples)} held-out sequences, ${cache} the quantized cache. Bars and ± are one standard error over sequences.`,
    ),
    h(
      "div",
      { class: "wide", tabindex: 0, role: "region", "aria-label": "KL divergence by text" },
      h(
        "table",
        { class: "bars" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ["text", "", "KL, nats per token", "top-1 agreement"].map((name) =>
              name ? h("th", { scope: "col" }, name) : h("td", { "aria-hidden": "true" }),
            ),
          ),
        ),
        h(
          "tbody",
          {},
          rows.map((row) =>
            h(
              "tr",
              { class: row.kind },
              h("th", { scope: "row" }, row.name),
              h("td", { class: "drawn", "aria-hidden": "true" }, bar(row, most)),
              h("td", {}, error(row.mean_kld, row.kld_stderr)),
              h("td", {}, error(row.top1_agreement, row.top1_stderr, 100, " %")),
            ),
          ),
        ),
      ),
    ),
  );
}

function bar(row, most) {
  const x = (value) => (Math.max(0, value) / most) * 296;
  const [value, stderr] = [Number(row.mean_kld) || 0, Number(row.kld_stderr) || 0];
  return s(
    "svg",
    { viewBox: "0 0 300 16", preserveAspectRatio: "none" },
    s("rect", { class: "bar", x: 0, y: 3, width: x(value).toFixed(2), height: 10 }),
    s("path", {
      class: "whisker",
      "vector-effect": "non-scaling-stroke",
      d: `M${x(value - stderr).toFixed(2)} 8H${x(value + stderr).toFixed(2)}`,
    }),
  );
}

function scales(proof, manifest) {
  const layers = proof.kv_scales.layers;
  const values = layers.flatMap((one) => [one.k, one.v]).filter((one) => one > 0);
  return h(
    "section",
    { class: "card" },
    h("h3", {}, "KV cache scales"),
    h(
      "p",
      {},
      h(
        "span",
        { class: `badge ${proof.kv_scales.in_force}` },
        proof.kv_scales.in_force === "checkpoint" ? "in force" : proof.kv_scales.in_force,
      ),
      " ",
      IN_FORCE[proof.kv_scales.in_force],
    ),
    manifest?.kv_cache ? h("p", { class: "quiet" }, `${manifest.kv_cache.dtype}; ${manifest.kv_cache.source}.`) : null,
    proof.kv_scales.in_force !== "unused" && layers.length > 1 && values.length ? lines(layers, values) : null,
  );
}

function lines(layers, values) {
  const [low, high] = [Math.log(Math.min(...values)), Math.log(Math.max(...values))];
  const x = (index) => (index / (layers.length - 1)) * 600;
  const y = (value) => 116 - ((Math.log(value) - low) / (high - low || 1)) * 112;
  const path = (side) =>
    `M${layers.map((one, index) => `${x(index).toFixed(1)} ${y(one[side]).toFixed(1)}`).join("L")}`;
  const label = `Scales by layer, from ${significant(Math.exp(low), 2)} to ${significant(Math.exp(high), 2)}, on a logarithmic axis`;
  return h(
    "figure",
    { class: "scales" },
    h(
      "div",
      { class: "chart" },
      s(
        "svg",
        { viewBox: "0 0 600 120", preserveAspectRatio: "none", role: "img", "aria-label": label },
        s("path", { class: "line series-0", d: path("k"), "vector-effect": "non-scaling-stroke" }),
        s("path", { class: "line series-1", d: path("v"), "vector-effect": "non-scaling-stroke" }),
      ),
      h("span", { class: "top" }, significant(Math.exp(high), 2)),
      h("span", { class: "bottom" }, significant(Math.exp(low), 2)),
    ),
    h(
      "figcaption",
      {},
      h("ul", { class: "legend" }, h("li", { class: "series-0" }, "keys"), h("li", { class: "series-1" }, "values")),
      h("span", { class: "note" }, `layers ${layers[0].layer} to ${layers.at(-1).layer}, logarithmic`),
    ),
  );
}

function engine({ engine: one }, manifest) {
  const facts = {
    Engine: `vLLM ${one.vllm} on the ${one.device.toUpperCase()}`,
    Weights: `${one.quantization ?? "unquantized"}, ${one.dtype}`,
    "KV cache": `${number(one.kv_tokens)} tokens in ${one.kv_cache_dtype}`,
    Context: `${number(one.max_model_len)} tokens`,
    Batch: `at most ${number(one.max_num_seqs)} sequences`,
    ...(manifest
      ? {
          Parameters: `${number(manifest.size.parameters)}, of which ${number(manifest.size.quantized_parameters)} quantized`,
        }
      : {}),
  };
  return h(
    "section",
    { class: "card" },
    h("h3", {}, "As it runs"),
    h(
      "dl",
      { class: "facts" },
      Object.entries(facts).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
    ),
    one.kernels.length
      ? h(
          "ul",
          { class: "quiet kernels" },
          one.kernels.map((line) => h("li", {}, line)),
        )
      : null,
  );
}
