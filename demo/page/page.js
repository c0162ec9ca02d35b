// Draws what /events sends, five times a second at the most, and sends what is pressed.
"use strict";

const stations = [
  ["waiting", "queue"], ["in flight", "replicas: in flight"], ["processed", ""],
  ["skipped", "skipped"], ["retry", "retry"], ["parked", "parked"],
];
const arrow = `<svg aria-hidden="true"><use href="#arrow"/></svg>`;
const placeOf = { claimed: "in flight", recorded: "processed" };
const still = matchMedia("(prefers-reduced-motion: reduce)");
const find = (selector, within = document) => within.querySelector(selector);
const dots = new Map(); // By service and label.

for (const service of ["order", "notify"]) {
  find("#lanes").insertAdjacentHTML("beforeend", `
    <section class="lane" id="${service}" aria-label="${service}"><h2>${service}</h2>` +
    stations.map(([place, title]) => `
      <div class="station"><h3>${title}</h3><b data-number="${service} ${place}">0</b>
        <div class="dots" data-place="${place}"></div></div>`,
    ).join(arrow) + "</section>");
}

function write(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

// Dots. Each goes to the place of its state, and only its way there is animated.

function drawDots(service, seen) {
  const kept = new Set(), moved = [];
  for (const [label, state, why] of seen) {
    const key = `${service} ${label}`, dot = dots.get(key) || makeDot(key);
    kept.add(key);
    dot.dataset.about = `${label} at ${service}: ${state}${why && ", "}${why}`;
    if (dot.dataset.state !== state) moved.push([dot, state]);
  }
  for (const [key, dot] of dots)
    if (key.startsWith(service) && !kept.has(key)) {
      dot.remove();
      dots.delete(key);
    }
  move(find("#" + service), moved);
}

function makeDot(key) {
  const dot = document.createElement("button");
  dot.className = "dot";
  dot.onclick = () => write(find("#told"), dot.dataset.about);
  dot.onmouseenter = () => { dot.title = dot.dataset.about; };
  dots.set(key, dot);
  return dot;
}

function move(lane, moved) {
  const from = ([dot]) => (dot.isConnected ? dot : find("#producer")).getBoundingClientRect();
  const starts = moved.map(from);
  for (const [dot, state] of moved) {
    dot.dataset.state = state;
    dot.setAttribute("aria-label", dot.dataset.about);
    dot.tabIndex = state === "parked" ? 0 : -1;
    const within = state === "publishing" ? find("#producer") : lane;
    find(`[data-place="${placeOf[state] || state}"]`, within).prepend(dot);
  }
  if (still.matches || document.hidden) return;
  const ends = moved.map(from);
  moved.forEach(([dot], index) => {
    const x = starts[index].x - ends[index].x, y = starts[index].y - ends[index].y;
    dot.animate([{ transform: `translate(${x}px, ${y}px)` }, { transform: "none" }], 300);
  });
}

// Processes, as a group of radio buttons.

function drawProcesses(processes) {
  const group = find("#processes");
  while (group.children.length > processes.length) group.lastChild.remove();
  processes.forEach(([name, state, why], index) => {
    const card = group.children[index] || makeProcess(group, index + 1);
    card.dataset.state = state;
    find("input", card).value = name;
    [name, state, why].forEach((text, child) => write(card.children[child + 1], text));
  });
  if (!chosen() && processes.length) find("input", group.lastChild).checked = true;
}

function makeProcess(group, number) {
  const card = document.createElement("label");
  card.className = "process";
  card.dataset.key = number;
  card.innerHTML = `<input type="radio" name="process" aria-keyshortcuts="${number}">
    <b></b><i></i><small></small>`;
  return group.appendChild(card);
}

function chosen() {
  return find("#processes :checked")?.value;
}

// The whole page.

function draw(next) {
  document.body.dataset.round = next.round;
  for (const element of document.querySelectorAll("[data-number]")) {
    const number = next.numbers[element.dataset.number];
    write(element, number);
    element.classList.toggle("some", number > 0);
  }
  write(find("#caption"), next.caption);
  write(find("#mood"), next.receiver);
  for (const pressed of [["h", next.rate], ["m", next.memory]])
    find(`[data-key=${pressed[0]}]`).setAttribute("aria-pressed", pressed[1]);
  for (const place of document.querySelectorAll("[data-place=processed]"))
    write(find("h3", place.parentNode), next.memory ? "recorded in etcd" : "processed, no record");
  for (const service in next.dots) drawDots(service, next.dots[service]);
  drawProcesses(next.processes);
}

async function press(key) {
  const headers = { "X-Token": find("meta[name=token]").content };
  const body = JSON.stringify({ key, target: chosen() });
  const answer = await fetch("press", { method: "POST", headers, body });
  if (!answer.ok) write(find("#told"), await answer.text());
}

for (const button of document.querySelectorAll("nav button"))
  button.onclick = () => press(button.dataset.key);

document.onkeydown = (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  find(`[data-key="${CSS.escape(event.key.toLowerCase())}"]`)?.click();
};

const events = new EventSource("events");
events.onmessage = (event) => draw(JSON.parse(event.data));
events.onerror = () => write(find("#caption"), "The page's program does not answer.");
