// Fetches the page's own addresses and puts what changed in place; without it, every link and form still works.
"use strict";

const PARTS = ["counts", "effect", "compare", "list", "row"];
const FILTERS = ["q", "source", "verdict", "reason", "decided", "sort", "text"];
const PATIENCE = 3000; // ms that an answer may take before what is asked for next takes its place
const POLL = 2000; // ms between looks at whether another tab decided something
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
let current = 0; // number of the row that keys act on; 0 where there is none
let gap = 0; // the place in the list of the row that was current, where somebody else's decision took it out
let running = null, again = false, wanted = false, since = 0, stop = null, silent = false;

// --- addresses -------------------------------------------------------------------------------------------------

// The view that is wanted. Browsers let a page set its address some hundred times a minute only, so that follows behind.
let address = new URL(location.href);

function go(changes, push = false) {
  const before = address.href;
  for (const name of ["full", "alike"]) address.searchParams.delete(name);
  if (!["page", "row", "alike", "full"].some((name) => name in changes)) address.searchParams.delete("page");
  for (const [name, value] of Object.entries(changes)) {
    if (value === "" || value === null) address.searchParams.delete(name);
    else address.searchParams.set(name, value);
  }
  clearTimeout(go.timer);
  if (push) {
    history.replaceState(null, "", before);
    history.pushState(null, "", address);
  } else go.timer = setTimeout(() => history.replaceState(null, "", address), 200);
  return refresh();
}

// One request at a time, given up only when it takes long; whatever is asked for meanwhile is one more, of the address
// as it is then. Resolves when what is shown is what was asked for. In the background, it moves nobody to another row.
function refresh(background = false) {
  again = true;
  wanted ||= !background;
  if (running && performance.now() - since > PATIENCE) stop.abort();
  running ??= (async () => {
    while (again) {
      const moves = wanted || acting > 0;
      again = wanted = false;
      since = performance.now();
      stop = new AbortController();
      const answer = await ask(address, { signal: stop.signal });
      const text = answer && (await answer.text().catch(() => null));
      if (text !== null && !(again && stop.signal.aborted)) put(new DOMParser().parseFromString(text, "text/html"), moves);
    }
  })().finally(() => { running = null; });
  return running;
}

async function ask(where, options) {
  try {
    const answer = await fetch(where, options);
    if (silent) say("The server answers again.");
    silent = false;
    if (answer.ok) return answer;
    say(await answer.text(), true);
  } catch (error) {
    if (error.name === "AbortError") return null;
    silent = true;
    say("The server does not answer, so new decisions are not saved. Run gradshield review again; earlier decisions are kept.", true);
  }
  return null;
}

const post = (where, form) => ask(where, { method: "POST", body: new URLSearchParams(form), headers: { Accept: "application/json" } });

// What keys and buttons do waits for what was done before, so that no press acts on a row that is about to change.
let last = Promise.resolve(), acting = 0;
const inOrder = (action) => {
  acting++;
  last = last.then(action).catch((error) => say(String(error), true)).finally(() => { acting--; });
};

function put(page, moves) {
  const old = $("#row"), fresh = $("#row", page);
  const place = Math.max(0, rows().findIndex((line) => number(line) === current));
  const focus = document.activeElement, held = focus && focus.closest("#list, #row, #effect");
  const mark = held && (focus.id ? `#${focus.id}` : focus.dataset.open ? `#${held.id} [data-open="${focus.dataset.open}"]` : `#${held.id}`);
  if (old.dataset.row && old.dataset.row === fresh.dataset.row) {
    for (const each of $$("details", old)) {
      const same = $(`details[data-key="${each.dataset.key}"]`, fresh);
      if (same && same.dataset.unfolded === each.dataset.unfolded) same.open = each.open;
    }
    const note = $("#note", old), field = $("#note", fresh);
    if (note && field && note.value !== note.defaultValue) field.value = note.value;
    fresh.dataset.scroll = old.scrollTop;
  }
  for (const id of PARTS) {
    const was = document.getElementById(id), is = page.getElementById(id);
    if (id === "effect" && focus && focus.id === "exact") continue; // somebody is typing there
    if (was && is) was.replaceWith(document.adoptNode(is));
  }
  if (fresh.dataset.scroll) fresh.scrollTop = fresh.dataset.scroll;
  document.title = page.title;
  if (mark && document.activeElement !== focus && !document.contains(focus)) $(mark)?.focus({ preventScroll: true });
  if (!rows().some((line) => number(line) === current)) {
    if (moves) current = number(rows()[Math.min(place, rows().length - 1)]);
    else if (current) {
      say(`Row ${current} left this list, as it was decided elsewhere. Press j or k for the next or the previous row.`);
      [current, gap] = [0, place];
    }
  }
  const threshold = page.getElementById("drag");
  if (threshold && document.activeElement?.id !== "drag") moveHandle(Number(threshold.value), false);
  if (threshold) $("#drag").setAttribute("aria-valuetext", threshold.getAttribute("aria-valuetext"));
  settle();
}

