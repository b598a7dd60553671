// One answer as it streams: its text, its times, and the element that shows them.

import { Refused, stream } from "./api.js";
import { copyButton, duration, h, number } from "./dom.js";
import { markdown } from "./markdown.js";

const SHORTEST_PAUSE_MS = 60; // between two drawings
const SHARE = 4; // a drawing takes at most a quarter of the time
const ENDS = { length: "stopped at max tokens", content_filter: "filtered", tool_calls: "called a tool" };

export class Answer {
  /** `onEnd` is told once when it has ended; `onRegenerate` when a person asks for another one. */
  constructor(model, { titled, onEnd, onRegenerate }) {
    this.model = model;
    this.text = this.reasoning = "";
    this.tokens = 0;
    this.running = this.stopped = false;
    this.onEnd = onEnd;
    this.content = h("div", { class: "content" });
    this.thoughts = h("div", { class: "thoughts" });
    this.thinking = h("details", { hidden: true }, h("summary", {}, "Reasoning"), this.thoughts);
    this.failure = h("p", { class: "failed", hidden: true });
    this.figures = h("span", { class: "figures" });
    this.again = h("button", { type: "button", class: "plain", onclick: onRegenerate }, "Regenerate");
    this.buttons = h(
      "span",
      { class: "buttons", hidden: true },
      this.again,
      copyButton(() => this.text),
    );
    this.element = h(
      "article",
      { class: "answer", "aria-label": `Answer of ${model}` },
      h("h4", { class: titled ? "who" : "unseen" }, model),
      this.thinking,
      this.content,
      this.failure,
      h("footer", {}, this.figures, this.buttons),
    );
  }

  /** Ask, and show what comes until it ends or is stopped. */
  async run(messages, settings) {
    const body = {
      model: this.model,
      messages,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      ...settings,
    };
    this.abort = new AbortController();
    this.running = true;
    this.element.setAttribute("aria-busy", "true");
    this.began = performance.now();
    this.timer = setInterval(() => this.showFigures(), 100);
    try {
      for await (const event of stream("v1/chat/completions", body, this.abort.signal)) this.take(event);
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
    } finally {
      this.end();
    }
  }

  stop() {
    if (!this.running) return;
    this.stopped = true;
    this.abort.abort();
  }

  take(event) {
    const choice = event.choices?.[0];
    const delta = choice?.delta ?? {};
    const thought = delta.reasoning ?? delta.reasoning_content ?? "";
    const said = delta.content ?? "";
    if (said || thought) {
      this.last = performance.now();
      this.first ??= this.last;
      this.text += said;
      this.reasoning += thought;
      this.tokens = event.usage?.completion_tokens ?? this.tokens + 1;
      this.firstTokens ??= this.tokens;
      this.draw();
    } else if (event.usage?.completion_tokens) {
      this.tokens = event.usage.completion_tokens;
    }
    this.reason = choice?.finish_reason ?? this.reason;
  }

  /** Draw soon: a long answer is drawn less often, so that the page stays quick. */
  draw() {
    if (this.drawing) return;
    this.drawing = setTimeout(() => this.drawNow(), Math.max(SHORTEST_PAUSE_MS, SHARE * (this.cost ?? 0)));
  }

  drawNow() {
    const began = performance.now();
    clearTimeout(this.drawing);
    this.drawing = null;
    this.content.replaceChildren(markdown(this.text));
    this.thinking.hidden = !this.reasoning;
    if (this.reasoning) this.thoughts.replaceChildren(markdown(this.reasoning));
    this.cost = performance.now() - began;
    this.element.dispatchEvent(new Event("drawn", { bubbles: true }));
  }

  /** Output tokens per second after the first piece, or null while there is only one. */
  get rate() {
    const passed = this.last - this.first;
    return passed > 0 && this.tokens > this.firstTokens ? ((this.tokens - this.firstTokens) * 1000) / passed : null;
  }

  showFigures() {
    const now = performance.now();
    const parts = [];
    if (this.first === undefined) {
      if (this.running) parts.push(h("span", { class: "waiting" }, `waiting ${duration(now - this.began)}`));
    } else {
      if (this.rate !== null) parts.push(figure(number(this.rate, 1), "tokens/s"));
      parts.push(figure(duration(this.first - this.began), "to first token"), figure(number(this.tokens), "tokens"));
    }
    const end = this.stopped ? "stopped" : ENDS[this.reason];
    if (end && !this.running) parts.push(h("span", { class: "end" }, end));
    this.figures.replaceChildren(...parts);
  }

  fail(error) {
    const lost = !(error instanceof Refused);
    this.failed = lost ? "The server does not answer." : error.message;
    this.failure.textContent = this.failed;
    this.failure.hidden = false;
  }

  end() {
    clearInterval(this.timer);
    this.running = false;
    this.drawNow();
    this.showFigures();
    this.buttons.hidden = false;
    this.element.removeAttribute("aria-busy");
    this.onEnd(this);
  }

  /** One sentence for screen readers, once it has ended. */
  get summary() {
    if (this.failed) return `${this.model} failed: ${this.failed}`;
    const speed = this.rate === null ? "" : `, ${number(this.rate)} tokens per second`;
    return `${this.model} ${this.stopped ? "was stopped" : "has answered"}: ${this.tokens} tokens${speed}`;
  }
}

function figure(value, unit) {
  return h("span", {}, h("b", {}, value), ` ${unit}`);
}
