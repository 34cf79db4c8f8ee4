// Shows the value under the pointer. Each figure has {mode, points, box} in JSON: points are [x, y, text] in the
// units of its SVG; mode says which distance to the pointer counts ("xy", "x" or "y"); box is the frame.
for (const figure of document.querySelectorAll("figure")) {
  const data = figure.querySelector("script");
  if (!data) continue;
  const { mode, points, box: [, top, , bottom] } = JSON.parse(data.textContent);
  const plot = figure.querySelector(".plot");
  const mark = plot.appendChild(document.createElementNS(plot.namespaceURI, "path"));
  const tip = figure.appendChild(document.createElement("div"));
  let at = -1;
  mark.setAttribute("class", "mark");
  tip.className = "tip";
  tip.hidden = true;

  const hide = () => {
    tip.hidden = true;
    mark.removeAttribute("d");
  };

  const show = index => {
    const [x, y, text] = points[at = index];
    const ring = `M${x - 5} ${y}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0`;
    if (mode != "y") mark.setAttribute("d", mode == "x" ? `M${x} ${top}V${bottom}` : ring);
    tip.textContent = text;
    tip.hidden = false;
    const place = new DOMPoint(x, mode == "x" ? top : y).matrixTransform(plot.getScreenCTM());
    const own = figure.getBoundingClientRect(), left = place.x - own.left, above = place.y - own.top;
    const most = own.width - tip.offsetWidth - 6;
    const fits = left + 14 <= most;
    tip.style.left = `${Math.max(6, Math.min(most, fits ? left + 14 : left - 14 - tip.offsetWidth))}px`;
    const lowest = own.height - tip.offsetHeight - 6;
    tip.style.top = `${Math.max(6, Math.min(lowest, above - tip.offsetHeight / 2))}px`;
  };

  const find = event => {
    const here = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
    const far = ([x, y]) => Math.hypot(mode == "y" ? 0 : x - here.x, mode == "x" ? 0 : y - here.y);
    show(points.reduce((best, point, index) => far(point) < far(points[best]) ? index : best, 0));
  };

  plot.tabIndex = 0;
  for (const name of ["pointermove", "pointerdown"]) plot.addEventListener(name, find);
  for (const name of ["pointerleave", "blur"]) plot.addEventListener(name, hide);
  plot.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key == "Escape") hide();
    if (!step) return;
    event.preventDefault();
    show(Math.max(0, Math.min(points.length - 1, at + step)));
  });
}
