// What there is much of on a page is made here, of the numbers at its end: contexts, bars, factors. All text goes in as text.
const data = JSON.parse(document.getElementById("data").textContent);
const few = (x) => x >= 1000 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(3)));
const percent = (x) => few(100 * x) + "%";

function made(parent, tag, name, text) {
  const one = parent.appendChild(document.createElement(tag));
  if (name) one.className = name;
  if (text !== undefined) one.textContent = text;
  return one;
}

// A line of tokens; `values` are [place, number] of those that are active, `top` the number of the deepest colour.
function context(list, said, tip, words, here, values, top, unit) {
  const line = made(list, "li"), on = new Map(values);
  made(line, "span", "n", said).dataset.tip = tip;
  const text = made(line, "p");
  words.split("\x7f").forEach((word, i) => {
    const value = on.get(i), token = made(text, "span", "t" + (i === here ? " here" : "") + (value > 0 ? " on" : ""), word);
    if (!(value > 0)) return;
    token.style.setProperty("--a", Math.min(1, value / top).toFixed(3));
    token.dataset.v = unit === "%" ? percent(value) : few(value);
  });
}

const list = (id) => document.querySelector(`#${id} .contexts, #${id}.contexts`);
for (const [value, document_, position, here, words, values] of data.contexts)
  context(list("strongest"), few(value), `activation ${value}, text ${document_}, token ${position}`, words, here, values, data.peak);
for (const [share, value, here, words] of data.samples)
  context(list("samples"), few(value), `activation ${value}; ${percent(share)} of its firings are weaker`, words, here, [[here, value]], data.peak);
for (const [here, words, shares] of data.readers) {
  const top = Math.max(1e-9, ...shares.map((one) => one[1]).filter((_, i) => shares[i][0] !== here));
  context(list("readers"), percent(top), "the largest share that it has of a later read", words, here, shares.filter(([i]) => i > here), top, "%");
}

for (const id of ["nearest", "together"]) for (const [atom, value, kind, top] of data[id]) {
  const line = made(document.querySelector(`#${id} ol`), "li");
  made(line, "a", "", atom).href = String(atom).padStart(5, "0") + ".html";
  made(line, "b", "", id === "nearest" ? value.toFixed(2) : value.toLocaleString("en") + "\u00d7");
  made(line, "i", kind, kind);
  if (top) made(line, "code", "", top);
}

function bars(id, rows) {
  const box = document.querySelector(`#${id} .bars`), top = Math.max(1e-30, ...rows.map((row) => row[0]));
  for (const [height, tip] of box ? rows : []) {
    const bar = made(box, "span");
    bar.dataset.tip = tip;
    made(bar, "i").style.height = (100 * height / top).toFixed(1) + "%";
  }
}
const total = data.counts.reduce((a, b) => a + b, 0), wide = data.highest / data.counts.length;
bars("histogram", data.counts.map((n, i) => [n, `${few(i * wide)} to ${few((i + 1) * wide)}: ${n} of ${total} firings`]));
bars("positions", data.fired.map((n, i) => [n / Math.max(1, data.tokens[i]),
  `tokens ${i * data.bin} to ${(i + 1) * data.bin - 1} of a window: ${percent(n / Math.max(1, data.tokens[i]))} (${n} of ${data.tokens[i]})`]));

for (const strip of document.querySelectorAll(".strip[data-name]")) {
  const numbers = data[strip.dataset.name], top = Math.max(1e-30, ...numbers.map(Math.abs));
  numbers.forEach((x, i) => {
    const cell = made(strip, "span", x >= 0 ? "p" : "m");
    cell.style.setProperty("--a", (Math.abs(x) / top).toFixed(3));
    cell.dataset.tip = `${strip.dataset.name}[${i}] = ${x > 0 ? "+" : x < 0 ? "\u2212" : ""}${Math.abs(x)}`;
  });
}


// Values on hover and on tap: of a token its activation, elsewhere what data-tip says; always as text.
const tip = document.getElementById("tip");
let over = null;

function place(y) {
  // An element that goes over several lines: the box of the line pointed at.
  const boxes = [...over.getClientRects()];
  const box = boxes.find((b) => y >= b.top && y <= b.bottom) || boxes[0];
  const left = box.left + box.width / 2 - tip.offsetWidth / 2;
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = Math.max(4, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = (above < 4 ? box.bottom + 6 : above) + "px";
}

// What a token without a colour says.
const nothing = (token) => token.closest("#strongest") ? "not active" : token.closest("#readers") ? "reads none of it" : "not known here";

document.addEventListener("pointerover", (event) => {
  over = event.target instanceof Element ? event.target.closest("[data-tip], .t") : null;
  tip.hidden = !over;
  if (!over) return;
  tip.textContent = over.dataset.tip ?? over.textContent + ": " + (over.dataset.v ?? nothing(over));
  place(event.clientY);
});
document.addEventListener("scroll", () => {
  if (over && over.matches(":hover")) place(-1);
  else tip.hidden = true;
}, { passive: true });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip.hidden = true;
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input")) return;
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = rel && !document.documentElement.classList.contains("alone") && document.querySelector(`a[rel=${rel}]`);
  if (link) link.click();
});
