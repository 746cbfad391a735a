"use strict";
// Reads /metrics and /ready every two seconds and shows what a person asks first.
const PERIOD = 2000, WINDOW = 30; // samples in a minute
const $ = (id) => document.getElementById(id);
const samples = [];
const lines = { rate: [], p95: [], tokens: [], "mean-k": [] };
let token = sessionStorage.getItem("token") || "";
let fresh = 0;
// ?theme=dark and ?theme=light win over the system's choice: for a screen on a wall.
const theme = new URLSearchParams(location.search).get("theme");
if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;

// Prometheus text -> Map of name -> [{labels, value}].
function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const m = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/.exec(line);
    if (!m) continue;
    const labels = {};
    for (const l of (m[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[l[1]] = l[2];
    if (!found.has(m[1])) found.set(m[1], []);
    found.get(m[1]).push({ labels, value: m[3] === "+Inf" ? Infinity : Number(m[3]) });
  }
  return found;
}
const rows = (m, name) => m.get(name) || [];
const total = (m, name, keep = () => true) =>
  rows(m, name).reduce((sum, r) => sum + (keep(r.labels) ? r.value : 0), 0);
const has = (m, name) => m.has(name);

function delta(now, then, name, keep) {
  return Math.max(0, total(now, name, keep) - (then ? total(then, name, keep) : 0));
}
// Counts of a cumulative histogram in ascending order: [upper bound, count].
function buckets(now, then, name) {
  const at = new Map();
  for (const r of rows(now, name + "_bucket")) {
    const le = r.labels.le === "+Inf" ? Infinity : Number(r.labels.le);
    at.set(le, (at.get(le) || 0) + r.value);
  }
  if (then) for (const r of rows(then, name + "_bucket")) {
    const le = r.labels.le === "+Inf" ? Infinity : Number(r.labels.le);
    at.set(le, (at.get(le) || 0) - r.value);
  }
  const sorted = [...at].sort((a, b) => a[0] - b[0]);
  let before = 0;
  return sorted.map(([le, c]) => { const own = Math.max(0, c - before); before = c; return [le, own]; });
}
function quantile(parts, q) {
  const all = parts.reduce((s, p) => s + p[1], 0);
  if (!all) return null;
  let seen = 0, low = 0;
  for (const [le, count] of parts) {
    if (seen + count >= q * all) {
      if (le === Infinity) return low;
      return low + (le - low) * (q * all - seen) / Math.max(count, 1);
    }
    seen += count; low = le === Infinity ? low : le;
  }
  return low;
}
function short(v, digits = 3) {
  if (v === null || v === undefined || !Number.isFinite(v)) return "–";
  if (v === 0) return "0";
  const a = Math.abs(v);
  if (a >= 1e9) return (v / 1e9).toPrecision(digits) + " G";
  if (a >= 1e6) return (v / 1e6).toPrecision(digits) + " M";
  if (a >= 1e4) return (v / 1e3).toPrecision(digits) + " k";
  return Number(v.toPrecision(digits)).toString();
}
const bytes = (v) => (Number.isFinite(v) ? (v / 2 ** 20).toFixed(v < 10 * 2 ** 20 ? 1 : 0) + " MiB" : "–");
const percent = (v) => (Number.isFinite(v) ? (100 * v).toFixed(1) + " %" : "–");

function text(id, value) { $(id).textContent = value; }
function bars(id, parts) {
  const box = $(id), top = Math.max(...parts.map((p) => p[1]), 1e-9);
  if (box.childElementCount !== 3 * parts.length) {
    box.replaceChildren();
    for (let i = 0; i < parts.length; i++)
      box.append(document.createElement("span"), document.createElement("meter"), document.createElement("span"));
  }
  parts.forEach(([label, share], i) => {
    const [a, meter, b] = [0, 1, 2].map((j) => box.children[3 * i + j]);
    a.textContent = label; meter.value = share / top; b.textContent = percent(share);
    meter.setAttribute("aria-label", `${label}: ${percent(share)}`);
  });
}
function list(id, pairs) {
  const box = $(id);
  box.replaceChildren();
  for (const [name, value, mood] of pairs) {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name; dd.textContent = value;
    if (mood) dd.className = mood;
    box.append(dt, dd);
  }
}
function spark(id, value) {
  const line = lines[id];
  line.push(value); if (line.length > 2 * WINDOW) line.shift();
  const canvas = $(id + "-line"), scale = devicePixelRatio || 1;
  const w = canvas.clientWidth * scale, h = canvas.clientHeight * scale;
  canvas.width = w; canvas.height = h;
  const pen = canvas.getContext("2d"), ink = getComputedStyle(document.body);
  const shown = line.map((v) => (v === null ? 0 : v)), top = Math.max(...shown, 1e-9) * 1.15;
  const step = w / (2 * WINDOW - 1), start = w - step * (shown.length - 1);
  pen.lineWidth = 1.6 * scale; pen.strokeStyle = ink.getPropertyValue("--bar"); pen.lineJoin = "round";
  pen.beginPath();
  shown.forEach((v, i) => pen.lineTo(start + i * step, h - 1.5 * scale - (v / top) * (h - 3 * scale)));
  pen.stroke();
}

function show(m, ready) {
  const now = performance.now();
  samples.push({ m, now }); if (samples.length > WINDOW) samples.shift();
  // The first sample has nothing to differ from: it is shown as totals since the start.
  const first = samples.length > 1 ? samples[0] : null;
  const then = first && first.m, seconds = first ? (now - first.now) / 1000 : null;
  const rate = (name, keep) => (seconds ? delta(m, then, name, keep) / seconds : null);

  const requests = rate("moe_requests_total"), tokens = rate("moe_tokens_total");
  let times = buckets(m, then, "moe_request_duration_seconds"), since = "last minute";
  if (!times.some((t) => t[1])) { times = buckets(m, null, "moe_request_duration_seconds"); since = "since the start"; }
  const ms = (q) => { const v = quantile(times, q); return v === null ? null : 1000 * v; };
  let ks = buckets(m, then, "moe_experts_per_token");
  if (!ks.some((t) => t[1])) ks = buckets(m, null, "moe_experts_per_token");
  const count = ks.reduce((s, k) => s + k[1], 0);
  const sum = total(m, "moe_experts_per_token_sum"), n = total(m, "moe_experts_per_token_count");
  const meanK = n ? sum / n : null;
  text("rate", short(requests)); spark("rate", requests);
  text("rate-note", `${short(total(m, "moe_requests_total"))} since the start`);
  text("p95", short(ms(0.95))); spark("p95", ms(0.95));
  text("p95-note", `p50 ${short(ms(0.5))} ms, p99 ${short(ms(0.99))} ms, ${since}`);
  text("tokens", short(tokens)); spark("tokens", tokens);
  text("tokens-note", `${short(total(m, "moe_tokens_total"))} since the start`);
  text("mean-k", meanK === null ? "–" : meanK.toFixed(2)); spark("mean-k", meanK);
  text("drift-note", has(m, "moe_budget_drift_ratio") ? `${short(total(m, "moe_budget_drift_ratio"))} × the budget` : "no budget");

  let experts = rows(m, "moe_expert_assignments_total").map((r) => [r.labels.expert, r.value]);
  experts.sort((a, b) => Number(a[0]) - Number(b[0]));
  const calls = experts.reduce((s, e) => s + e[1], 0);
  bars("experts", experts.map(([e, v]) => [Number.isNaN(Number(e)) ? e : `expert ${e}`, calls ? v / calls : 0]));
  text("balance-note", `balance ${short(total(m, "moe_load_balance_score"))} (1 is even, below 0.5 is an alert); ${short(total(m, "moe_dropped_assignments_total"))} assignments dropped`);
  // From the first k that is used to the last; a bucket may hold several.
  const used = ks.map((k, i) => (k[1] ? i : -1)).filter((i) => i >= 0);
  const parts = ks.map(([k, c], i) => {
    const low = i ? ks[i - 1][0] + 1 : k;
    return [k === Infinity ? `k ≥ ${low}` : low < k ? `k = ${low}–${k}` : `k = ${k}`, count ? c / count : 0];
  }).slice(used[0] || 0, used.length ? used[used.length - 1] + 1 : 1);
  bars("histogram", parts);
  text("histogram-note", `${short(n)} tokens since the start`);

  const cached = (r) => total(m, "moe_cache_requests_total", (l) => l.result === r);
  const asked = total(m, "moe_cache_requests_total");
  list("cache", [
    ["hits", asked ? percent(cached("hit") / asked) : "–"],
    ["lookups", short(asked)],
    ["held", bytes(total(m, "moe_cache_bytes"))],
    ["time saved", short(total(m, "moe_cache_seconds_saved_total")) + " s"],
    ["prefetched", short(total(m, "moe_prefetch_total"))],
  ]);
  const state = rows(m, "moe_circuit_state").filter((r) => r.value === 1).map((r) => r.labels.state)[0] || "unknown";
  list("breaker", [
    ["state", state.replace("_", " "), state === "closed" ? "good" : state === "open" ? "bad" : "warn"],
    ...rows(m, "moe_circuit_transitions_total").map((r) => [`turned ${r.labels.to.replace("_", " ")}`, short(r.value)]),
    ["fallbacks", short(total(m, "moe_fallback_total"))],
  ]);
  list("limits", [
    ["in flight", short(total(m, "moe_inflight_requests"))],
    ["waiting", short(total(m, "moe_pending_requests"))],
    ["blocked clients", short(total(m, "moe_blocked_clients"))],
    ["tokens not finite", short(total(m, "moe_nonfinite_tokens_total"))],
    ["compilations", short(total(m, "moe_compilations_total"))],
  ]);
  const outcomes = rows(m, "moe_requests_total").filter((r) => r.value).map((r) => [r.labels.outcome.replace(/_/g, " "), short(r.value)]);
  const errors = rows(m, "moe_errors_total").filter((r) => r.value).map((r) => [r.labels.code.replace(/_/g, " "), short(r.value), "warn"]);
  list("outcomes", outcomes.length + errors.length ? [...outcomes, ...errors] : [["no requests yet", ""]]);
  const started = total(m, "process_start_time_seconds");
  list("process", [
    ["memory", bytes(total(m, "process_resident_memory_bytes"))],
    ["CPU", seconds ? percent(delta(m, then, "process_cpu_seconds_total") / seconds) : "–"],
    ["open files", short(total(m, "process_open_fds"))],
    ["up", started ? span(Date.now() / 1000 - started) : "–"],
  ]);
  const build = (rows(m, "moe_build_info")[0] || { labels: {} }).labels;
  const named = { version: "", jax: "jax ", backend: "backend ", params: "model version " };
  text("build", Object.keys(named).filter((k) => build[k]).map((k) => named[k] + build[k]).join(" · "));
  const reasons = ready.reasons || [];
  $("state").className = "state " + (ready.ready ? "good" : "warn");
  text("state", ready.ready ? "ready" : "not ready: " + (reasons.join(", ").replace(/_/g, " ") || "unknown"));
}
function span(s) {
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`;
}

// Which router is served: read again when the parameters of moe_build_info change.
let servedVersion = null;
async function showServed(m, headers) {
  const version = (rows(m, "moe_build_info")[0] || { labels: {} }).labels.params;
  if (!version || version === servedVersion) return;
  const answer = await fetch("health", { headers });
  if (!answer.ok) return;
  const router = (await answer.json()).components?.router;
  if (!router?.rule) return;
  const others = (router.layers || []).length - 1, served = Object.keys(router.served_layers || {}).length;
  const range = router.min_experts === router.max_experts ? router.max_experts : `${router.min_experts} to ${router.max_experts}`;
  const budget = router.calibration && router.calibration.fitted ? `, calibrated to a mean of ${router.calibration.target_mean_k.toFixed(2)}` : "";
  const chosen = router.chosen_by === "default" ? "the default" : `chosen by ${router.chosen_by}`;
  const from = router.trained ? `router ${router.layer} of ${router.source}${others > 0 ? ` (one of ${others + 1}, ${chosen})` : ""}` : "untrained weights from a seed";
  const beside = served ? ` All ${served} layers of this rule are served, each under its name.` : "";
  const control = router.control ? " This rule is a control, which drops experts by chance." : "";
  text("served", `Serves ${from}: ${router.rule}, ${range} of ${router.num_experts} experts a token, width ${router.input_dim}${budget}.${beside}${control}`);
  servedVersion = version;
}

async function turn() {
  try {
    const headers = token ? { authorization: "Bearer " + token } : {};
    const [metrics, ready] = await Promise.all([fetch("metrics", { headers }), fetch("ready")]);
    $("login").hidden = metrics.status !== 401;
    const said = await ready.json();
    if (metrics.ok) {
      const m = parse(await metrics.text());
      // Without a request every tile would be empty.
      const idle = total(m, "moe_requests_total") + total(m, "moe_errors_total") === 0;
      $("start").hidden = !idle;
      $("board").hidden = idle;
      show(m, said); fresh = Date.now();
      text("address", location.origin + location.pathname.replace(/\/$/, ""));
      await showServed(m, headers);
    }
    else {
      $("start").hidden = $("board").hidden = true;
      $("state").className = "state warn";
      text("state", metrics.status === 401 ? "admin key needed" : "no metrics");
    }
    document.body.classList.remove("stale");
  } catch {
    $("state").className = "state bad"; text("state", "no answer");
    document.body.classList.add("stale");
  }
  text("age", fresh ? `· as of ${new Date(fresh).toLocaleTimeString()}` : "");
  setTimeout(turn, PERIOD);
}
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value; $("token").value = "";
  sessionStorage.setItem("token", token);
});
turn();