function settle() {
  document.body.classList.toggle("opened", Boolean($("#row").dataset.row));
  for (const line of rows()) line.classList.toggle("current", number(line) === current);
  if ($("#row").dataset.state === "waiting") watch(Number($("#row").dataset.row));
}

function say(words, trouble = false) {
  if ($("#status").textContent !== words || !trouble) $("#status").textContent = words; // or it is read out again
  $("#status").className = trouble ? "trouble shown" : "shown";
  clearTimeout(say.timer);
  if (!trouble) say.timer = setTimeout(() => $("#status").classList.remove("shown"), 6000);
}

// --- rows ------------------------------------------------------------------------------------------------------

const rows = () => $$("#list tr[data-row]");
const number = (line) => Number(line?.dataset.row ?? 0);
const opened = () => Number($("#row").dataset.row ?? 0);
const acted = () => opened() || current;

// Makes it the row that keys act on; `enter` opens it and takes the focus there, else it is shown if one is open.
async function select(row, enter = false) {
  if (enter && !row) return;
  current = row;
  settle();
  if ((enter || opened()) && row && row !== opened()) await go({ row }, !opened());
  if (enter) return $("#row").focus({ preventScroll: innerWidth > 1100 });
  const link = $(`#list a[data-open="${row}"]`);
  link?.focus({ preventScroll: true });
  link?.closest("tr").scrollIntoView({ block: "nearest" });
}

async function step(by) {
  const lines = rows(), place = lines.findIndex((line) => number(line) === current);
  const next = lines[place >= 0 ? place + by : by > 0 ? gap : gap - 1];
  if (next) return select(number(next));
  const page = Number($("#list").dataset.page) + by;
  if (page < 1 || page > Number($("#list").dataset.pages)) return say(by > 0 ? "This is the last row." : "This is the first row.");
  return turn(page, by < 0);
}

async function turn(page, backwards = false) {
  await go({ page });
  await select(number(rows().at(backwards ? -1 : 0)));
}

async function decide(row, verdict, note) {
  if (!row) return say("No row is chosen. Press j or k, or click one.");
  const place = rows().findIndex((line) => number(line) === row);
  const field = opened() === row ? $("#note") : null;
  if (field && field.value !== field.defaultValue) note ??= field.value; // else the note that stands is kept
  const answer = await post("/decide", note === undefined ? { row, verdict } : { row, verdict, note });
  if (!answer) return;
  const done = await answer.json();
  remember([...remembered(), done]);
  say(`Row ${row}: ${verdict}${done.instead_of ? `, instead of ${done.instead_of}` : ""}. Press u to undo.`);
  document.activeElement?.id === "note" && document.activeElement.blur();
  await refresh();
  const lines = rows(), now = lines.findIndex((line) => number(line) === row);
  const next = now >= 0 ? lines[now + 1] ?? lines[now] : lines[Math.min(Math.max(place, 0), lines.length - 1)];
  if (next && (place >= 0 || !opened())) await select(number(next));
}

async function decideAll(form, verdict) {
  const answer = await post("/decide-all", { ...Object.fromEntries(new FormData(form)), verdict });
  if (!answer) return refresh();
  const done = await answer.json();
  remember([...remembered(), done]);
  say(`${done.rows} rows: ${verdict}. Press u to undo.`);
  return refresh();
}

