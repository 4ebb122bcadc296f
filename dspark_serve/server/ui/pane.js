// One answer on the page: its tokens as they stream in, coloured by how they came to be, and how fast they came.
// Must not know: requests, the conversation.

import { make } from "./dom.js";

const WORDS = { plain: "plain", draft: "drafted", bonus: "bonus" };

export class Pane {
  /** title: what stands above the answer. */
  constructor(title) {
    this.counts = { plain: 0, draft: 0, bonus: 0 };
    this.byDrafter = {};
    this.text = "";
    this.finish = null; // why the answer ended, once it has
    this.report = null; // the server's own of speculation, from the last chunk
    this.tokens = []; // a span each
    this.rate = null; // tokens per second after the first
    this.speed = make("span", "speed");
    this.body = make("div", "text");
    this.foot = make("p", "foot");
    this.root = make("article", "pane", make("h3", "", title, this.speed), this.body, this.foot);
    this.root.setAttribute("aria-label", title);
    this.root.setAttribute("aria-busy", "true");
  }

  /** Add what one chunk of the stream brings. */
  add(chunk, now = performance.now()) {
    this.report = chunk.metrics?.speculative_decoding ?? this.report;
    for (const choice of chunk.choices) {
      const before = this.tokens.length;
      for (const mark of choice.tokens ?? []) this.mark(mark);
      this.finish = choice.finish_reason ?? this.finish;
      if (this.tokens.length > before) this.time(now);
    }
    this.describe();
  }

  mark({ index, text, source, position, drafter }) {
    this.text += text;
    if (source === undefined) {
      this.tokens[index].textContent += text; // held back until now
      return;
    }
    const token = make("span", "t", text);
    token.dataset.source = source;
    if (source === "draft") {
      token.dataset.position = position;
      token.dataset.drafter = drafter;
      this.byDrafter[drafter] = (this.byDrafter[drafter] ?? 0) + 1;
    }
    token.title = source === "draft" ? `draft ${position + 1} of ${drafter}, accepted` : source;
    this.counts[source] += 1;
    this.tokens[index] = token;
    this.body.append(token);
  }

  /** Tokens per second, without those of the first chunk: the prompt's time is not theirs. */
  time(now) {
    if (this.begun === undefined) {
      this.begun = now;
      this.head = this.tokens.length;
    } else {
      this.rate = (1000 * (this.tokens.length - this.head)) / (now - this.begun);
    }
  }

  describe() {
    this.speed.textContent = this.rate === null ? "" : `${this.rate.toFixed(1)} tokens/s`;
    const drafts = Object.entries(this.byDrafter).map(([name, count]) => `${name} ${count}`).join(", ");
    const shown = Object.keys(WORDS).filter((source) => this.counts[source]).map((source) => {
      return `${this.counts[source]} ${WORDS[source]}${source === "draft" ? ` (${drafts})` : ""}`;
    });
    const parts = [`${this.tokens.length} tokens: ${shown.join(", ") || "none yet"}`];
    if (this.finish === "length") parts.push("ended at max tokens");
    if (this.report?.num_spec_steps) {
      const { num_accepted_draft_tokens: accepted, num_kept_draft_tokens: kept, mean_acceptance_length: mean } = this.report;
      parts.push(`${accepted} of ${kept} verified drafts accepted, ${mean.toFixed(2)} tokens per such step`);
    }
    this.foot.textContent = parts.join(" · ");
  }

  end(note = "") {
    this.root.setAttribute("aria-busy", "false");
    if (note) this.body.append(make("p", "note", note));
  }

  fail(message) {
    this.failed = true;
    const alert = make("p", "problem", message);
    alert.setAttribute("role", "alert");
    this.body.append(alert);
    this.end();
  }

  /** Show the tokens from this character of the text on as different. */
  differFrom(offset) {
    let length = 0;
    for (const token of this.tokens) {
      length += token.textContent.length;
      if (length > offset) token.classList.add("differs");
    }
  }
}

/** Where two texts part; -1 if they are equal. */
export function firstDifference(a, b) {
  const length = Math.max(a.length, b.length);
  for (let at = 0; at < length; at += 1) if (a[at] !== b[at]) return at;
  return -1;
}
