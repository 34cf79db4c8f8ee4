// Looks at a page in a frame: contrast, texts that are cut off or overlap, and what the pointer finds.
const frame = document.querySelector("iframe");
frame.onload = () => {
  const view = frame.contentWindow, page = view.document, bad = [], tips = [];
  const texts = "h1, h2, h3, p, td, th, b, span, small, li, figcaption, pre, svg text";
  const rgb = text => text.match(/[\d.]+/g).slice(0, 3).map(Number);
  const linear = x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const weights = [0.2126, 0.7152, 0.0722];
  const light = color => rgb(color).reduce((sum, x, i) => sum + weights[i] * linear(x / 255), 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = view.getComputedStyle(node).backgroundColor;
      if (color != "rgba(0, 0, 0, 0)") return color;
    }
    return "rgb(255, 255, 255)";
  };
  for (const node of page.querySelectorAll(texts)) {
    if (!node.textContent.trim() || !node.getClientRects().length) continue;
    const style = view.getComputedStyle(node), color = node.closest("svg") ? style.fill : style.color;
    const [low, high] = [light(color), light(behind(node))].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) bad.push(["contrast", node.textContent]);
  }
  for (const plot of page.querySelectorAll(".plot")) {
    const box = plot.getBoundingClientRect(), labels = [...plot.querySelectorAll("text")];
    const boxes = labels.map(text => text.getBoundingClientRect());
    boxes.forEach((a, i) => {
      const inside = a.left > box.left - 1 && a.right < box.right + 1 && a.top > box.top - 1;
      if (!inside || a.bottom > box.bottom + 1)
        bad.push(["cut off", plot.getAttribute("aria-label"), labels[i].textContent]);
      boxes.slice(0, i).forEach((b, j) => {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && high > 3) bad.push(["overlap", labels[i].textContent, labels[j].textContent]);
      });
    });
    const figure = plot.closest("figure"), tip = figure.querySelector(".tip");
    if (!tip) continue;
    const at = { clientX: box.left + 0.6 * box.width, clientY: box.top + 0.5 * box.height, bubbles: true };
    plot.dispatchEvent(new view.PointerEvent("pointermove", at));
    tips.push(tip.hidden ? "" : tip.textContent);
    const [inner, outer] = [tip, figure].map(node => node.getBoundingClientRect());
    if (inner.left < outer.left || inner.right > outer.right + 1) bad.push(["tip", tip.textContent]);
  }
  const dark = view.matchMedia("(prefers-color-scheme: dark)").matches;
  const found = { bad, tips, dark, width: page.documentElement.scrollWidth };
  document.body.dataset.found = JSON.stringify(found);
};
