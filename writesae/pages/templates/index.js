
// Search, sort and show the rows of the table. All text goes in as text.
const rows = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const [body, search, where, head, kind, measured, only, sort, more] =
  [document.querySelector("#atoms tbody"), ...["search", "where", "head", "class", "measured", "marked", "sort", "more"].map(find)];
const few = (x, digits) => x === null || x === undefined ? "–" : x >= 10 ** digits ? x.toFixed(0) : x.toPrecision(digits);
const percent = (x) => x === null || x === undefined ? "–" : few(100 * x, x >= 0.995 ? 3 : 2) + "%";
const PAGE = 100, FIRST_UP = ["head", "atom", "at", "class"];
let shown = PAGE, key = "rate", up = false, band = null;

// Of several heads, each has a folder of its own, and atoms are told apart by their head.
const { name, marks: saes, heads } = JSON.parse(find("about").textContent), several = heads.length > 0;
for (const [number, row] of rows.entries()) [row.number, row.id] = [number, several ? row.head + "#" + row.atom : row.atom];

// Marked atoms, kept by the browser under the SAEs' names.
const store = "writesae marks " + saes, known = new Set(rows.map((row) => row.id));
const marks = new Set();
try { for (const id of JSON.parse(localStorage.getItem(store) || "[]")) if (known.has(id)) marks.add(id); } catch { /* no storage: marks last as long as the page */ }
function keep() {
  try { localStorage.setItem(store, JSON.stringify(rows.map((row) => row.id).filter((id) => marks.has(id)))); } catch { /* as above */ }
  find("n-marked").textContent = marks.size.toLocaleString("en");
  find("export").disabled = find("unmark").disabled = !marks.size;
}
find("export").addEventListener("click", () => {
  const columns = ["head", "atom", "label", "class", "at", "focus", "rate", "mean", "peak", "cosine", "wins"];
  const cell = (x) => x === null || x === undefined ? "" : /[",\n]/.test(x) ? '"' + String(x).replaceAll('"', '""') + '"' : String(x);
  const lines = rows.filter((row) => marks.has(row.id)).map((row) => columns.map((column) => cell(row[column])).join(","));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([[columns.join(","), ...lines, ""].join("\n")], { type: "text/csv" }));
  link.download = name.replace(/[^\w-]+/g, "-") + "-marked.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
find("unmark").addEventListener("click", () => { marks.clear(); keep(); draw(); });

// How many atoms fire at which rate, in half powers of ten from the rarest on.
const alive = rows.filter((row) => row.rate > 0), STEPS = 4;
if (alive.length) {
  const at = (row) => Math.floor(STEPS * Math.log10(row.rate)), least = Math.min(...alive.map(at)), most = Math.max(...alive.map(at));
  const counts = Array(most - least + 1).fill(0);
  for (const row of alive) counts[row.bin = at(row) - least]++;
  const edge = (bin) => percent(10 ** ((bin + least) / STEPS));
  counts.forEach((n, bin) => {
    const bar = add(document.querySelector("#density .bars"), "button");
    bar.title = n.toLocaleString("en") + (n === 1 ? " atom fires" : " atoms fire") + " at " + edge(bin) + " to " + edge(bin + 1) + " of tokens";
    bar.setAttribute("aria-label", bar.title);
    add(bar, "i").style.height = 100 * n / Math.max(...counts) + "%";
    bar.addEventListener("click", () => { band = band === bin ? null : bin; restart(); });
  });
  [find("rarest").textContent, find("densest").textContent] = [edge(0), edge(counts.length)];
  find("density").hidden = false;
}
find("all-rates").addEventListener("click", () => { band = null; restart(); });
const PARTS = ["label", "head", "class", "at", "fires", "tokens", "text"];
for (const row of rows) {
  row.fires = row.fires.join("\n");
  row.haystack = PARTS.map((part) => row[part]).join("\n");
}

// Words, all of which must be there: whole words, unless a * ends one; a phrase in quotes is one of them.
function asked() {
  const words = search.value.trim().match(/"[^"]+"(?=\s|$)|\S+/g) || [];
  return words.map((word) => {
    if (/^"[^"]+"$/.test(word)) word = word.slice(1, -1);
    const open = word.length > 1 && word.endsWith("*"), letter = (x) => /[\p{L}\p{N}]/u.test(x);
    if (open) word = word.slice(0, -1);
    const plain = word.replace(/[.*+?^${}()|[\]\\\/-]/g, "\\$&");
    const left = letter(word[0]) ? "(?<![\\p{L}\\p{N}])" : "", right = !open && letter(word.at(-1)) ? "(?![\\p{L}\\p{N}])" : "";
    return { word, found: new RegExp(left + plain + right, "iu") };
  });
}

function matches(row, words) {
  if (kind.value && row.class !== kind.value || measured.checked && !row.measured || only.checked && !marks.has(row.id) || head.value && row.head !== head.value) return false;
  if (band !== null && (row.bin ?? -1) !== band) return false;
  const exactly = words.length === 1 && /^(L\d+H\d+)?#(\d+)$/i.exec(words[0].word);
  if (exactly) return String(row.atom) === exactly[2] && (!exactly[1] || row.head === exactly[1].toUpperCase());
  if (words.length === 1 && !where.value && String(row.atom) === words[0].word) return true;
  const text = where.value ? row[where.value] : row.haystack;
  return words.every(({ found }) => found.test(text));
}

function compare(a, b) {
  const [x, y] = [a[key], b[key]];
  if (x === null || y === null || x === "" || y === "") return (x === null || x === "") - (y === null || y === "");
  const order = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: key === "head" });
  return (up ? order : -order) || a.number - b.number;
}

