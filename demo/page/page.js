// Draws what /events sends, at most five times a second, and sends what is pressed.

const titles = {
  waiting: "queue", "in flight": "replicas: in flight", processed: "recorded in etcd",
  skipped: "skipped", retry: "retry", parked: "parked",
};
const placeOf = { claimed: "in flight", recorded: "processed" };
const find = (selector, within = document) => within.querySelector(selector);
const all = (selector) => document.querySelectorAll(selector);
const arrow = find("svg").outerHTML;
const card = `<label class="process">
  <input type="radio" name="process"><b></b><i></i><small></small></label>`;
let token; // Proves that a press comes from this page.

for (const service of ["order", "notify"]) {
  const stations = Object.entries(titles).map(([place, title], index) => `
    <div class="station"><h3>${title}</h3><b data-number="${service} ${place}">0</b>
      <div class="dots" data-place="${place}"></div></div>${index < 2 ? arrow : ""}`);
  find("#lanes").insertAdjacentHTML("beforeend", `
    <section class="lane" id="${service}" aria-label="${service}">
      <h2>${service}</h2>${stations.join("")}</section>`);
}

function write(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

// Each dot moves to the place of its state. Only this move is animated.

const boxOf = (dot) => (dot.isConnected ? dot : find("#producer")).getBoundingClientRect();

function drawDots(dots) {
  const gone = new Set(all(".dot")), moved = [];
  for (const [service, label, state, why] of dots) {
    const id = `${label} at ${service}`, about = `${id}: ${state}${why && ", "}${why}`;
    const dot = document.getElementById(id) || document.createElement("button");
    gone.delete(dot);
    if (dot.title !== about) dot.ariaLabel = dot.title = about;
    if (dot.dataset.state !== state) moved.push({ dot, id, service, state, start: boxOf(dot) });
  }
  for (const dot of gone) dot.remove();
  for (const { dot, id, service, state } of moved) {
    Object.assign(dot, { id, className: "dot", tabIndex: state === "parked" ? 0 : -1 });
    dot.dataset.state = state;
    const within = find(state === "publishing" ? "#producer" : "#" + service);
    find(`[data-place="${placeOf[state] || state}"]`, within).prepend(dot);
  }
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const step of moved) step.end = boxOf(step.dot);
  for (const { dot, start, end } of moved) {
    const transform = `translate(${start.x - end.x}px, ${start.y - end.y}px)`;
    dot.animate([{ transform }, { transform: "none" }], 300);
  }
}

function drawButtons(buttons) {
  const groups = Object.entries(Object.groupBy(buttons, ([group]) => group));
  find("nav").innerHTML = groups.map(([group, within]) => `
    <fieldset><legend>${group}</legend>${within.map(([, key, label]) => `
      <button data-key="${key}" aria-keyshortcuts="${key}">${label}</button>`).join("")}
    </fieldset>`).join("");
}

const chosen = () => find("#processes :checked")?.value;

function drawProcesses(processes) {
  const group = find("#processes"), cards = group.children;
  while (cards.length > processes.length) group.lastElementChild.remove();
  while (cards.length < processes.length) group.insertAdjacentHTML("beforeend", card);
  processes.forEach(([name, state, why], index) => {
    const [input, ...texts] = cards[index].children;
    Object.assign(cards[index].dataset, { key: index + 1, state });
    Object.assign(input, { value: name, ariaKeyShortcuts: index + 1 });
    [name, state, why].forEach((text, place) => write(texts[place], text));
  });
  if (!chosen() && processes.length) find("input", group.lastElementChild).checked = true;
}

function draw(next) {
  token = next.token;
  document.body.dataset.round = next.round;
  if (!find("nav button")) drawButtons(next.buttons);
  for (const element of all("[data-number]")) {
    const number = next.numbers[element.dataset.number] || 0;
    write(element, number);
    element.classList.toggle("some", number > 0);
  }
  for (const name of ["caption", "receiver"]) write(find("#" + name), next[name]);
  find("[data-key=h]").ariaPressed = next.rate;
  find("[data-key=m]").ariaPressed = next.memory;
  for (const title of all("h3:has(~ [data-place=processed])"))
    write(title, next.memory ? titles.processed : "processed, no record");
  drawDots(next.dots);
  drawProcesses(next.processes);
}

async function press(key) {
  const body = JSON.stringify({ key, target: chosen() });
  const send = () => fetch("press", { method: "POST", headers: { "X-Token": token }, body });
  // A container that starts or stops changes the network, which makes a fetch fail.
  const answer = await send().catch(send);
  if (!answer.ok) write(find("#told"), await answer.text());
}

document.onclick = ({ target }) => {
  if (target.matches("nav button")) press(target.dataset.key);
  if (target.matches(".dot")) write(find("#told"), target.title);
};

document.onkeydown = (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  find(`[data-key="${CSS.escape(event.key.toLowerCase())}"]`)?.click();
};

const events = new EventSource("events");
let frame;
events.onmessage = ({ data }) => {
  // A browser that is too slow to draw every message draws the newest, so that it never falls behind.
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => draw(JSON.parse(data)));
};
events.onerror = () => write(find("#caption"), events.readyState === EventSource.CLOSED
  ? "Too many pages are open: close some, and load this one again."
  : "The page's program does not answer.");