async function undo() {
  const mine = remembered();
  for (let one = mine.pop(); ; one = mine.pop()) {
    remember(mine);
    if (!one) return say("Nothing to undo in this tab. To undo somebody else's decision, use the row's history.");
    const answer = await post("/undo", one);
    if (!answer) return;
    const done = await answer.json();
    if (!(one.last ? done.rows : done.row !== null)) continue; // somebody took it back already, or it is another run's
    say(one.last ? `${done.rows} decisions are undone.` : done.row ? `Row ${done.row}: ${done.verdict} is undone.` : "The threshold change is undone.");
    await refresh();
    if (done.row) await select(done.row);
    return;
  }
}

const remembered = () => JSON.parse(sessionStorage.getItem("mine") ?? "[]"); // what this tab decided, for its undo
const remember = (done) => sessionStorage.setItem("mine", JSON.stringify(done.map(({ id, last, at, row }) => ({ id, last, at, row }))));

async function explain(row) {
  if (await post("/explain", { row })) await refresh();
}

async function watch(row) {
  if (watch.row === row) return;
  watch.row = row;
  try {
    for (let state = "waiting"; state === "waiting" && opened() === row; ) {
      await new Promise((done) => setTimeout(done, 500));
      const answer = await ask(`/explanation/${row}`);
      if (!answer) return;
      const now = await answer.json();
      if ($("#doing")) $("#doing").textContent = `${now.doing} …`;
      state = now.state;
    }
  } finally {
    watch.row = 0;
  }
  if (opened() === row) await refresh();
}

// --- threshold -------------------------------------------------------------------------------------------------

function moveHandle(value, ask = true) {
  const drag = $("#drag"), low = Number(drag.min), high = Number(drag.max);
  value = Math.min(Math.max(value, low), high);
  const at = (100 * (value - low)) / (high - low);
  drag.value = value;
  $("#below-part").setAttribute("width", `${at}%`);
  $("#above-part").setAttribute("x", `${at}%`);
  if (!ask) return;
  const words = Number(value.toPrecision(4)).toString();
  $("#exact").value = words;
  drag.setAttribute("aria-valuetext", words);
  go({ t: value });
}

function threshold() {
  const drag = $("#drag");
  if (!drag) return;
  const span = drag.max - drag.min;
  drag.addEventListener("input", () => moveHandle(Number(drag.value)));
  drag.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 }[event.key];
    if (event.key === "Home" || event.key === "End") moveHandle(Number(event.key === "Home" ? drag.min : drag.max));
    else if (steps) moveHandle(Number(drag.value) + (steps * span) / (event.shiftKey ? 2000 : 200));
    else return;
    event.preventDefault();
  });
}

// --- events ----------------------------------------------------------------------------------------------------