function add(parent, tag, text, name) {
  const made = parent.appendChild(document.createElement(tag));
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

// Where the words searched for are, if the strongest firing does not show them.
function why(cell, row, words) {
  const missing = words.filter(({ found }) => !found.test(row.label) && !found.test(row.context.join("")));
  for (const { found } of missing.slice(0, 2)) {
    const text = row.text.split("\n").find((one) => found.test(one)), note = add(cell, "div", undefined, "small");
    if (text === undefined || where.value === "fires" || where.value === "tokens") {
      if (found.test(row.fires) && where.value !== "tokens") note.textContent = "among the tokens it fires at";
      else if (found.test(row.tokens)) note.textContent = "among the tokens promoted";
      continue;
    }
    const { index: at, 0: { length } } = found.exec(text);
    note.append("… " + text.slice(Math.max(0, at - 25), at));
    add(note, "b", text.slice(at, at + length));
    note.append(text.slice(at + length, at + length + 25) + " …");
  }
}

function line(row, words) {
  const tr = document.createElement("tr");
  const mark = add(add(tr, "td"), "input");
  mark.type = "checkbox";
  mark.checked = marks.has(row.id);
  mark.setAttribute("aria-label", "mark atom " + row.id);
  mark.addEventListener("change", () => { marks[mark.checked ? "add" : "delete"](row.id); keep(); });
  if (several) add(tr, "td", row.head, "head");
  const link = add(add(tr, "th", undefined, "n"), "a", row.atom);
  link.href = (several ? row.head + "/" : "") + "atom/" + String(row.atom).padStart(5, "0") + ".html";
  const context = add(tr, "td", undefined, "context");
  if (row.context.length) {
    add(context, "span", row.context[0]);
    add(context, "mark", row.context[1]);
    add(context, "span", row.context[2]);
  } else add(context, "span", "never fires in this text", "small");
  if (row.label) add(context, "div", row.label, "label");
  why(context, row, words);
  const at = add(tr, "td");
  if (row.at) add(at, "code", row.at);
  add(tr, "td", percent(row.focus), "n");
  add(tr, "td", row.rate ? percent(row.rate) : "0", "n");
  add(tr, "td", few(row.mean, 3), "n");
  add(tr, "td", few(row.peak, 3), "n");
  add(add(tr, "td"), "span", row.class, "kind " + row.class);
  add(tr, "td", few(row.cosine, 2), "n");
  const promotes = add(tr, "td");
  for (const token of row.promotes) { add(promotes, "code", token); promotes.append(" "); }
  add(tr, "td", percent(row.wins), "n");
  return tr;
}

function draw() {
  const words = asked();
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
  sort.value = key;
  for (const [bin, bar] of document.querySelectorAll("#density .bars button").entries()) bar.setAttribute("aria-pressed", String(bin === band));
  find("all-rates").hidden = band === null;
  const state = new URLSearchParams({ q: search.value, in: where.value, marked: only.checked ? "1" : "", band: band ?? "", head: head.value, class: kind.value, measured: measured.checked ? "1" : "", sort: (up ? "+" : "-") + key });
  try { history.replaceState(null, "", "#" + state); } catch { /* some browsers keep no history of files */ }
}

function restart() { shown = PAGE; draw(); }
search.addEventListener("input", restart);
for (const control of [where, head, kind, measured, only]) control.addEventListener("change", restart);
sort.addEventListener("change", () => { key = sort.value; up = FIRST_UP.includes(key); restart(); });
for (const th of document.querySelectorAll("th[data-key]")) Object.assign(add(sort, "option", th.textContent.trim()), { value: th.dataset.key });
more.addEventListener("click", () => { shown += PAGE; draw(); });
for (const th of document.querySelectorAll("th[data-key]")) {
  th.querySelector("button").addEventListener("click", () => {
    up = key === th.dataset.key ? !up : FIRST_UP.includes(th.dataset.key);
    key = th.dataset.key;
    restart();
  });
}
const state = new URLSearchParams(location.hash.slice(1));
search.value = state.get("q") || "";
head.value = state.get("head") || "";
kind.value = state.get("class") || "";
where.value = state.get("in") || "";
only.checked = state.get("marked") === "1";
if (/^\d+$/.test(state.get("band") || "")) band = Number(state.get("band"));
measured.checked = state.get("measured") === "1";
const order = /^([+-])(\w+)$/.exec(state.get("sort") || "");
if (order && document.querySelector(`th[data-key=${order[2]}]`)) { up = order[1] === "+"; key = order[2]; }
keep();
draw();
