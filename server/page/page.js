// Keeps the live page true: takes in new parts, lets times pass, shows values under a pointer.
"use strict";

const SILENT_MS = 10000; // the server promises a word every three seconds
const link = document.getElementById("link");
let skew = Number(document.body.dataset.now) * 1000 - Date.now(); // clocks differ
let heard = Date.now();

// ---- times

function duration(seconds) {
  seconds = Math.max(seconds, 0);
  for (const [limit, unit, name] of [[90, 1, "s"], [5400, 60, "min"], [172800, 3600, "h"]]) {
    if (seconds < limit) return `${Math.round(seconds / unit)} ${name}`;
  }
  return `${Math.round(seconds / 86400)} days`;
}

function tick() {
  const now = (Date.now() + skew) / 1000;
  for (const time of document.querySelectorAll("time[data-words]")) {
    const { since, until, words } = time.dataset;
    const seconds = since === undefined ? until - now : now - since;
    const text = words.replace("{}", duration(seconds));
    if (!time.title) time.title = time.textContent;
    if (time.textContent !== text) time.textContent = text;
  }
  const lost = Date.now() - heard > SILENT_MS;
  link.className = lost ? "lost" : "live";
  const text = lost
    ? `connection lost; this is how things were ${duration((Date.now() - heard) / 1000)} ago`
    : "live";
  if (link.textContent !== text) link.textContent = text;
}

// ---- parts

function replace(part, { html, digest }) {
  const scrolled = [...part.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
  const focused = focusable(part).indexOf(document.activeElement);
  part.innerHTML = html; // escaped by the server; the page's policy runs nothing inline
  part.dataset.digest = digest;
  part.querySelectorAll(".scroll").forEach((box, index) => { box.scrollLeft = scrolled[index] ?? 0; });
  if (focused >= 0) focusable(part)[focused]?.focus({ preventScroll: true });
}

function focusable(part) {
  return [...part.querySelectorAll("a, [tabindex]")];
}

function take(message) {
  const { now, title, parts } = JSON.parse(message.data);
  heard = Date.now();
  skew = now * 1000 - heard;
  document.title = title;
  for (const part of document.querySelectorAll("[data-part]")) {
    const news = parts[part.dataset.part];
    if (news) replace(part, news);
  }
  tick();
}

function listen() {
  const have = [...document.querySelectorAll("[data-digest]")].map((part) => part.dataset.digest);
  const source = new EventSource(`${document.body.dataset.events}?have=${have.join(",")}`);
  source.onmessage = take;
  source.onerror = () => {
    // The browser tries again by itself, unless the server answered that it will not.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 5000);
  };
}

// ---- values under a pointer

let readout = null; // of the figure that is pointed at

function figureOf(event) {
  return event.target instanceof Element ? event.target.closest("figure[data-readout]") : null;
}

function open(figure) {
  if (readout?.figure === figure) return readout;
  close();
  const data = JSON.parse(figure.dataset.readout);
  const rule = Object.assign(document.createElement("div"), { className: "rule" });
  const tip = Object.assign(document.createElement("div"), { className: "tip" });
  figure.querySelector(".picture").append(rule, tip);
  const rounds = [...new Set(data.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  readout = { figure, data, rounds, rule, tip, at: rounds.length - 1 };
  return readout;
}

function close() {
  readout?.rule.remove();
  readout?.tip.remove();
  readout = null;
}

function show() {
  const { data, rounds, rule, tip, at } = readout;
  const round = rounds[at];
  const heading = Object.assign(document.createElement("b"), { textContent: `round ${round}` });
  const rows = data.lines.flatMap(({ name, colour, x, y }) => {
    const index = x.indexOf(round);
    if (index < 0) return [];
    const row = document.createElement("div");
    row.style.setProperty("--dot", colour);
    for (const text of [name, y[index]]) {
      row.append(Object.assign(document.createElement("span"), { textContent: text }));
    }
    return [row];
  });
  tip.replaceChildren(heading, ...rows);
  const share = (round - data.first) / (data.last - data.first);
  const place = data.left + share * (data.right - data.left);
  rule.style.left = `${100 * place}%`;
  tip.style.left = place < 0.5 ? `calc(${100 * place}% + .5rem)` : "auto";
  tip.style.right = place < 0.5 ? "auto" : `calc(${100 * (1 - place)}% + .5rem)`;
}

function point(event) {
  const figure = figureOf(event);
  if (!figure) return close();
  const { data, rounds } = open(figure);
  if (!rounds.length) return close();
  const box = figure.querySelector(".picture svg").getBoundingClientRect();
  const share = ((event.clientX - box.left) / box.width - data.left) / (data.right - data.left);
  const wanted = data.first + share * (data.last - data.first);
  const distances = rounds.map((round) => Math.abs(round - wanted));
  readout.at = distances.indexOf(Math.min(...distances));
  show();
}

function step(event) {
  const figure = figureOf(event);
  const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  if (event.key === "Escape") return close();
  if (!figure || move === undefined) return;
  event.preventDefault();
  const fresh = readout?.figure !== figure;
  const { rounds, at } = open(figure);
  if (!rounds.length) return close();
  readout.at = Math.min(Math.max(fresh ? at : at + move, 0), rounds.length - 1);
  show();
}

document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);
document.addEventListener("keydown", step);
document.addEventListener("focusout", close);
setInterval(tick, 1000);
tick();
listen();
