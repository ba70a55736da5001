"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

/** A DOM element. Children that are no elements become text nodes, so nothing from a prompt is ever markup. */
function el(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

/** JSON has no infinity; Python wrote it as a word. */
function number(x) {
  return x == null ? NaN : typeof x === "string" ? { inf: Infinity, "-inf": -Infinity }[x] ?? NaN : x;
}

function digits(x, places) {
  if (Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  return x.toFixed(places).replace("-", "−");
}

/** A metric's value with as many places as mean something. */
function show(name, value) {
  const x = number(value);
  if (name === "psnr" && x === Infinity) return "identical";
  return digits(x, places(name));
}

function places(name) {
  return { psnr: 1, flicker: 2, warping_error: 2 }[name] ?? 3;
}

function withUnit(name, value) {
  const text = show(name, value), unit = DATA.metrics[name]?.unit;
  return unit && text !== "identical" && text !== "–" ? `${text} ${unit}` : text;
}

function percent(x) {
  return Number.isNaN(number(x)) ? "–" : `${digits(100 * number(x), number(x) < 0.0995 ? 1 : 0)} %`;
}

/** What a pipeline of pictures made is measured as a clip of one frame, and called a picture. */
const STILL = Object.values(DATA.clips).flatMap((clips) => Object.values(clips)).every((clip) => clip.shape[0] === 1);
const said = (text) => (STILL && typeof text === "string" ? text.replace(/\bclip(s?)\b/g, "picture$1") : text);

const ARMS = new Map(DATA.arms.map((arm) => [arm.id, arm]));
const colour = (arm) => `var(--c${arm.colour})`;

/** Shapes differ too, for those who see fewer colours; centred at 0, 0. */
const SHAPES = ["M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", "M-4.6,-4.6h9.2v9.2h-9.2z", "M0,-6L5.6,4.4H-5.6z", "M0,-6.4L6.4,0L0,6.4L-6.4,0z",
  "M0,6L5.6,-4.4H-5.6z", "M-1.9,-5.5h3.8v3.6h3.6v3.8h-3.6v3.6h-3.8v-3.6h-3.6v-3.8h3.6z"];
const shape = (arm) => SHAPES[arm.colour % SHAPES.length];

function dot(arm) {
  const mark = svg("svg", { class: "dot", viewBox: "-7 -7 14 14", "aria-hidden": "true" });
  mark.append(svg("path", { d: shape(arm), style: `fill:${colour(arm)}` }));
  return mark;
}

/* -- what is picked; everything that depends on it listens ------------------------------------------------------- */

const picked = { clip: DATA.prompts[0]?.index, arm: DATA.focus, other: DATA.baseline };
const listeners = [];

function onPick(listener) {
  listeners.push(listener);
  listener();
}

function pick(change) {
  Object.assign(picked, change);
  for (const listener of listeners) listener();
}

const clipOf = (arm, index = picked.clip) => DATA.clips[arm]?.[index];

function selectField(label, options, value, onchange, attributes = {}) {
  const select = el("select", { onchange: () => onchange(select.value), ...attributes },
    options.map(([key, text]) => el("option", { value: key, selected: String(key) === String(value) }, text)));
  const printed = el("span", { class: "picked" });
  const update = () => { printed.textContent = select.selectedOptions[0]?.textContent ?? ""; };
  select.addEventListener("change", update);
  update();
  return { field: el("label", { class: `field ${attributes.class ?? ""}` }, el("span", {}, label), select, printed), select };
}

/** A row of buttons of which one is pressed. */
function segmented(label, options, value, onchange) {
  const group = el("div", { class: "segmented", role: "radiogroup", "aria-label": label });
  const choose = (key) => {
    for (const button of group.children) {
      const on = button.dataset.key === key;
      button.setAttribute("aria-checked", on);
      button.tabIndex = on ? 0 : -1;
    }
    onchange(key);
  };
  for (const [key, text] of options) {
    group.append(el("button", { type: "button", role: "radio", "data-key": key, onclick: () => choose(key) }, text));
  }
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const buttons = [...group.children];
    const next = buttons[(buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length];
    next.focus();
    choose(next.dataset.key);
  });
  choose(value);
  return group;
}

/* -- bytes ---------------------------------------------------------------------------------------------------------- */

const decoded = new Map();

/** The bytes of an embedded block, decoded when first asked for. */
function bytes(id) {
  if (!decoded.has(id)) {
    const text = atob(document.getElementById(id).textContent), out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
    decoded.set(id, out);
  }
  return decoded.get(id);
}

const urls = new Map();

function videoUrl(id) {
  if (!urls.has(id)) urls.set(id, URL.createObjectURL(new Blob([bytes(id)], { type: "video/mp4" })));
  return urls.get(id);
}

/* -- the note beside the pointer ----------------------------------------------------------------------------------- */

const tip = document.getElementById("tip");

/** `lines`: strings, the first of them bold. */
function showTip(x, y, [title, ...lines]) {
  tip.replaceChildren(el("b", {}, title), lines.map((line) => `\n${line}`).join(""));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 6))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(6, y - box.height - 12) : y + 18}px`;
}

function hideTip() {
  tip.hidden = true;
}
addEventListener("scroll", hideTip, { passive: true });

/** Blue to yellow with steady lightness, as in `sparsediff.eval.pictures`. */
const RAMP = DATA.ramp;

function ramp(t) {
  const x = Math.min(0.99999, Math.max(0, t)) * (RAMP.length - 1), i = Math.floor(x), f = x - i;
  return RAMP[i].map((v, c) => Math.round(v + f * (RAMP[i + 1][c] - v)));
}

/** Black over violet and orange to white (like inferno), for what is nearly everywhere nothing. */
const HEAT = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];
const HEAT_TABLE = Uint8ClampedArray.from({ length: 256 * 3 }, (_, k) => {
  const x = Math.min(0.99999, Math.floor(k / 3) / 255) * (HEAT.length - 1), i = Math.floor(x);
  return HEAT[i][k % 3] + (x - i) * (HEAT[i + 1][k % 3] - HEAT[i][k % 3]);
});

function rampLegend(low, high, colours = RAMP) {
  const stops = colours.map((c) => `rgb(${c.join(" ")})`).join(",");
  return el("span", { class: "ramp" }, el("span", {}, low), el("i", { style: `background:linear-gradient(90deg,${stops})` }), el("span", {}, high));
}
