// Starts the page: the facts in its head, the live panel, the playground.

import { askForKey, getJson } from "./api.js";
import { byId } from "./dom.js";
import * as live from "./live.js";
import * as playground from "./playground.js";

let asked = null;

/** The answer of /server_info; asked for once, and again after a failure. */
function facts() {
  asked ??= getJson("server_info").catch((error) => {
    asked = null;
    throw error;
  });
  return asked.then((info) => {
    describe(info);
    return info;
  });
}

function describe({ engine, config }) {
  const name = config.server.served_model_name ?? engine.model;
  const drafts = engine.drafter === "none" ? "no drafts" : `${engine.drafter}, up to ${engine.num_speculative_tokens} drafts`;
  byId("facts").textContent = [name, engine.device, drafts, `budget ${engine.budget}`, engine.verify_mode].join(" · ");
  document.title = `${name} · dspark-serve`;
}

byId("key-button").addEventListener("click", () => askForKey().catch(() => {}));
playground.start(facts);
live.start(facts);