document.addEventListener("click", (event) => {
  if (event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
  const on = event.target.closest("[data-open], [data-close], [data-go], [data-set], [data-explain], [data-help]");
  const line = !on && !event.target.closest("details, button") && event.target.closest("#list tr[data-row]");
  if (line) inOrder(() => select(number(line), true));
  if (!on) return;
  event.preventDefault();
  if ("alike" in on.dataset) say("Comparing it with all rows …");
  if (on.dataset.open) inOrder(() => select(Number(on.dataset.open), true));
  else if ("close" in on.dataset) inOrder(close);
  else if ("help" in on.dataset) $("#help").showModal();
  else if ("explain" in on.dataset) explain(opened());
  else if ("set" in on.dataset) inOrder(() => setThreshold(on.value));
  else if (on.rel) inOrder(() => turn(Number(on.dataset.go.split("=")[1])));
  else go(Object.fromEntries(new URLSearchParams(on.dataset.go)));
});

async function setThreshold(value) {
  const answer = await post("/threshold", { value });
  if (!answer) return;
  remember([...remembered(), await answer.json()]);
  say("The threshold is set. Press u to undo.");
  await go({ t: "" });
}

async function close() {
  const row = opened();
  await go({ row: "" });
  if (row) await select(row);
}

document.addEventListener("submit", (event) => {
  const form = event.target, button = event.submitter;
  if (form.matches("#help form")) return;
  event.preventDefault();
  if (form.matches(".bulk form")) inOrder(() => decideAll(form, button?.value ?? ""));
  else if (form.matches(".decide")) inOrder(() => decide(opened(), button?.value ?? ""));
  else if (form.matches(".history form")) post("/undo", new FormData(form)).then((answer) => answer && refresh());
  else if (form.matches(".filters")) filter();
  else if (form.matches(".threshold")) exact();
});

function filter() {
  const form = $(".filters"), fields = new FormData(form);
  go(Object.fromEntries(FILTERS.map((name) => [name, fields.get(name) ?? ""])));
}

function exact() {
  const words = $("#exact").value.trim().replace("−", "-"), value = words === "inf" ? Infinity : Number(words);
  if (words === "" || Number.isNaN(value)) return say("The threshold is a number.", true);
  if ($("#status").matches(".trouble")) $("#status").textContent = $("#status").className = "";
  $("#exact").blur();
  moveHandle(value, false);
  go({ t: value === Infinity ? "inf" : value });
}

document.addEventListener("input", (event) => {
  if (event.target.id !== "search") return;
  clearTimeout(filter.timer);
  filter.timer = setTimeout(filter, 150);
});

document.addEventListener("change", (event) => {
  if (event.target.matches(".filters *")) filter();
  else if (event.target.id === "exact") exact();
  else if (event.target.id === "keys-on") localStorage.setItem("keys", event.target.checked ? "on" : "off");
});

const KEYS = {
  j: () => inOrder(() => step(1)),
  k: () => inOrder(() => step(-1)),
  a: () => inOrder(() => decide(acted(), "kept")),
  q: () => inOrder(() => decide(acted(), "quarantined")),
  c: () => inOrder(() => decide(acted(), "undecided", "")),
  u: () => inOrder(undo),
  o: () => inOrder(() => select(current, true)),
  n: () => $("#note")?.focus(),
  x: () => { const fold = $("#row details[data-key=text]"); if (fold) fold.open = !fold.open; },
  e: () => $("#row [data-explain]")?.click(),
  d: () => $("#row [data-alike]")?.click(),
  t: () => $("#drag")?.focus(),
  "/": () => $("#search").select(),
  "[": () => $("#list [rel=prev]")?.click(),
  "]": () => $("#list [rel=next]")?.click(),
  "?": () => $("#help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("#help").open) return;
  const typing = event.target.matches("input:not([type=checkbox], [type=range]), select, textarea");
  if (event.repeat && !typing && !["j", "k"].includes(event.key)) { // a held key decides nothing more
    if (event.key === "Enter") event.preventDefault(); // or it would press the button in focus again and again
    return;
  }
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    else if (opened()) inOrder(close);
  } else if (event.target.id === "exact" && event.key === "Enter") {
    event.preventDefault(); // or the form's first button, which stores a threshold, would be pressed
    event.target.blur(); // which is a change, if it is one
  } else if (event.key === "Enter" && event.target === document.body) {
    inOrder(() => select(current, true));
  } else if (typing && event.target.id === "note" && event.key === "Enter") {
    event.preventDefault(); // the note goes with the next a or q
    event.target.blur();
  } else if (!typing && KEYS[event.key] && localStorage.getItem("keys") !== "off") {
    event.preventDefault();
    KEYS[event.key]();
  }
});

window.addEventListener("popstate", () => {
  address = new URL(location.href);
  for (const field of $(".filters").elements) {
    if (!FILTERS.includes(field.name)) continue;
    const wanted = address.searchParams.get(field.name) ?? "";
    if (field.type === "checkbox") field.checked = wanted !== "";
    else field.value = wanted;
    if (field.selectedIndex === -1) field.selectedIndex = 0;
  }
  refresh();
});

async function look() {
  if (document.hidden) return;
  const answer = await ask("/version");
  if (answer && (await answer.json()).version !== Number($("#list").dataset.version)) refresh(true);
}

document.documentElement.classList.add("script");
$("#keys-on").checked = localStorage.getItem("keys") !== "off";
current = opened() || number(rows()[0]);
threshold();
settle();
setInterval(look, POLL);
document.addEventListener("visibilitychange", look);
