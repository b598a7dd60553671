// What runs now: the feed, asked for each second while the page is in view, and the small charts of it.

import { get, hasKey, needsKey, Refused, startup } from "./api.js";
import { stack, TimeChart } from "./charts.js";
import { at, bytes, h, number, significant } from "./dom.js";

const EVERY_MS = 1000;
const AGAIN_MS = 2500; // where the server does not answer
const MEMORY = { weights: "weights", kv_cache: "KV cache", graphs: "graphs", other: "other", free: "free" };

const perSecond = (value) => significant(value, 3);
const percent = (value) => `${number(100 * value, value > 0 && value < 0.1 ? 1 : 0)} %`;

const charts = {};
let before = null; // the last document: rates are differences of its counters
let ready = () => {};

/** `onReady` is told each time that the server begins to answer. */
export function startLive(onReady) {
  ready = onReady;
  at("live-body").append(
    panel("generated", "Output tokens/s", ["output"], { write: perSecond }),
    panel("prompt", "Prompt tokens/s", ["prompt"], { write: perSecond }),
    panel("requests", "Requests", ["running", "waiting"], { write: (value) => number(value) }),
    panel("cache", "KV cache", ["in use"], { most: 1, write: percent }),
    panel("watts", "Power", ["power"], { write: (value) => `${perSecond(value)} W` }),
    h("section", { class: "panel" }, h("h3", {}, "Memory"), h("div", { id: "memory" })),
  );
  charts.watts.section.hidden = true;
  document.addEventListener("visibilitychange", () => !document.hidden && wake());
  poll();
}

let timer = null;
let asking = false;

/** Ask now: the page came into view, or a key was given. */
export function wake() {
  clearTimeout(timer);
  if (!asking) poll();
}

async function poll() {
  if (document.hidden) return;
  asking = true;
  let pause = EVERY_MS;
  try {
    if (before === null) await begin();
    if (!needsKey || hasKey()) {
      const live = await get("lowbit/live");
      if (before === null) await ready();
      take(live);
    }
  } catch (error) {
    pause = AGAIN_MS;
    before = null;
    if (!(error instanceof Loads)) show(error);
  }
  asking = false;
  timer = setTimeout(poll, pause);
}

class Loads extends Error {}

/** The server's state before it is known to answer; raises Loads while it loads. */
async function begin() {
  const state = await startup();
  if (!state.started) {
    const how = state.stage ? `loading: ${state.stage}, ${Math.round(state.seconds)} s` : "loading";
    status("waiting", how);
    throw new Loads();
  }
  if (needsKey && !hasKey()) status("waiting", "needs a key");
}

function show(error) {
  if (!(error instanceof Refused)) status("lost", "not reachable");
  else if (error.status === 401) status("waiting", "needs a key");
  else status("lost", error.message);
}

function status(state, words) {
  const place = at("status");
  place.dataset.state = state;
  if (place.textContent !== words) place.textContent = words;
}

function take(live) {
  const { up_s: t, requests, kv_cache: cache } = live;
  status(live.status === "ready" ? "ready" : "waiting", live.status);
  const rates = before && t > before.up_s ? ["generated", "prompt"].map((kind) => rate(live, kind)) : [0, 0];
  charts.generated.show(t, [rates[0]], perSecond(rates[0]), `${perSecond(live.tokens_per_second.generated)} over 10 s`);
  charts.prompt.show(t, [rates[1]], perSecond(rates[1]), `${perSecond(live.tokens_per_second.prompt)} over 10 s`);
  charts.requests.show(
    t,
    [requests.running ?? requests.active, requests.waiting ?? 0],
    number(requests.running ?? requests.active),
    `running, ${number(requests.waiting)} waiting`,
  );
  const used = Math.round((cache.used ?? 0) * cache.tokens);
  charts.cache.show(
    t,
    [cache.used ?? 0],
    percent(cache.used ?? 0),
    `${number(used)} of ${number(cache.tokens)} tokens`,
  );
  if (live.energy_joules !== undefined) energy(t, live);
  at("memory").replaceChildren(...Object.entries(live.memory).map(([device, parts]) => memory(device, parts)));
  before = live;
}

/** Tokens per second since the document before; the engine's windowed rate where it has no counters. */
function rate(live, kind) {
  const [now, then] = [live.tokens[kind], before.tokens[kind]];
  if (now === null || then === null) return live.tokens_per_second[kind];
  return Math.max(0, (now - then) / (live.up_s - before.up_s));
}

function energy(t, live) {
  charts.watts.section.hidden = false;
  const passed = before?.energy_joules === undefined ? 0 : t - before.up_s;
  const watts = passed > 0 ? Math.max(0, (live.energy_joules - before.energy_joules) / passed) : 0;
  const tokens = passed > 0 ? live.tokens.generated - before.tokens.generated : 0;
  const each = tokens > 0 ? `${significant((watts * passed) / tokens)} J per output token` : "";
  charts.watts.show(t, [watts], `${perSecond(watts)} W`, each);
}

function panel(name, title, names, how) {
  const chart = new TimeChart(title, names, how);
  const value = h("b", { id: `now-${name}` }, "–");
  const note = h("span", { class: "note" });
  const section = h(
    "section",
    { class: `panel ${name}` },
    h("h3", {}, title),
    h("p", { class: "now" }, value, " ", note),
    chart.element,
  );
  charts[name] = {
    section,
    show(t, values, words, more) {
      value.textContent = words;
      note.textContent = more;
      chart.add(t, values);
    },
  };
  return section;
}

/** A device's memory as one bar; shares of the sum, since a CPU's cache counts as free until it is used. */
function memory(device, parts) {
  const known = Object.keys(MEMORY).filter((key) => parts[key] !== undefined);
  const sum = known.reduce((total, key) => total + parts[key], 0) || 1;
  const shown = known.map((key) => ({ key, name: MEMORY[key], share: parts[key] / sum, words: bytes(parts[key]) }));
  return h(
    "div",
    { class: "device" },
    h("p", { class: "now" }, h("b", {}, bytes(parts.total)), " ", h("span", { class: "note" }, device)),
    stack(`Memory of ${device}`, shown),
    h(
      "ul",
      { class: "legend" },
      shown.map((part) => h("li", { class: `part-${part.key}` }, `${part.name} `, h("b", {}, part.words))),
    ),
  );
}
