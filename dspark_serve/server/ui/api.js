// The server's API: requests with the key, answers as events. Must not know: the page, but for the dialog that asks
// for the key. Paths are relative, so that the page works behind a proxy that serves it under a prefix.

import { byId } from "./dom.js";

const KEY = "dspark-key";
const REFUSED = "the server asks for a key: give it with the button Key above";
let asking = null; // the one question for the key that is open, if any
let declined = false; // whoever waved the question away is not asked again unasked

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Ask for the key; resolves once there is one. ApiError 401 if the question was waved away. */
export function askForKey(problem = "") {
  asking ??= new Promise((resolve, reject) => {
    const dialog = byId("key-dialog");
    const form = byId("key-form");
    byId("key-button").hidden = false;
    byId("key-problem").textContent = problem;
    byId("key").value = "";
    const done = new AbortController();
    const options = { signal: done.signal };
    const finish = () => {
      done.abort();
      asking = null;
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, byId("key").value.trim());
      declined = false;
      finish();
      dialog.close();
      resolve();
    }, options);
    byId("key-cancel").addEventListener("click", () => dialog.close(), options);
    dialog.addEventListener("close", () => {
      declined = true;
      finish();
      reject(new ApiError(401, REFUSED));
    }, options);
    dialog.showModal();
  });
  return asking;
}

/** fetch with the key; asks for it, as often as needed, when the server wants one. ApiError for all but a success. */
async function request(path, options = {}) {
  for (;;) {
    if (declined) throw new ApiError(401, REFUSED);
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    if (response.status !== 401) throw new ApiError(response.status, await problem(response));
    await askForKey(key ? "The server did not take that key." : "");
  }
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

export async function getJson(path) {
  return (await request(path)).json();
}

/** The chunks of a streamed answer, as they come. ApiError if the server fails while it streams. */
export async function* stream(path, body, signal) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await request(path, options);
  let buffer = "";
  let whole = false;
  for await (const text of chunksOf(response.body.pipeThrough(new TextDecoderStream()))) {
    buffer += text;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue; // an empty line, or a comment that keeps the connection open
      if (line === "data: [DONE]") whole = true; // read on to the end: the connection serves the next request
      if (whole) continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new ApiError(500, chunk.error.message);
      yield chunk;
    }
  }
  if (!whole) throw new ApiError(500, "the connection ended in the middle of the answer");
}

async function* chunksOf(readable) {
  const reader = readable.getReader(); // not every browser iterates over a stream itself
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
