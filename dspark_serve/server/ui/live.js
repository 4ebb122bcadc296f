// The live panel: asks the server once a second and draws what it says. Must not know: the playground.

import { ApiError, getJson } from "./api.js";
import { draw, roundUp, short } from "./charts.js";
import { byId } from "./dom.js";

const EVERY_MS = 1000;
const SAMPLES = 120; // two minutes
const STEPS = 192; // bars of the budget
const DOTS = 240; // steps beside the cost curve

const samples = []; // one per answer: time, rates and levels
let steps = []; // the last of the engine, oldest first
let known = 0; // steps the server has told of

/** Begin to ask. `facts`: gives the answer of /server_info. */
export function start(facts) {
  let timer = 0;
  const tick = async () => {
    clearTimeout(timer);
    if (document.visibilityState === "visible") {
      try {
        const stats = await getJson(`stats?after=${known}`);
        show(stats.state);
        if (stats.state !== "loading") render(take(stats), await facts());
      } catch (error) {
        show("away", error instanceof ApiError ? error.message : "the server does not answer");
      }
    }
    timer = setTimeout(tick, EVERY_MS);
  };
  tick();
}

function show(state, text = state) {
  byId("state").dataset.state = state;
  byId("state-text").textContent = text;
}

/** Remember an answer; a server that was started anew is begun with anew. */
function take(stats) {
  const before = samples.at(-1);
  if (stats.num_steps < known || (before && stats.now_s < before.time)) {
    samples.length = 0;
    steps = [];
  }
  known = stats.num_steps;
  steps = [...steps, ...stats.steps].slice(-DOTS);
  const last = samples.at(-1);
  const rate = last ? (stats.generated_tokens - last.generated) / (stats.now_s - last.time) : 0;
  samples.push({ time: stats.now_s, generated: stats.generated_tokens, rate, stats });
  if (samples.length > SAMPLES) samples.shift();
  return stats;
}

function render(stats, { engine }) {
  speed();
  acceptance(stats, engine);
  budget();
  cost(stats.curve, engine);
  requests(stats);
  pool(stats, engine);
}

function plot(id, value, spec) {
  const figure = byId(id);
  figure.querySelector("output").textContent = value;
  draw(figure.querySelector("svg"), { ...spec, label: `${spec.label}: ${value}` });
}

/** The last two minutes, as x of a chart, and a series of them. */
function minutes() {
  const now = samples.at(-1).time;
  const x = { min: -SAMPLES * (EVERY_MS / 1000), max: 0, ticks: [[-120, "−2 min"], [-60, "−1 min"], [0, "now"]] };
  return [x, (of) => samples.map((sample) => [sample.time - now, of(sample)])];
}

function speed() {
  const [x, series] = minutes();
  const points = series((sample) => sample.rate);
  const max = roundUp(Math.max(...points.map(([, rate]) => rate)));
  const value = short(samples.at(-1).rate);
  plot("chart-speed", value, { label: "Tokens per second", x, y: { max }, layers: [{ kind: "area", className: "accent", points }] });
}

/** Acceptance in the last two minutes; where nothing was drafted in them, since the start. */
function acceptance(stats, engine) {
  const first = samples[0].stats.positions;
  let counts = stats.positions.map(({ tried, accepted }, place) => ({
    tried: tried - (first[place]?.tried ?? 0),
    accepted: accepted - (first[place]?.accepted ?? 0),
  }));
  if (!counts.some(({ tried }) => tried)) counts = stats.positions;
  const width = Math.max(engine.num_speculative_tokens, counts.length, 1);
  const points = counts.map(({ tried, accepted }, place) => [place + 1, tried ? accepted / tried : 0]);
  const tried = counts.reduce((sum, each) => sum + each.tried, 0);
  const accepted = counts.reduce((sum, each) => sum + each.accepted, 0);
  const value = tried ? `${Math.round((100 * accepted) / tried)} %` : "no drafts yet";
  const stride = Math.ceil(width / 8);
  const ticks = Array.from({ length: width }, (_, place) => [place + 1, String(place + 1)]).filter((_, place) => place % stride === 0);
  plot("chart-acceptance", value, {
    label: "Acceptance of drafts by position",
    x: { min: 0.4, max: width + 0.6, ticks },
    y: { max: 1, text: (share) => `${share * 100}%` },
    layers: [{ kind: "bars", className: "accent", points, width: 0.7 }],
  });
}

