// Lines to call this server from elsewhere, with its real address and model. A key is never written into them.

import { address, needsKey } from "./api.js";
import { at, copyButton, h } from "./dom.js";

const QUESTION = "Hello";

const quoted = (text) => JSON.stringify(text); // a string of JSON is one of JavaScript and of Python
const forShell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function curl(base, model) {
  const body = JSON.stringify({ model, messages: [{ role: "user", content: QUESTION }], stream: true });
  return [
    `curl --no-buffer ${forShell(`${base}/chat/completions`)} \\`,
    ...(needsKey ? ['  -H "Authorization: Bearer $LOWBIT_API_KEY" \\'] : []),
    "  -H 'Content-Type: application/json' \\",
    `  -d ${forShell(body)}`,
  ].join("\n");
}

function python(base, model) {
  return [
    ...(needsKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${quoted(base)}, api_key=${needsKey ? 'os.environ["LOWBIT_API_KEY"]' : '"none"'})`,
    "answer = client.chat.completions.create(",
    `    model=${quoted(model)},`,
    `    messages=[{"role": "user", "content": ${quoted(QUESTION)}}],`,
    ")",
    "print(answer.choices[0].message.content)",
  ].join("\n");
}

function javascript(base, model) {
  return [
    'import OpenAI from "openai";',
    "",
    `const client = new OpenAI({ baseURL: ${quoted(base)}, apiKey: ${needsKey ? "process.env.LOWBIT_API_KEY" : '"none"'} });`,
    "const stream = await client.chat.completions.create({",
    `  model: ${quoted(model)},`,
    `  messages: [{ role: "user", content: ${quoted(QUESTION)} }],`,
    "  stream: true,",
    "});",
    'for await (const part of stream) process.stdout.write(part.choices[0]?.delta?.content ?? "");',
  ].join("\n");
}

export function showUsage(model) {
  const base = address("v1");
  const kinds = { curl: curl(base, model), Python: python(base, model), JavaScript: javascript(base, model) };
  at("api-body").replaceChildren(
    h(
      "section",
      { class: "card" },
      h("h3", {}, "Address"),
      h(
        "p",
        { class: "address" },
        h("code", {}, base),
        copyButton(() => base),
      ),
      h(
        "p",
        { class: "quiet" },
        "Any OpenAI client speaks to it. ",
        needsKey ? "Put your key into the variable LOWBIT_API_KEY." : "No key is needed.",
      ),
    ),
    ...Object.entries(kinds).map(([name, text]) =>
      h(
        "section",
        { class: "card" },
        h(
          "div",
          { class: "head" },
          h("h3", {}, name),
          copyButton(() => text, `Copy`),
        ),
        h("pre", { tabindex: 0, role: "region", "aria-label": `${name} lines` }, h("code", {}, text)),
      ),
    ),
  );
}
