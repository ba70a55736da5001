"use strict";

/* Runs after the report's own script, in the same document. */
{
  const root = document.documentElement, main = document.getElementById("page");

  // The colours of the page around it, now and when they change.
  const outer = window.parent.document.body;
  const paint = () => { root.dataset.theme = outer.classList.contains("dark") ? "dark" : "light"; };
  new MutationObserver(paint).observe(outer, { attributes: true, attributeFilter: ["class"] });
  paint();

  // As high as its contents: the page scrolls, not the frame.
  const fit = () => { if (main.scrollHeight > 0) window.frameElement.style.height = `${Math.ceil(main.getBoundingClientRect().height)}px`; };
  new ResizeObserver(fit).observe(main);
  fit();

  if (root.dataset.part === "methods") document.querySelector("#results").after(document.querySelector("#tradeoff") ?? "");

  // Times that mean nothing are shown nowhere.
  if (root.dataset.timed === "false") document.querySelector("#steps-kind option[value=seconds]")?.remove();

  // Moving pictures should move, unless somebody has asked for stillness.
  if (root.dataset.part !== "inside" && !STILL && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
    const start = (tries) => {
      if (player.playable().length === 2) player.play();
      else if (tries > 0) setTimeout(start, 100, tries - 1);
    };
    start(50);
  }
}
