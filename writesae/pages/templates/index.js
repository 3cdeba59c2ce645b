
// Search, sort and show the rows of the table. All text goes in as text.
const rows = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const [body, search, kind, measured, more] = [document.querySelector("#atoms tbody"), ...["search", "class", "measured", "more"].map(find)];
const PAGE = 100;
let shown = PAGE, key = "rate", up = false;
for (const row of rows) row.haystack = [row.label, row.class, row.at, row.tokens, row.text].join("\n").toLowerCase();

function matches(row, words) {
  if (kind.value && row.class !== kind.value || measured.checked && !row.measured) return false;
  if (!words) return true;
  return /^#?\d+$/.test(words) && String(row.atom) === words.replace("#", "") || row.haystack.includes(words);
}

function compare(a, b) {
  const [x, y] = [a[key], b[key]];
  if (x === null || y === null || x === "" || y === "") return (x === null || x === "") - (y === null || y === "");
  const order = typeof x === "number" ? x - y : x.localeCompare(y);
  return (up ? order : -order) || a.atom - b.atom;
}

function add(parent, tag, text, name) {
  const made = parent.appendChild(document.createElement(tag));
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

const few = (x, digits) => x === null ? "–" : x >= 10 ** digits ? x.toFixed(0) : x.toPrecision(digits);
const percent = (x) => x === null ? "–" : few(100 * x, x >= 0.995 ? 3 : 2) + "%";

// Where the words searched for are, if the strongest firing does not show them.
function why(cell, row, words) {
  if (!words || [row.label, row.context.join("")].some((one) => one.toLowerCase().includes(words))) return;
  const text = row.text.split("\n").find((one) => one.toLowerCase().includes(words));
  const found = add(cell, "div", undefined, "small");
  if (text === undefined) {
    if (row.tokens.toLowerCase().includes(words)) found.textContent = "among the tokens promoted";
    return;
  }
  const at = text.toLowerCase().indexOf(words);
  found.append("… " + text.slice(Math.max(0, at - 25), at));
  add(found, "b", text.slice(at, at + words.length));
  found.append(text.slice(at + words.length, at + words.length + 25) + " …");
}

function line(row, words) {
  const tr = document.createElement("tr");
  const link = add(add(tr, "th", undefined, "n"), "a", row.atom);
  link.href = "atom/" + String(row.atom).padStart(5, "0") + ".html";
  const context = add(tr, "td", undefined, "context");
  if (row.context.length) {
    add(context, "span", row.context[0]);
    add(context, "mark", row.context[1]);
    add(context, "span", row.context[2]);
  } else add(context, "span", "never fires in this text", "small");
  if (row.label) add(context, "div", row.label, "label");
  why(context, row, words);
  const at = add(tr, "td", undefined, "some");
  if (row.at) add(at, "code", row.at);
  add(tr, "td", row.rate ? percent(row.rate) : "0", "n");
  add(tr, "td", few(row.peak, 3), "n some");
  add(add(tr, "td"), "span", row.class, "kind " + row.class);
  add(tr, "td", few(row.cosine, 2), "n wideonly");
  const promotes = add(tr, "td", undefined, "some");
  for (const token of row.promotes) { add(promotes, "code", token); promotes.append(" "); }
  add(tr, "td", percent(row.wins), "n");
  return tr;
}

function draw() {
  const words = search.value.trim().toLowerCase();
  const found = rows.filter((row) => matches(row, words)).sort(compare);
  body.replaceChildren(...found.slice(0, shown).map((row) => line(row, words)));
  find("count").textContent = found.length.toLocaleString("en") + " of " + rows.length.toLocaleString("en") + " atoms";
  find("none").hidden = found.length > 0;
  more.hidden = found.length <= shown;
  more.textContent = "Show " + Math.min(PAGE, found.length - shown) + " more of " + (found.length - shown).toLocaleString("en");
  for (const th of document.querySelectorAll("th[data-key]")) {
    if (th.dataset.key === key) th.setAttribute("aria-sort", up ? "ascending" : "descending");
    else th.removeAttribute("aria-sort");
  }
  const state = new URLSearchParams({ q: search.value, class: kind.value, measured: measured.checked ? "1" : "", sort: (up ? "+" : "-") + key });
  try { history.replaceState(null, "", "#" + state); } catch { /* some browsers keep no history of files */ }
}

function restart() { shown = PAGE; draw(); }
search.addEventListener("input", restart);
kind.addEventListener("change", restart);
measured.addEventListener("change", restart);
more.addEventListener("click", () => { shown += PAGE; draw(); });
for (const th of document.querySelectorAll("th[data-key]")) {
  th.querySelector("button").addEventListener("click", () => {
    up = key === th.dataset.key ? !up : ["atom", "at", "class"].includes(th.dataset.key);
    key = th.dataset.key;
    restart();
  });
}
const state = new URLSearchParams(location.hash.slice(1));
search.value = state.get("q") || "";
kind.value = state.get("class") || "";
measured.checked = state.get("measured") === "1";
const sort = /^([+-])(\w+)$/.exec(state.get("sort") || "");
if (sort && document.querySelector(`th[data-key=${sort[2]}]`)) { up = sort[1] === "+"; key = sort[2]; }
draw();
