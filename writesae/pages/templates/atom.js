
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

document.addEventListener("pointerover", (event) => {
  over = event.target instanceof Element ? event.target.closest("[data-tip], .t") : null;
  tip.hidden = !over;
  if (!over) return;
  tip.textContent = over.dataset.tip ?? over.textContent + ": " + (over.dataset.v ?? "not active");
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
