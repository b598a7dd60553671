// The server as the page asks it. The key lives in this module's memory: no cookie, no storage, no address.

let key = "";
let askForKey = () => {};

export const needsKey = document.documentElement.dataset.keys === "yes";
export const hasKey = () => key !== "";
export const setKey = (given) => (key = given.trim());
export const onMissingKey = (ask) => (askForKey = ask);

/** An address of this server; relative to the page, so that a proxy's prefix stays before it. */
export const address = (path) => new URL(path, document.baseURI).href;

/** What the server refused, with its own words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(more = {}) {
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function checked(response) {
  if (response.ok) return response;
  const text = await response.text();
  let message = text || response.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // not in OpenAI's shape: a proxy's answer
  }
  if (response.status === 401) {
    askForKey(key ? "The server does not know this key." : "");
    key = ""; // it is not tried again and again
  }
  throw new Refused(response.status, message.slice(0, 500));
}

/** A JSON document of this server. */
export async function get(path) {
  const response = await fetch(address(path), { headers: headers(), cache: "no-store", redirect: "error" });
  return (await checked(response)).json();
}

/** The state of a server that loads or has loaded, which needs no key. */
export async function startup() {
  const response = await fetch(address("startupz"), { cache: "no-store", redirect: "error" });
  return { started: response.ok, ...(await response.json().catch(() => ({}))) };
}

/** Each JSON event of a streamed answer, until it ends; raises Refused for the server's refusal or a failed stream. */
export async function* stream(path, body, signal) {
  const response = await checked(
    await fetch(address(path), {
      method: "POST",
      headers: headers({ "content-type": "application/json" }),
      body: JSON.stringify(body),
      redirect: "error",
      signal,
    }),
  );
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Refused(500, String(event.error.message ?? "the stream failed"));
    yield event;
  }
  throw new Refused(500, "the connection ended before the answer did");
}

/** The data of server-sent events, whatever pieces they arrive in. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}
