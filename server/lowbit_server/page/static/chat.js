// The conversation: questions, answers of one model or of two side by side, and the settings of the next question.

import { Answer } from "./answer.js";
import { get } from "./api.js";
import { at, h } from "./dom.js";

const IDEAS = [
  "Explain in three sentences what quantizing a language model does.",
  "Write a Python function that checks whether a word is a palindrome.",
  "Make a table of three planets with their diameter and number of moons.",
];
const NEAR_END_PX = 80;

let turns = []; // {question, answers: [Answer, …], row}
let follows = true; // the newest text stays in view until a person scrolls up

export function startChat() {
  const question = at("question");
  const talk = at("talk");
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(question.value);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask(question.value);
  });
  question.addEventListener("input", () => fit(question));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !at("key-dialog").open) stop();
  });
  at("stop").addEventListener("click", stop);
  at("new-chat").addEventListener("click", clear);
  at("toggle-settings").addEventListener("click", toggleSettings);
  at("ideas").append(
    ...IDEAS.map((idea) => h("button", { type: "button", class: "idea", onclick: () => ask(idea) }, idea)),
  );
  talk.addEventListener(
    "scroll",
    () => {
      follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < NEAR_END_PX;
    },
    { passive: true },
  );
  talk.addEventListener("drawn", toEnd);
}

/** Fill the lists of models; what was chosen stays chosen where it is still there. */
export async function listModels() {
  const cards = (await get("v1/models")).data;
  const options = () => cards.map((card) => h("option", { value: card.id }, card.id));
  for (const [select, first] of [
    [at("model"), []],
    [at("beside"), [h("option", { value: "" }, "none")]],
  ]) {
    const chosen = select.value;
    select.replaceChildren(...first, ...options());
    if (cards.some((card) => card.id === chosen)) select.value = chosen;
  }
  const longest = cards[0]?.max_model_len;
  if (longest) at("max-tokens").max = longest;
}

function running() {
  return turns.flatMap((turn) => turn.answers).filter((answer) => answer.running);
}

function ask(text) {
  const question = text.trim();
  if (!question || !at("model").value || running().length) return;
  if (!at("composer").checkValidity()) {
    toggleSettings(null, true);
    at("composer").reportValidity();
    return;
  }
  at("question").value = "";
  fit(at("question"));
  at("welcome").hidden = true;
  const models = [at("model").value, at("beside").value].filter(Boolean);
  const turn = { question, answers: [], row: h("div", { class: "answers" }) };
  turns.push(turn);
  at("turns").append(
    h("li", {}, h("div", { class: "question" }, h("h3", { class: "unseen" }, "You"), h("p", {}, question)), turn.row),
  );
  turn.answers = models.map((model, column) => answer(turn, model, column, models.length > 1));
  turn.row.replaceChildren(...turn.answers.map((one) => one.element));
  showState();
  follows = true;
  toEnd();
}

/** An answer that has begun. */
function answer(turn, model, column, titled) {
  const one = new Answer(model, {
    titled,
    onEnd: ended,
    onRegenerate: () => {
      if (turns.at(-1) !== turn || running().length) return;
      turn.answers[column].element.replaceWith((turn.answers[column] = answer(turn, model, column, titled)).element);
      showState();
      at("talk").focus();
    },
  });
  one.run(messages(turn, column), settings());
  return one;
}

/** What came before, as this column has it; where there was one answer, both columns have that. */
function messages(turn, column) {
  const system = at("system").value.trim();
  const list = system ? [{ role: "system", content: system }] : [];
  for (const before of turns.slice(0, turns.indexOf(turn))) {
    const given = before.answers[column] ?? before.answers[0];
    if (given.text) {
      list.push({ role: "user", content: before.question }, { role: "assistant", content: given.text });
    }
  }
  return [...list, { role: "user", content: turn.question }];
}

function settings() {
  const temperature = at("temperature").value;
  const most = at("max-tokens").value;
  return { ...(temperature && { temperature: Number(temperature) }), ...(most && { max_tokens: Number(most) }) };
}

function ended(one) {
  at("said").textContent = one.summary;
  showState();
  toEnd();
}

function stop() {
  for (const one of running()) one.stop();
}

function clear() {
  stop();
  turns = [];
  at("turns").replaceChildren();
  at("welcome").hidden = false;
  at("question").focus();
}

/** Which buttons there are now: one of Send and Stop; Regenerate under the last answers only. */
function showState() {
  const busy = running().length > 0;
  const stopHadFocus = document.activeElement === at("stop");
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  if (!busy && stopHadFocus) at("question").focus();
  for (const turn of turns) {
    for (const one of turn.answers) one.again.hidden = busy || turn !== turns.at(-1);
  }
}

function toggleSettings(_event, open = at("settings").hidden) {
  at("settings").hidden = !open;
  at("toggle-settings").setAttribute("aria-expanded", String(open));
}

function toEnd() {
  if (follows) at("talk").scrollTop = at("talk").scrollHeight;
}

function fit(textarea) {
  textarea.style.height = "auto";
  textarea.style.height = `${Math.min(textarea.scrollHeight, 200)}px`;
}
