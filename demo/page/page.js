// Draws what /events sends, five times a second at the most, and sends what is pressed.
"use strict";

const token = document.querySelector("meta[name=token]").content;
const still = matchMedia("(prefers-reduced-motion: reduce)");
const find = (selector, within = document) => within.querySelector(selector);
const signs = {
  publishing: "↑", waiting: "", "in flight": "→", claimed: "!", recorded: "✓",
  processed: "✓", skipped: "=", retry: "↻", parked: "×",
};
const dots = new Map(); // By service and label.
let shown = null, chosen = "order-1";

for (const service of ["order", "notify"]) {
  const lane = find("#lane").content.cloneNode(true).firstElementChild;
  lane.id = service;
  lane.setAttribute("aria-label", service);
  find("h2", lane).textContent = service;
  find("#lanes").append(lane);
}

function write(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

// Dots. Each goes to the place of its state, and only its way there is animated.

function drawLane(service, seen) {
  const lane = find("#" + service), moved = [], kept = new Set();
  for (const station of lane.querySelectorAll("[data-of]"))
    write(find("b", station), seen[station.dataset.of]);
  for (const [label, id, state, why] of seen.dots) {
    const key = service + label;
    kept.add(key);
    let dot = dots.get(key);
    const from = dot ? dot.dataset.state : null;
    if (!dot) dots.set(key, dot = makeDot(service, label));
    dot.dataset.about = `${id} at ${service}: ${state}${why ? ", " + why : ""}`;
    if (from !== state) moved.push([dot, from ? dot : find("#producer"), state]);
  }
  for (const [key, dot] of dots)
    if (key.startsWith(service) && !kept.has(key)) {
      dot.remove();
      dots.delete(key);
    }
  move(lane, moved);
}

function makeDot(service, label) {
  const dot = document.createElement("button");
  dot.onclick = () => write(find("#told"), dot.dataset.about);
  dot.onmouseenter = () => { dot.title = dot.dataset.about; };
  return dot;
}

function move(lane, moved) {
  const starts = moved.map(([, from]) => from.getBoundingClientRect());
  for (const [dot, , state] of moved) {
    dot.dataset.state = state;
    dot.dataset.sign = signs[state];
    dot.className = "dot " + state.replace(" ", "-");
    dot.setAttribute("aria-label", dot.dataset.about);
    dot.tabIndex = state === "parked" ? 0 : -1;
    const within = state === "publishing" ? find("#producer") : lane;
    find(`[data-place~="${state.split(" ").pop()}"]`, within).prepend(dot);
  }
  if (still.matches || document.hidden) return;
  const ends = moved.map(([dot]) => dot.getBoundingClientRect());
  moved.forEach(([dot], index) => {
    const x = starts[index].left - ends[index].left, y = starts[index].top - ends[index].top;
    dot.animate([{ transform: `translate(${x}px, ${y}px)` }, { transform: "none" }], 300);
  });
}

// Processes. They are one radio group: a number, or an arrow key in it, chooses.

function drawProcesses(processes) {
  const group = find("#processes");
  while (group.children.length > processes.length) group.lastChild.remove();
  if (!processes.some(({ name }) => name === chosen) && processes.length)
    chosen = processes.at(-1).name;
  processes.forEach((process, index) => {
    const card = group.children[index] || group.appendChild(makeProcess(index));
    const [name, state, why] = card.children;
    card.dataset.name = process.name;
    card.dataset.state = process.state;
    card.setAttribute("aria-checked", process.name === chosen);
    card.tabIndex = process.name === chosen ? 0 : -1;
    write(name, process.name);
    write(state, process.state);
    write(why, process.why || (process.recorded ? `recorded ${process.recorded}` : ""));
  });
  write(find("#chosen"), chosen);
}

function makeProcess(index) {
  const card = document.createElement("button");
  card.className = "process";
  card.dataset.key = index + 1;
  card.setAttribute("role", "radio");
  card.setAttribute("aria-keyshortcuts", index + 1);
  card.append(...["b", "i", "small"].map((tag) => document.createElement(tag)));
  card.onclick = () => choose(card);
  card.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const cards = [...card.parentNode.children];
    if (step) choose(cards.at((index + step) % cards.length));
  };
  return card;
}

function choose(card) {
  chosen = card.dataset.name;
  drawProcesses(shown.processes);
  card.focus();
}

// The whole page.

function draw(next) {
  shown = next;
  for (const name of ["lost", "double"]) {
    write(find("#" + name), next[name]);
    find("#" + name).parentNode.classList.toggle("bad", next[name] > 0);
  }
  for (const name of ["published", "confirmed", "calls", "repeated", "caption"])
    write(find("#" + name), next[name]);
  write(find("#mood"), next.receiver);
  find("[data-action=rate]").setAttribute("aria-pressed", next.rate);
  find("[data-action=memory]").setAttribute("aria-pressed", next.memory);
  document.body.dataset.round = next.round;
  for (const title of document.querySelectorAll("[data-of=processed] h3"))
    write(title, next.memory ? "recorded in etcd" : "processed, no record");
  for (const service in next.lanes) drawLane(service, next.lanes[service]);
  drawProcesses(next.processes);
}

async function press(button) {
  const body = JSON.stringify({ action: button.dataset.action, target: chosen });
  const answer = await fetch("press", { method: "POST", headers: { "X-Token": token }, body });
  if (!answer.ok) write(find("#told"), await answer.text());
}

for (const button of document.querySelectorAll("[data-action]")) {
  button.setAttribute("aria-keyshortcuts", button.dataset.key);
  button.onclick = () => press(button);
}

document.onkeydown = (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  find(`[data-key="${CSS.escape(event.key.toLowerCase())}"]`)?.click();
};

const events = new EventSource("events");
events.onmessage = (event) => draw(JSON.parse(event.data));
events.onerror = () => write(find("#caption"), "The page's program does not answer.");
