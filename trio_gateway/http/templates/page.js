// Makes the page live. Without it everything works by links and forms.
"use strict";

const news = document.getElementById("news");
const link = document.getElementById("link");
let skew = 0; // the gateway's clock against ours, in milliseconds
let lastNews = "";

// ----- parts that the gateway draws again: changed in place, so that focus, selection and an open
// "Give up" stay as they are

function morph(from, to) {
  if (from.nodeType !== to.nodeType || from.nodeName !== to.nodeName || (from.id || "") !== (to.id || "")) {
    from.replaceWith(to);
    return;
  }
  if (from.nodeType !== Node.ELEMENT_NODE) {
    if (from.nodeValue !== to.nodeValue) from.nodeValue = to.nodeValue;
    return;
  }
  for (const { name, value } of [...to.attributes]) {
    if (from.getAttribute(name) !== value) from.setAttribute(name, value);
  }
  for (const { name } of [...from.attributes]) {
    const kept = name === "open" && from.nodeName === "DETAILS";
    if (!to.hasAttribute(name) && !kept) from.removeAttribute(name);
  }
  morphChildren(from, to);
}

function morphChildren(from, to) {
  let at = from.firstChild;
  for (const wanted of [...to.childNodes]) {
    const same = wanted.id ? [...from.children].find((one) => one.id === wanted.id) : null;
    if (same && same !== at) from.insertBefore(same, at);
    if (same) {
      at = same.nextSibling;
      morph(same, wanted);
    } else if (at && !at.id && !wanted.id) {
      const next = at.nextSibling;
      morph(at, wanted);
      at = next;
    } else {
      from.insertBefore(wanted, at);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function show(part, html) {
  const region = document.querySelector(`[data-part="${part}"]`);
  if (!region) return;
  const low = window.innerHeight + window.scrollY > document.body.scrollHeight - 120;
  const fresh = document.createElement("template");
  fresh.innerHTML = html;
  morphChildren(region, fresh.content);
  const now = region.querySelector("[data-now]");
  if (now) {
    skew = Date.parse(now.dataset.now) - Date.now();
    say(now.dataset.news);
  }
  tick();
  if (region.closest(".talk") && low) window.scrollTo(0, document.body.scrollHeight);
}

function say(text) {
  if (!text || text === lastNews) return;
  if (lastNews) news.textContent = text; // not what was there when the page opened
  lastNews = text;
}

// ----- the stream

let source = null;

function follow(url) {
  source = new EventSource(url);
  const part = (event) => show(event.type, JSON.parse(event.data));
  for (const name of ["overview", "conversation", "turn"]) source.addEventListener(name, part);
  source.addEventListener("open", () => tellLink(""));
  source.addEventListener("end", () => tellLink("The gateway has stopped; waiting until it is back"));
  source.addEventListener("error", (event) => {
    if (link.hidden) tellLink("No connection; trying again");
    if (event.target.readyState !== EventSource.CLOSED) return; // the browser tries by itself
    setTimeout(() => again(event.target, url), 2000);
  });
}

function again(ended, url) {
  if (source === ended && !document.hidden) follow(url);
}

// A browser opens few connections to one place: pages that nobody looks at leave theirs to others.
function followWhileSeen(url) {
  follow(url);
  document.addEventListener("visibilitychange", () => {
    source.close();
    if (!document.hidden) follow(url);
  });
}

function tellLink(text) {
  if (link.textContent === text) return;
  link.textContent = text;
  link.hidden = !text;
  news.textContent = text || "Connected";
}

// ----- times

function span(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (whole >= size) return `${Math.floor(whole / size)} ${unit}`;
  }
  return `${whole} s`;
}

function tick() {
  for (const time of document.querySelectorAll("time[data-ago], time[data-until]")) {
    const since = (Date.now() + skew - Date.parse(time.dateTime)) / 1000;
    const text = since < -1 ? `in ${span(-since)}` : `${span(since)} ago`;
    if (time.textContent !== text) time.textContent = text;
  }
}

// ----- the chat

function chat(form) {
  const box = form.elements.text;
  const trouble = document.getElementById("trouble");
  let pending = null; // what was sent last and not acknowledged: sent again, it has the same id
  for (const hint of form.querySelectorAll("[data-script]")) hint.hidden = false;
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = box.value;
    if (!text.trim()) return;
    if (!pending || pending.text !== text) pending = { id: freshId(), text };
    const sent = pending;
    box.value = "";
    trouble.textContent = "";
    const wrong = await post(form.dataset.api, sent);
    if (!wrong) {
      if (pending === sent) pending = null;
      return;
    }
    trouble.textContent = wrong;
    box.value = box.value ? `${sent.text}\n${box.value}` : sent.text;
  });
}

async function post(url, message) {
  try {
    const headers = { "content-type": "application/json" };
    const answer = await fetch(url, { method: "POST", headers, body: JSON.stringify(message) });
    if (answer.ok) return "";
    if (answer.status === 401) return "You are signed out: sign in again, in another window.";
    return (await answer.json()).error.message;
  } catch {
    return "It was not sent: the gateway does not answer. Send it again.";
  }
}

function freshId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return "m-" + [...bytes].map((one) => one.toString(16).padStart(2, "0")).join("");
}

// ----- begin

const live = document.querySelector("[data-live]");
if (live) followWhileSeen(live.dataset.live);
const form = document.getElementById("chat");
if (form) {
  chat(form);
  form.scrollIntoView({ block: "end" });
  if (!location.hash) form.elements.text.focus({ preventScroll: true });
}
document.querySelector("[data-notice]")?.focus();
setInterval(tick, 1000);
tick();
