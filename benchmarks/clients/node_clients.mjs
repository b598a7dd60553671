// A chat, a stream and a structured answer through each JavaScript client; prints one line of JSON for each step.
// Runs in the directory that run.py makes. What a step proves is said in python_clients.py.

import OpenAI from "openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const { CLIENT_URL: url, CLIENT_KEY: key, CLIENT_MODEL: model } = process.env;
const ask = "What is the capital of France?";
const messages = [{ role: "user", content: ask }];
const Place = z.object({ city: z.enum(["Paris", "London", "Rome"]), capital: z.boolean() });

async function step(client, name, act) {
  let ok = true;
  let detail;
  try {
    detail = await act();
  } catch (error) {
    ok = false;
    detail = String(error).slice(0, 400);
  }
  console.log(JSON.stringify({ client, step: name, ok, detail }));
}

function textOf(text) {
  if (!text || !text.trim()) throw new Error("no text");
  return `${text.length} characters`;
}

function piecesOf(pieces) {
  const found = pieces.filter(Boolean);
  if (found.length < 2) throw new Error(`${found.length} pieces`);
  return `${found.length} pieces`;
}

const placeOf = (value) => JSON.stringify(Place.parse(value));

async function withOpenAI() {
  const name = "openai (npm)";
  const { completions } = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 }).chat;
  const base = { model, messages, max_tokens: 32, temperature: 0 };
  await step(name, "chat", async () => textOf((await completions.create(base)).choices[0].message.content));
  await step(name, "stream", async () => {
    const pieces = [];
    for await (const chunk of await completions.create({ ...base, stream: true })) {
      pieces.push(chunk.choices[0]?.delta?.content);
    }
    return piecesOf(pieces);
  });
  await step(name, "tool call", async () => {
    const look_up = { name: "look_up", strict: true, parameters: z.toJSONSchema(Place) };
    const answer = await completions.create({
      ...base,
      max_tokens: 128,
      tools: [{ type: "function", function: look_up }],
      tool_choice: { type: "function", function: { name: "look_up" } },
    });
    return placeOf(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments));
  });
  await step(name, "JSON schema", async () => {
    const json_schema = { name: "place", strict: true, schema: z.toJSONSchema(Place) };
    const answer = await completions.parse({
      ...base,
      max_tokens: 128,
      response_format: { type: "json_schema", json_schema },
    });
    return placeOf(JSON.parse(answer.choices[0].message.content));
  });
}

async function withAiSdk() {
  const name = "@ai-sdk/openai-compatible";
  const provider = createOpenAICompatible({
    name: "lowbit", baseURL: url, apiKey: key, supportsStructuredOutputs: true,
  });
  const base = { model: provider(model), prompt: ask, maxRetries: 0, temperature: 0 };
  await step(name, "chat", async () => textOf((await generateText({ ...base, maxOutputTokens: 32 })).text));
  await step(name, "stream", async () => {
    const pieces = [];
    for await (const piece of streamText({ ...base, maxOutputTokens: 32 }).textStream) pieces.push(piece);
    return piecesOf(pieces);
  });
  await step(name, "tool call", async () => {
    const look_up = tool({ description: "Look a place up.", strict: true, inputSchema: Place });
    const toolChoice = { type: "tool", toolName: "look_up" };
    const answer = await generateText({ ...base, maxOutputTokens: 128, tools: { look_up }, toolChoice });
    return placeOf(answer.toolCalls[0].input);
  });
  await step(name, "JSON schema", async () => {
    const output = Output.object({ schema: Place });
    return placeOf((await generateText({ ...base, maxOutputTokens: 128, output })).output);
  });
}

await withOpenAI();
await withAiSdk();
