// The page, top to bottom: which view is shown, the key, and what is asked once the server answers.

import { get, hasKey, needsKey, onMissingKey, setKey } from "./api.js";
import { listModels, startChat } from "./chat.js";
import { at } from "./dom.js";
import { startLive, wake } from "./live.js";
import { showProof } from "./proof.js";
import { showUsage } from "./usage.js";

const VIEWS = ["chat", "live", "proof", "api"];

function showView(name) {
  const view = VIEWS.includes(name) ? name : "chat";
  document.body.dataset.view = view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.to === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function startViews() {
  for (const link of document.querySelectorAll("nav a, .skip")) {
    link.addEventListener("click", (event) => {
      event.preventDefault(); // with a proxy's prefix as base, "#chat" would be another page
      if (link.dataset.to) location.hash = link.dataset.to;
      else at("question").focus();
    });
  }
  addEventListener("hashchange", () => showView(location.hash.slice(1)));
  showView(location.hash.slice(1));
}

function startKey() {
  const dialog = at("key-dialog");
  const ask = (why) => {
    at("key-error").textContent = why;
    if (!dialog.open) dialog.showModal();
  };
  onMissingKey(ask);
  at("change-key").hidden = !needsKey;
  at("change-key").addEventListener("click", () => ask(""));
  at("key-cancel").addEventListener("click", () => dialog.close());
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(at("key").value);
    at("key").value = "";
    dialog.close();
    wake();
  });
  if (needsKey && !hasKey()) ask("");
}

/** What does not change while the server runs; asked for again when it has come back, since it may be another one. */
async function askOnce() {
  const proof = await get("lowbit/proof");
  document.title = `${proof.model} · Lowbit`;
  showProof(proof);
  showUsage(proof.model);
  await listModels();
}

startViews();
startChat();
startKey();
startLive(askOnce);
