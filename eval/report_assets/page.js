"use strict";

const page = document.getElementById("page");
const sparse = DATA.arms.filter((arm) => arm.id !== DATA.baseline);

function section(id, title, text, ...contents) {
  const node = el("section", { id, "aria-labelledby": `${id}-title` }, el("header", {}, el("h2", { id: `${id}-title` }, said(title)), text && el("p", {}, said(text))), contents);
  page.append(node);
  return node;
}

/* -- what it says ------------------------------------------------------------------------------------------------------ */

function themeButton() {
  const root = document.documentElement, remembered = () => { try { return localStorage.getItem("sparsediff-theme"); } catch { return null; } };
  const button = el("button", { type: "button", id: "theme" });
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const label = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colours`); };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("sparsediff-theme", root.dataset.theme); } catch { /* a private window keeps nothing */ }
    label();
  });
  if (remembered()) root.dataset.theme = remembered();
  label();
  return button;
}

page.append(
  el("div", { class: "top" }, el("span", {}, DATA.kicker), themeButton()),
  el("h1", { id: "headline" }, DATA.headline.map(said)),
  el("p", { class: "lede" }, said(DATA.lede)),
  el("div", { class: "badges" }, DATA.badges.map(({ text, kind, href }) => (href ? el("a", { class: `badge ${kind}`, href }, text) : el("span", { class: `badge ${kind}` }, said(text))))),
  DATA.tiles.length > 0 && el("dl", { class: "tiles" }, DATA.tiles.map((tile) => el("div", { class: "tile" }, el("dt", {}, tile.label),
    el("dd", {}, el("div", { class: "value" }, tile.value, tile.unit && el("span", { class: "unit" }, tile.unit)), el("div", { class: "range" }, said(tile.note)))))),
);

/* -- the table ------------------------------------------------------------------------------------------------------------ */

function range([, low, high], text) {
  return low == null || high == null || text(low) === text(high) ? null : el("small", {}, `${text(low)} – ${text(high)}`);
}

const times = (x) => (Number.isNaN(number(x)) ? "–" : `${digits(number(x), 2)}×`);

function summaryTable() {
  const columns = [
    ["Density", "kept share of attention over all steps, dense steps included", (a) => a.density, (x) => digits(number(x), 3), "lower"],
    ["Denoiser", "dense time over this arm's, inside the transformer", (a) => a.denoiser, times, "higher"],
    ["Whole call", "dense time over this arm's, with text encoding and decoding", (a) => a.speedup, times, "higher"],
    ...DATA.metricNames.map((name) => {
      const metric = DATA.metrics[name];
      return metric.against
        ? [metric.label + (metric.unit ? ` (${metric.unit})` : ""), metric.meaning, (a) => a.metrics[name], (x) => show(name, x), metric.better]
        : [`${metric.label} − dense`, said(`${metric.meaning}; the difference to the dense clips`), (a) => a.differences[name], (x) => signed(x, places(name)), null];
    }),
  ];
  const best = columns.map(([, , get, , better]) => {
    const values = sparse.filter((a) => a.role === "sparse").map((a) => number(get(a)?.[0])).filter(Number.isFinite);
    return better && values.length > 1 ? (better === "higher" ? Math.max(...values) : Math.min(...values)) : NaN;
  });
  const body = el("tbody", {}, DATA.arms.map((arm) => el("tr", { "data-arm": arm.id, class: arm.id === DATA.focus ? "chosen" : "" },
    el("th", { scope: "row" }, dot(arm), arm.label, arm.subtitle && el("small", {}, arm.subtitle)),
    columns.map(([name, , get, text], i) => {
      const value = get(arm);
      if (!value) return el("td", {}, arm.id === DATA.baseline && i > 0 ? "" : "–");
      const isIdentical = name.startsWith("PSNR") && arm.identical > 0;
      const shown = isIdentical && arm.identical === arm.clips ? "identical" : text(value[0]);
      return el("td", { class: arm.role === "sparse" && number(value[0]) === best[i] ? "best" : "" }, shown,
        isIdentical ? el("small", {}, said(`${arm.identical} of ${arm.clips} clips identical`)) : range(value, text),
        name === "Denoiser" && arm.forecast != null && el("small", {}, `forecast ${times(arm.forecast)}`));
    }))));
  return el("div", { class: "card" }, el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Summary of all arms" }, el("table", { id: "summary" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Arm"),
    columns.map(([name, meaning, , , better]) => el("th", { scope: "col" }, el("abbr", { title: meaning }, name), better && el("small", {}, better === "higher" ? "more is better" : "less is better"))))), body)),
    el("p", { class: "note" }, said(DATA.tableNote)));
}

function signed(x, decimals) {
  const value = number(x);
  return Number.isNaN(value) ? "–" : `${value > 0 ? "+" : ""}${digits(value, decimals)}`;
}

section("results", "Results", null, summaryTable());

/* -- trade-off -------------------------------------------------------------------------------------------------------------- */

const quality = DATA.metricNames.filter((name) => DATA.metrics[name].against && DATA.metrics[name].better);
if (quality.length && sparse.length) {
  let metric = quality[0];
  const charts = [];
  const plot = (axis, xLabel, xText, xBetter, floor) => {
    const box = chart((width) => scatter(width, {
      points: DATA.arms.map((arm) => ({ arm, x: (arm.id === DATA.baseline ? [1, null, null] : arm[axis] ?? []).map(number), y: arm.id === DATA.baseline && metric === "psnr" ? [Infinity] : (arm.metrics[metric] ?? []).map(number) })).filter((p) => p.x.length && p.y.length),
      xLabel, yLabel: DATA.metrics[metric].label + (DATA.metrics[metric].unit ? ` (${DATA.metrics[metric].unit})` : ""), xText, yText: (v) => withUnit(metric, v), xBetter, yBetter: DATA.metrics[metric].better, xFloor: floor, chosen: picked.arm, onpick: (arm) => pick({ arm }),
    }), { "data-plot": axis });
    charts.push(box);
    return box;
  };
  const names = { higher: "up is better", lower: "down is better" };
  const hint = el("span", { class: "note" });
  const say = () => { hint.textContent = names[DATA.metrics[metric].better]; charts.forEach((c) => c.redraw()); };
  section("tradeoff", "Quality against cost", "Each point is an arm, with 95 % intervals over prompts; the dashed line joins the arms that no other beats in both respects. Click a point to look at that arm below.",
    el("div", { class: "head" }, selectField("Quality", quality.map((n) => [n, DATA.metrics[n].label]), metric, (v) => { metric = v; say(); }, { id: "quality" }).field, hint),
    el("div", { class: "columns" }, el("div", { class: "card" }, el("h3", {}, "against time"), plot("denoiser", "denoiser speed-up (×)", times, "higher", 0)),
      el("div", { class: "card" }, el("h3", {}, "against density"), plot("density", "density", (x) => digits(x, 3), "lower", 0))));
  onPick(say);
}

/* -- time ------------------------------------------------------------------------------------------------------------------- */

const PARTS = [["text", "prompt"], ["attention", "attention"], ["mask", "choosing blocks"], ["denoiser", "rest of the denoiser"], ["decode", "decoding"], ["other", "other"]];

function timeBars() {
  const longest = Math.max(...DATA.arms.map((arm) => arm.seconds.total));
  const rows = DATA.arms.map((arm) => {
    const parts = { ...arm.seconds };
    const undivided = parts.attention == null;
    parts.other = Math.max(0, parts.total - ["text", "attention", "mask", "denoiser", "decode"].reduce((sum, name) => sum + (parts[name] ?? 0), 0));
    const said = PARTS.filter(([name]) => parts[name] > 0).map(([name, label]) => `${label} ${digits(parts[name], 2)} s`);
    const bar = el("div", { class: "bar", role: "img", "aria-label": `${arm.label}: ${said.join(", ")}`, style: `width:${100 * parts.total / longest}%` }, PARTS.filter(([name]) => parts[name] > 0).map(([name, label]) => {
      const text = name === "denoiser" && undivided ? "denoiser, attention included" : label;
      const lines = [arm.label, `${text}: ${digits(parts[name], 2)} s, ${percent(parts[name] / parts.total)} of the call`];
      return el("i", { class: `part-${name}`, style: `flex:${parts[name]}`, onpointermove: (event) => showTip(event.clientX, event.clientY, lines), onpointerleave: hideTip });
    }));
    const facts = [`${digits(parts.total, parts.total < 10 ? 2 : 1)} s`, arm.peakBytes && `${digits(arm.peakBytes / 2 ** 30, 2)} GiB`, arm.joules && `${digits(arm.joules, 0)} J`].filter(Boolean);
    return el("div", { class: "timed" }, el("span", { class: "who" }, dot(arm), arm.label), el("div", { class: "track" }, bar), el("span", { class: "sum" }, facts.join(" · ")));
  });
  const used = PARTS.filter(([name]) => rows.some((row) => row.querySelector(`.part-${name}`)));
  return el("div", { class: "card", id: "time-bars" }, rows, el("div", { class: "legend" }, used.map(([name, label]) => el("span", {}, el("i", { class: `swatch part-${name}` }), label))));
}

section("time", "Where the time goes", "One clip, mean over prompts; the figure behind a bar is the whole call, and the largest memory where it was measured.", timeBars());

/* -- pickers ------------------------------------------------------------------------------------------------------------------ */

const armOptions = DATA.arms.map((arm) => [arm.id, arm.label]);
const clipOptions = DATA.prompts.map((p) => [p.index, DATA.severalSeeds ? `${p.prompt} (seed ${p.seed})` : p.prompt]);
const promptPicker = selectField("Prompt", clipOptions, picked.clip, (v) => pick({ clip: Number(v) }), { id: "prompt", class: "prompt" });
const armPicker = selectField("Arm", armOptions, picked.arm, (v) => pick({ arm: v }), { id: "arm" });
const otherPicker = selectField("beside", armOptions, picked.other, (v) => pick({ other: v }), { id: "other" });
page.append(el("div", { class: "pickers" }, promptPicker.field, armPicker.field, otherPicker.field));
onPick(() => {
  promptPicker.select.value = picked.clip;
  armPicker.select.value = picked.arm;
  otherPicker.select.value = picked.other;
  for (const row of document.querySelectorAll("#summary tbody tr")) row.classList.toggle("chosen", row.dataset.arm === picked.arm);
});

/* -- clips -------------------------------------------------------------------------------------------------------------------- */

const player = new Player();
const figures = el("p", { class: "note", id: "clip-figures" });
section("clips", "The clips", "Same prompt, seed, steps and scheduler: what differs is the attention.", el("div", { class: "card" }, player.node, figures));
let shown = null;
onPick(() => {
  const sides = [picked.other, picked.arm].map((id) => ({ arm: ARMS.get(id), label: ARMS.get(id).label, clip: clipOf(id), note: caption(clipOf(id)) }));
  const key = `${picked.clip}/${picked.other}/${picked.arm}`;
  if (key === shown) return;
  shown = key;
  const clip = clipOf(picked.arm);
  figures.textContent = clip ? [`${ARMS.get(picked.arm).label}, ${said("this clip")}: density ${digits(number(clip.density), 3)}`, ...DATA.metricNames.filter((n) => clip.metrics[n] != null).map((n) => `${DATA.metrics[n].label} ${withUnit(n, clip.metrics[n])}`), clip.seconds != null && `denoiser ${digits(clip.seconds, 2)} s`].filter(Boolean).join(" · ") : said("This arm has no clip of this prompt.");
  player.load(sides[0], sides[1], DATA.fps);
});

function caption(clip) {
  return clip?.metrics.psnr != null ? withUnit("psnr", clip.metrics.psnr) : "";
}

/* -- curves ------------------------------------------------------------------------------------------------------------------- */

function curveCard(id, title, kinds, values, xLabel, name, ongo) {
  const present = kinds.filter(([kind]) => DATA.arms.some((arm) => Object.values(DATA.clips[arm.id] ?? {}).some((clip) => values(clip, kind)?.some((v) => Number.isFinite(number(v))))));
  if (!present.length) return null;
  let kind = present[0][0];
  const legend = el("div", { class: "legend" });
  const box = chart((width) => {
    const series = DATA.arms.map((arm) => ({ arm, values: (clipOf(arm.id) ? values(clipOf(arm.id), kind) ?? [] : []).map(number) })).filter((s) => s.values.some((v) => !Number.isNaN(v)));
    legend.replaceChildren(...series.map((s) => el("span", { class: s.arm.id === picked.arm ? "on" : "" }, dot(s.arm), s.arm.label)));
    if (!series.length) return el("p", { class: "note" }, said("Not measured for this clip."));
    const [, label, text, limits] = present.find(([k]) => k === kind);
    return lineChart(width, { series, xLabel, yLabel: label, name, text, ...limits, chosen: picked.arm, ongo });
  }, { "data-curve": id });
  onPick(box.redraw);
  const field = present.length > 1 ? selectField("", present.map(([k, label]) => [k, label]), kind, (v) => { kind = v; box.redraw(); }, { id: `${id}-kind`, "aria-label": title }).field : el("span", { class: "note" }, present[0][1]);
  return el("div", { class: "card" }, el("div", { class: "head" }, el("h3", {}, title), field), box, legend);
}

const frameKinds = Object.keys(DATA.metrics).map((name) => [name, DATA.metrics[name].label, (v) => withUnit(name, v), { ceiling: name.includes("ssim") ? 1 : undefined, floor: name === "psnr" || name.includes("ssim") ? undefined : 0 }]);
const stepKinds = [
  ["latent_divergence", "latents, distance to dense", (v) => digits(v, 4), { floor: 0 }], ["density", "density", (v) => digits(v, 3), { floor: 0, ceiling: 1.04 }],
  ["attention_error", "attention error", (v) => digits(v, 4), { floor: 0 }], ["seconds", "seconds in the denoiser", (v) => `${digits(v, 3)} s`, { floor: 0 }], ["sigma", "noise level", (v) => digits(v, 3), { floor: 0 }],
];
const curves = [
  STILL ? null : curveCard("frames", "Frame by frame", frameKinds, (clip, kind) => clip.curves[kind], "frame; click to see it", "frame", (frame) => player.goTo(frame)),
  curveCard("steps", "Step by step", stepKinds, (clip, kind) => clip.steps[kind], "denoising step", "step"),
].filter(Boolean);
if (curves.length) section("curves", "Where it differs", "All arms on the prompt picked above; the picked arm is the thick line.", el("div", { class: "columns" }, curves));

/* -- densities ------------------------------------------------------------------------------------------------------------------ */

if (DATA.arms.some((arm) => Object.values(DATA.clips[arm.id] ?? {}).some((clip) => clip.layers.length))) {
  const title = el("h3", { id: "density-of" });
  const heat = (kind, columnLabel, columnName) => chart((width) => {
    const layers = clipOf(picked.arm)?.layers ?? [];
    if (!layers.length) return el("p", { class: "note" }, "This arm counted nothing: it ran the stock pipeline.");
    return heatMap(width, { cells: layers.map((layer) => layer[kind].map(number)), rowNames: layers.map((layer) => layer.name), columnName, label: `Density by layer and ${columnName}`, rowLabel: "layer", columnLabel });
  }, { "data-heat": kind });
  const byStep = heat("steps", "denoising step", "step"), byHead = heat("heads", "head, mean over all steps", "head");
  section("density", "Where it is sparse", "Kept share of attention, by layer; dense calls count 1.",
    el("div", { class: "card" }, el("div", { class: "head" }, title, rampLegend("0", "1, dense")), el("div", { class: "columns" }, byStep, byHead), el("p", { class: "note", id: "dense-calls" })));
  onPick(() => {
    title.textContent = ARMS.get(picked.arm).label;
    const calls = Object.entries(clipOf(picked.arm)?.denseCalls ?? {});
    document.getElementById("dense-calls").textContent = calls.length ? `Ran dense: ${calls.map(([reason, count]) => `${count} calls, ${reason}`).join("; ")}.` : "";
    byStep.redraw();
    byHead.redraw();
  });
}

/* -- masks ---------------------------------------------------------------------------------------------------------------------- */

if (DATA.masks.length) {
  const viewer = new MaskViewer();
  const about = el("p", { class: "note" });
  let index = Math.max(0, DATA.masks.findIndex((mask) => mask.arm === picked.arm));
  const load = () => {
    const mask = DATA.masks[index];
    about.textContent = mask.about;
    viewer.load(mask);
  };
  const picker = selectField("Captured run", DATA.masks.map((mask, i) => [i, ARMS.get(mask.arm)?.label ?? mask.arm]), index, (v) => { index = Number(v); load(); }, { id: "mask-arm" });
  section("masks", "What a patch attends", STILL ? "Click a patch: the blocks of tokens that its block of queries (orange) reads stay lit, everything else is dark. Arrow keys move."
    : "Click a patch of any frame: the blocks of tokens that its block of queries (orange) reads stay lit on all frames, everything else is dark. Arrow keys move, Page Up and Page Down change the frame.",
    el("div", { class: "card", id: "mask-viewer" }, DATA.masks.length > 1 ? el("div", { class: "controls" }, picker.field) : null, viewer.node, about));
  load();
  let last = picked.arm;
  onPick(() => {
    const found = DATA.masks.findIndex((mask) => mask.arm === picked.arm);
    if (picked.arm === last || found < 0) return;
    last = picked.arm;
    index = found;
    picker.select.value = found;
    load();
  });
}

/* -- whether to believe it -------------------------------------------------------------------------------------------------- */

if (DATA.checks.length) {
  const sign = { true: ["✓", "passed", ""], false: ["✗", "failed", "failed"], null: ["–", "not made", "unknown"] };
  section("checks", "Self-checks", "What the harness verified about its own figures.", el("div", { class: "card" }, el("ul", { class: "checks" }, DATA.checks.map((check) => {
    const [mark, word, kind] = sign[String(check.passed)];
    return el("li", { class: kind }, el("span", { class: "sign", "aria-label": word, title: word }, mark), el("span", {}, el("strong", {}, check.name), ` ${check.detail} `, el("span", { class: "where" }, `(${check.arms.join(", ")})`)));
  }))));
}
section("caveats", "What to bear in mind", null, el("div", { class: "card" }, el("ul", {}, DATA.caveats.map((text) => el("li", {}, said(text))))));
section("environment", "Where it was measured", null, el("div", { class: "card" }, el("div", { class: "scroll" }, el("table", {}, el("tbody", {}, DATA.environment.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { style: "text-align:left;white-space:normal;overflow-wrap:anywhere" }, value))))))));
section("reproduce", "Do it again", null, el("div", { class: "card" }, el("h3", {}, "From the command line"), el("pre", {}, DATA.reproduce.command), el("h3", {}, "From Python"), el("pre", {}, DATA.reproduce.python)));
page.append(el("footer", {}, DATA.footer));
document.documentElement.dataset.ready = "true";
