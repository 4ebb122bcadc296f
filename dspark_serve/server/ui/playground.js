// The playground: a conversation whose answers are streamed with drafts, without them, or both side by side.
// Must not know: how tokens are shown, what the server measures.

import { stream } from "./api.js";
import { byId, make } from "./dom.js";
import { Pane, firstDifference } from "./pane.js";

const TITLES = { on: "With drafts", off: "Without drafts" };

let messages = []; // of the conversation, as the API takes them
let running = null; // the AbortController of the answers that are being streamed

/** `facts`: gives the answer of /server_info. */
export function start(facts) {
  const form = byId("composer");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else send(facts);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) form.requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  byId("new-chat").addEventListener("click", clear);
  for (const radio of form.elements.mode) radio.addEventListener("change", modeChanged);
  modeChanged();
  byId("settings").open = matchMedia("(width >= 640px)").matches; // elsewhere they would fill the screen
  form.addEventListener("invalid", () => (byId("settings").open = true), true); // what is wrong must be seen
}

const mode = () => byId("composer").elements.mode.value;

function modeChanged() {
  byId("together-field").hidden = mode() !== "both";
}

function clear() {
  running?.abort();
  setRunning(null);
  messages = [];
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  byId("welcome").hidden = false;
  announce("");
  byId("prompt").focus();
}

function announce(text) {
  byId("announce").textContent = text;
}

/** What the form says, with a seed of our own where it has none: both sides must have the same. */
function settings() {
  const seed = byId("seed").value;
  return {
    temperature: byId("temperature").valueAsNumber,
    max_tokens: byId("max-tokens").valueAsNumber,
    seed: seed === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number(seed),
  };
}

async function send(facts) {
  const prompt = byId("prompt").value.trim();
  if (!prompt) {
    byId("prompt").focus();
    return;
  }
  const mine = new AbortController();
  const conversation = [...messages, { role: "user", content: prompt }];
  const chosen = settings();
  const panes = (mode() === "both" ? ["on", "off"] : [mode()]).map((side) => [side, new Pane(TITLES[side])]);
  const verdict = addTurn(prompt, panes, chosen.seed);
  byId("prompt").value = "";
  setRunning(mine);
  const answer = ([side, pane]) => fill(pane, { ...chosen, messages: conversation }, side === "on", mine.signal);
  if (byId("together").checked) await Promise.all(panes.map(answer));
  else for (const pane of panes) await answer(pane);
  if (running !== mine) return; // the conversation was cleared
  const first = panes[0][1];
  if (first.text) messages = [...conversation, { role: "assistant", content: first.text }];
  if (panes.length > 1) {
    const [outcome, sentence] = await judge(first, panes[1][1], mine.signal.aborted, facts);
    verdict.textContent = sentence;
    verdict.dataset.outcome = outcome;
  }
  announce(verdict.textContent || "The answer is complete.");
  follow();
  if (running === mine) setRunning(null);
}

async function fill(pane, body, enabled, signal) {
  if (signal.aborted) return pane.end("not asked");
  const speculation = { enabled, mark_tokens: true };
  try {
    for await (const chunk of stream("v1/chat/completions", { ...body, stream: true, speculation }, signal)) {
      pane.add(chunk);
      follow();
    }
    pane.end();
  } catch (error) {
    if (signal.aborted) pane.end("stopped");
    else pane.fail(error.message);
  }
}

/** What becomes of the comparison of two answers, and the sentence that says so; where they differ is shown in both. */
async function judge(on, off, stopped, facts) {
  if (stopped || on.failed || off.failed) return ["none", "Not compared: an answer is not complete."];
  const at = firstDifference(on.text, off.text);
  const faster = on.rate && off.rate ? ` With drafts ${(on.rate / off.rate).toFixed(2)} times as fast.` : "";
  if (at < 0) return ["identical", `Identical.${faster}`];
  on.differFrom(at);
  off.differFrom(at);
  const { engine } = await facts();
  const why = engine.verify_mode === "rejection" ? " This server keeps the distribution, not the text." : "";
  return ["differs", `They differ from character ${at + 1} on.${why}${faster}`];
}

function addTurn(prompt, panes, seed) {
  byId("welcome").hidden = true;
  const verdict = make("p", "verdict");
  const sides = make("div", "sides", ...panes.map(([, pane]) => pane.root));
  sides.dataset.count = panes.length;
  const question = make("p", "question", prompt);
  byId("conversation").append(make("section", "turn", question, sides, verdict, make("p", "seed", `seed ${seed}`)));
  follow(true);
  return verdict;
}

/** Keep the end of the conversation in view, unless the reader has gone elsewhere. */
function follow(always = false) {
  const turn = byId("conversation").lastElementChild;
  const below = turn.getBoundingClientRect().bottom - byId("legend").getBoundingClientRect().top;
  if (always || below < 160) turn.scrollIntoView({ block: "end" });
}

function setRunning(controller) {
  running = controller;
  byId("send").textContent = controller ? "Stop" : "Send";
  byId("composer").dataset.running = Boolean(controller);
}