function budget() {
  const shown = steps.slice(-STEPS);
  const of = (name) => shown.map((step, place) => [place - shown.length + 1, step[name]]);
  const mean = (name) => shown.reduce((sum, step) => sum + step[name], 0) / Math.max(shown.length, 1);
  const max = roundUp(Math.max(1, ...shown.map((step) => step.kept)));
  plot("chart-budget", shown.length ? `${short(mean("kept"))} kept, ${short(mean("accepted"))} accepted` : "–", {
    label: "Drafts per step",
    x: { min: -STEPS, max: 0.5, ticks: [[-STEPS, `−${STEPS} steps`], [-STEPS / 2, `−${STEPS / 2}`], [0, "last"]] },
    y: { max },
    layers: [
      { kind: "bars", className: "faint", points: of("kept"), width: 0.75 },
      { kind: "bars", className: "accent", points: of("accepted"), width: 0.75 },
    ],
  });
}

function cost(curve, engine) {
  const measured = steps.map((step) => [step.tokens, step.ms]);
  const predicted = steps.filter((step) => step.predicted_ms !== null);
  const off = predicted.map((step) => Math.abs(step.ms / step.predicted_ms - 1)).sort((a, b) => a - b);
  const model = curve ? curve.tokens.map((tokens, place) => [tokens, curve.step_ms[place]]) : [];
  const largest = Math.max(16, ...steps.map((step) => step.tokens));
  const max = 2 ** Math.ceil(Math.log2(largest));
  const inside = model.filter(([tokens]) => tokens <= max);
  const typical = measured.map(([, ms]) => ms).sort((a, b) => a - b)[Math.floor(measured.length * 0.98)] ?? 0;
  const tallest = Math.max(typical, inside.at(-1)?.[1] ?? 0, 0.001);
  const ticks = [];
  for (let tokens = 1; tokens <= max; tokens *= max > 64 ? 4 : 2) ticks.push([tokens, tokens === 1 ? "1 token" : String(tokens)]);
  byId("chart-cost").title = curve ? explain(curve) : "";
  const median = off.length ? `off by ${Math.round(100 * off[Math.floor(off.length / 2)])} %` : "nothing predicted yet";
  plot("chart-cost", curve ? median : `budget ${engine.budget}: no model`, {
    label: "Milliseconds of a step by its tokens; line predicted, dots measured",
    x: { min: 1, max, log: true, ticks },
    y: { max: roundUp(tallest), text: (ms) => (ms >= 1000 ? `${short(ms / 1000)} s` : `${short(ms)} ms`) },
    layers: [
      { kind: "dots", className: "ring", points: predicted.map((step) => [step.tokens, step.predicted_ms]) },
      { kind: "dots", className: "accent", points: measured },
      { kind: "line", className: "ink", points: inside },
    ],
  });
}

function explain({ rows, context, draft_ms: draft, slowdown }) {
  const load = `${rows} row${rows === 1 ? "" : "s"} with ${context} keys`;
  return `Line: what is expected of ${load}; drafting beside it ${short(draft)} ms. Rings: what was expected of each step. ` +
    `Dots: what it took. The machine takes ${slowdown.toFixed(2)} times what was measured at the start.`;
}

function requests(stats) {
  const [x, series] = minutes();
  const max = roundUp(Math.max(2, ...samples.map((sample) => Math.max(sample.stats.running, sample.stats.waiting))));
  plot("chart-queue", `${stats.running} running, ${stats.waiting} waiting`, {
    label: "Requests",
    x,
    y: { max },
    layers: [
      { kind: "area", className: "accent", points: series((sample) => sample.stats.running) },
      { kind: "line", className: "warm", points: series((sample) => sample.stats.waiting) },
    ],
  });
}

function pool(stats, engine) {
  const [x, series] = minutes();
  const highest = Math.max(...samples.map((sample) => sample.stats.kv_used));
  const max = Math.min(1, roundUp(Math.max(highest, 0.01)));
  const used = Math.round(stats.kv_used * engine.pool_tokens);
  plot("chart-pool", `${used.toLocaleString("en")} of ${engine.pool_tokens.toLocaleString("en")} tokens`, {
    label: "K/V pool in use",
    x,
    y: { max, text: (share) => `${+(share * 100).toFixed(1)}%` },
    layers: [{ kind: "area", className: "accent", points: series((sample) => sample.stats.kv_used) }],
  });
}
