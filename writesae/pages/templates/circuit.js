// The edges and the numbers of one node: the one pointed at, else the one that was chosen, at first the target.
const circles = [...document.querySelectorAll("#nodes circle")];
const lines = [...document.querySelectorAll("#links line")];
const of = (element) => element instanceof Element ? element.closest("[data-n]") : null;
let chosen = circles.length - 1;

function show(n) {
  for (const line of lines) line.classList.toggle("on", +line.dataset.s === n || +line.dataset.t === n);
  circles.forEach((circle, i) => circle.classList.toggle("on", i === n));
  document.querySelectorAll("#detail article").forEach((part, i) => { part.hidden = i !== n; });
}

function choose(n) {
  chosen = n;
  show(n);
}

document.addEventListener("pointerover", (event) => {
  const over = of(event.target);
  if (over instanceof SVGElement) show(+over.dataset.n);
});
document.addEventListener("pointerout", (event) => { if (of(event.target) instanceof SVGElement) show(chosen); });
document.addEventListener("focusin", (event) => { if (of(event.target) instanceof SVGElement) show(+of(event.target).dataset.n); });
document.addEventListener("click", (event) => {
  const found = of(event.target);
  if (!found) return;
  event.preventDefault();
  choose(+found.dataset.n);
});
document.addEventListener("keydown", (event) => {
  const found = of(event.target);
  if (event.key === "Enter" && found instanceof SVGElement) choose(+found.dataset.n);
});
show(chosen);
const graph = document.querySelector(".graph");
graph.scrollLeft = graph.scrollWidth; // where the target is
