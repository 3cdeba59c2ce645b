// Ask the server what fires in a text, and how it goes on with an atom. All text goes in as text.
const find = (id) => document.getElementById(id);

// Answers may come in another order than questions: of each kind the last question counts, and of all for what is said.
let asked = 0;
const last = {};

async function ask(path, values) {
  const mine = last[path] = ++asked;
  find("said").textContent = "running the model …";
  const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values) });
  const found = await answer.json();
  if (mine === asked) find("said").textContent = found.error || "";
  return answer.ok && mine === last[path] ? found : null;
}

function made(parent, tag, name, text) {
  const one = parent.appendChild(document.createElement(tag));
  if (name) one.className = name;
  if (text !== undefined) one.textContent = text;
  return one;
}

function link(parent, atom) {
  made(parent, "a", "", atom).href = "atom/" + String(atom).padStart(5, "0") + ".html";
}

async function read() {
  const found = await ask("api/read", { text: find("text").value });
  if (!found) return;
  const sums = new Map(), top = Math.max(1e-9, ...found.tokens.flatMap((token) => token.atoms.map((one) => one[1])));
  find("tokens").replaceChildren();
  for (const { token, atoms } of found.tokens) {
    const one = made(find("tokens"), "span", "t" + (atoms.length ? " on" : ""), token);
    one.title = atoms.length ? atoms.map(([atom, value]) => `atom ${atom}: ${value}`).join("\n") : "no atom is active";
    one.style.setProperty("--a", ((atoms[0]?.[1] ?? 0) / top).toFixed(3));
    if (atoms.length) one.addEventListener("click", () => { find("atom").value = atoms[0][0]; });
    for (const [atom, value] of atoms) {
      const sum = sums.get(atom) || { n: 0, most: 0 };
      sums.set(atom, { n: sum.n + 1, most: Math.max(sum.most, value) });
    }
  }
  find("fired").replaceChildren();
  for (const [atom, { n, most }] of [...sums].sort((a, b) => b[1].most - a[1].most).slice(0, 24)) {
    const line = made(find("fired"), "li");
    link(line, atom);
    made(line, "b", "", n + "×");
    made(line, "i", "", "up to " + most);
    const use = made(line, "button", "plain-button", "steer");
    use.addEventListener("click", () => { find("atom").value = atom; steer(); });
  }
}

async function steer() {
  const values = { text: find("text").value, atom: Number(find("atom").value), scale: Number(find("scale").value), n_tokens: Number(find("n").value) };
  const found = await ask("api/steer", values);
  if (!found) return;
  find("before").textContent = found.before.join("");
  find("after").replaceChildren();
  made(find("after"), "span", "same", found.after.slice(0, found.same).join(""));
  made(find("after"), "mark", "", found.after.slice(found.same).join(""));
}

find("read").addEventListener("click", read);
find("steer").addEventListener("click", steer);
find("scale").addEventListener("input", () => { const x = Number(find("scale").value); find("strength").textContent = (x > 0 ? "+" : x < 0 ? "\u2212" : "") + Math.abs(x); });
find("scale").addEventListener("change", steer);
read();
