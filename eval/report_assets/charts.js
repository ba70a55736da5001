"use strict";

/* Charts are SVG, drawn anew whenever their width or their contents change. */

const PAD = { left: 64, right: 16, top: 12, bottom: 38 };

/** A box that calls `draw(width)` for its contents. */
function chart(draw, attributes = {}) {
  const box = el("div", { class: "chart", ...attributes });
  let width = 0;
  const redraw = () => { if (width > 0) box.replaceChildren(...[draw(width)].flat().filter(Boolean)); };
  new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now === width) return;
    width = now;
    redraw();
  }).observe(box);
  box.redraw = redraw;
  return box;
}

/** About `count` round numbers that cover `[low, high]`. */
function ticks(low, high, count = 5) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999) ?? 10);
  const out = [];
  for (let x = Math.ceil(low / step - 1e-9) * step; x <= high + step * 1e-9; x += step) out.push(Math.abs(x) < step * 1e-9 ? 0 : x);
  return out;
}

function tickText(x, all) {
  const step = all.length > 1 ? Math.abs(all[1] - all[0]) : 1;
  const decimals = Math.max(0, Math.min(4, -Math.floor(Math.log10(step) + 1e-9)));
  const more = Math.abs(step * 10 ** decimals - Math.round(step * 10 ** decimals)) > 1e-6 ? 1 : 0;
  return digits(x, decimals + more);
}

function extent(values, { floor, ceiling, margin = 0.08 } = {}) {
  const finite = values.filter(Number.isFinite);
  if (!finite.length) return [0, 1];
  let low = Math.min(...finite), high = Math.max(...finite);
  const room = (high - low || Math.abs(high) || 1) * margin;
  low -= room; high += room;
  return [floor == null ? low : Math.max(floor, low), ceiling == null ? high : Math.min(ceiling, high)];
}

function axes(root, { width, height, x, y, xRange, yRange, xLabel, yLabel, xTicks, left = PAD.left }) {
  const xs = xTicks ?? ticks(...xRange, Math.max(3, Math.min(8, width / 90))), ys = ticks(...yRange, 5);
  for (const value of ys) {
    root.append(svg("line", { class: "grid", x1: left, x2: width - PAD.right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, tickText(value, ys)));
  }
  root.append(svg("line", { class: "axis", x1: left, x2: width - PAD.right, y1: height - PAD.bottom, y2: height - PAD.bottom }));
  for (const value of xs) root.append(svg("text", { x: x(value), y: height - PAD.bottom + 17, "text-anchor": "middle" }, tickText(value, xs)));
  root.append(svg("text", { x: (left + width - PAD.right) / 2, y: height - 3, "text-anchor": "middle" }, xLabel));
  root.append(svg("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(9 ${(height - PAD.bottom + PAD.top) / 2}) rotate(-90)` }, yLabel));
}

/**
 * Lines over whole numbers. `series`: `{arm, values}`; NaN leaves a gap, infinity is drawn at the upper edge.
 * The pointer, or the arrow keys, read all lines at one place; a click or Enter goes there.
 */
function lineChart(width, { series, xLabel, yLabel, name, text, floor, ceiling, chosen, ongo }) {
  const height = Math.round(Math.max(220, Math.min(300, width * 0.52)));
  const length = Math.max(...series.map((s) => s.values.length));
  const yRange = extent(series.flatMap((s) => s.values), { floor, ceiling });
  const x = (i) => PAD.left + (length > 1 ? i / (length - 1) : 0.5) * (width - PAD.left - PAD.right);
  const y = (v) => PAD.top + (1 - (Math.min(v, yRange[1]) - yRange[0]) / (yRange[1] - yRange[0])) * (height - PAD.top - PAD.bottom);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": `${yLabel} by ${xLabel}` });
  axes(root, { width, height, x, y, xRange: [0, length - 1], yRange, xLabel, yLabel, xTicks: ticks(0, length - 1, Math.min(10, width / 60)).filter(Number.isInteger) });
  for (const { arm, values } of [...series].sort((a, b) => (a.arm.id === chosen) - (b.arm.id === chosen))) {
    const on = arm.id === chosen;
    let path = "", pen = false;
    values.forEach((v, i) => {
      if (Number.isNaN(v)) { pen = false; return; }
      path += `${pen ? "L" : "M"}${x(i).toFixed(1)},${y(v).toFixed(1)}`;
      pen = true;
    });
    root.append(svg("path", { d: path, fill: "none", "stroke-linejoin": "round", "stroke-width": on ? 2.6 : 1.5, "stroke-dasharray": arm.role === "random" ? "2 3" : arm.role === "sparse" ? null : "6 3", style: `stroke:${colour(arm)}`, opacity: on ? 1 : 0.75 }));
    const last = values.findLastIndex((v) => !Number.isNaN(v));
    if (last >= 0) root.append(svg("path", { d: shape(arm), transform: `translate(${x(last)} ${y(values[last])}) scale(.72)`, style: `fill:${colour(arm)}` }));
  }
  const hair = svg("line", { class: "axis", y1: PAD.top, y2: height - PAD.bottom, visibility: "hidden" });
  root.append(hair);
  let at = length - 1;
  const read = (i, px, py) => {
    at = Math.max(0, Math.min(length - 1, i));
    hair.setAttribute("x1", x(at)); hair.setAttribute("x2", x(at)); hair.setAttribute("visibility", "visible");
    showTip(px, py, [`${name} ${at}`, ...series.map((s) => `${s.arm.label}: ${text(s.values[at])}`)]);
  };
  const leave = () => { hideTip(); hair.setAttribute("visibility", "hidden"); };
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect();
    const inside = ((event.clientX - box.left) / box.width * width - PAD.left) / (width - PAD.left - PAD.right);
    read(Math.round(inside * (length - 1)), event.clientX, event.clientY);
  });
  root.addEventListener("pointerleave", leave);
  root.addEventListener("blur", leave);
  if (ongo) root.addEventListener("click", () => ongo(at));
  root.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && ongo) ongo(at);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const box = root.getBoundingClientRect();
    read(at + step, box.left + x(Math.max(0, Math.min(length - 1, at + step))) / width * box.width, box.top + 20);
  });
  return root;
}

/** Quality against a cost, one point an arm with its intervals; `points`: `{arm, x: [mean, low, high], y: [...]}`. */
function scatter(width, { points, xLabel, yLabel, xText, yText, xBetter, yBetter, xFloor, chosen, onpick }) {
  const height = Math.round(Math.max(260, Math.min(360, width * 0.66)));
  const drawn = points.filter((p) => !Number.isNaN(p.x[0]) && !Number.isNaN(p.y[0]));
  // The dense clip is identical to itself: infinite PSNR gets a line of its own above the others.
  const top = drawn.some((p) => p.y[0] === Infinity) ? 26 : 0;
  const xRange = extent(drawn.flatMap((p) => p.x), { floor: xFloor, margin: 0.12 }), yRange = extent(drawn.flatMap((p) => p.y), { margin: 0.12 });
  const x = (v) => PAD.left + (v - xRange[0]) / (xRange[1] - xRange[0]) * (width - PAD.left - PAD.right);
  const y = (v) => (v === Infinity ? PAD.top + 8 : PAD.top + top + (1 - (v - yRange[0]) / (yRange[1] - yRange[0])) * (height - PAD.top - PAD.bottom - top));
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${yLabel} against ${xLabel}` });
  axes(root, { width, height, x, y, xRange, yRange, xLabel, yLabel });
  if (top) root.append(svg("line", { class: "axis", x1: PAD.left, x2: width - PAD.right, y1: PAD.top + 20, y2: PAD.top + 20 }));
  const front = frontier(drawn, xBetter, yBetter);
  if (front.length > 1) root.append(svg("path", { d: front.map((p, i) => `${i ? "L" : "M"}${x(p.x[0])},${y(p.y[0])}`).join(""), fill: "none", style: "stroke:var(--faint)", "stroke-width": 1.2, "stroke-dasharray": "4 4" }));
  const taken = [];
  for (const p of drawn) {
    const [cx, cy] = [x(p.x[0]), y(p.y[0])], style = `stroke:${colour(p.arm)}`;
    const bars = svg("g", { "stroke-width": 1.3, opacity: 0.55, style });
    if (Number.isFinite(p.x[1])) bars.append(svg("line", { x1: x(p.x[1]), x2: x(p.x[2]), y1: cy, y2: cy }));
    if (Number.isFinite(p.y[1]) && Number.isFinite(p.y[0])) bars.append(svg("line", { x1: cx, x2: cx, y1: y(p.y[1]), y2: y(p.y[2]) }));
    const lines = [p.arm.label, `${xLabel}: ${xText(p.x[0])}${interval(p.x, xText)}`, `${yLabel}: ${yText(p.y[0])}${interval(p.y, yText)}`];
    const say = (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      showTip(event.clientX || box.right, event.clientY || box.top, lines);
    };
    const mark = svg("g", { tabindex: "0", role: "button", "aria-label": lines.join(", "), style: "cursor:pointer", onpointermove: say, onfocus: say, onpointerleave: hideTip, onblur: hideTip,
      onclick: () => onpick(p.arm.id), onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); onpick(p.arm.id); } } },
      svg("circle", { cx, cy, r: 14, fill: "transparent" }),
      p.arm.id === chosen ? svg("circle", { cx, cy, r: 10.5, fill: "none", "stroke-width": 1.6, style }) : null,
      svg("path", { d: shape(p.arm), transform: `translate(${cx} ${cy}) scale(1.15)`, style: `fill:${colour(p.arm)}` }));
    root.append(bars, mark, pointLabel(p.arm.label, cx, cy, width, taken, p.arm.id === chosen));
  }
  return root;
}

/** Beside its point, where no other label stands. */
function pointLabel(text, cx, cy, width, taken, on) {
  const length = Math.min(text.length, 30) * (on ? 7 : 6.3), off = on ? 16 : 13;
  // Beside the point on either side, or centred above or below it (side 0), within the axes.
  const places = [[0, 1], [0, -1], [-20, 0], [24, 0], [-15, 1], [15, 1], [-15, -1], [15, -1], [-34, 0], [38, 0]];
  const box = ([dy, side]) => {
    const left = side > 0 ? cx + off : side < 0 ? cx - off - length : Math.max(PAD.left, Math.min(width - length, cx - length / 2));
    return { left, right: left + length, top: cy + dy - 8, bottom: cy + dy + 6 };
  };
  const free = places.find((place) => {
    const b = box(place);
    return b.left >= PAD.left && b.right <= width && !taken.some((t) => b.left < t.right && t.left < b.right && b.top < t.bottom && t.top < b.bottom);
  }) ?? [-20, 0];
  const at = box(free);
  taken.push(at, { left: cx - 8, right: cx + 8, top: cy - 8, bottom: cy + 8 });
  const short = text.length > 30 ? `${text.slice(0, 29)}…` : text;
  const x = free[1] > 0 ? at.left : free[1] < 0 ? at.right : (at.left + at.right) / 2;
  return svg("text", { x, y: cy + free[0] + 4, "text-anchor": ["end", "middle", "start"][free[1] + 1], class: on ? "label" : null, "pointer-events": "none" }, short);
}

function interval([, low, high], text) {
  return Number.isFinite(low) && Number.isFinite(high) && low !== high ? ` (${text(low)} to ${text(high)})` : "";
}

/** Points that no other beats in both respects, in order of x. */
function frontier(points, xBetter, yBetter) {
  const better = (a, b, sign) => (sign === "higher" ? a >= b : a <= b);
  return points
    .filter((p) => Number.isFinite(p.y[0]) && !points.some((q) => q !== p && Number.isFinite(q.y[0]) && better(q.x[0], p.x[0], xBetter) && better(q.y[0], p.y[0], yBetter) && (q.x[0] !== p.x[0] || q.y[0] !== p.y[0])))
    .sort((a, b) => a.x[0] - b.x[0]);
}

/** Densities in rows (layers) and columns; `cells[row][column]` in [0, 1], NaN is hatched. */
function heatMap(width, { cells, rowNames, columnName, label, rowLabel, columnLabel }) {
  const rows = cells.length, columns = Math.max(...cells.map((r) => r.length));
  const left = 30, right = 4, bottom = 36;
  const cw = (width - left - right) / columns, ch = Math.max(7, Math.min(26, 300 / rows, cw * 1.6));
  const height = Math.round(rows * ch + bottom + 2);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": label });
  const gap = Math.min(cw, ch) > 9 ? 1 : 0;
  cells.forEach((row, r) => row.forEach((value, c) => {
    const fill = Number.isNaN(value) ? "var(--well)" : `rgb(${ramp(value).join(" ")})`;
    root.append(svg("rect", { x: left + c * cw, y: r * ch, width: Math.max(0.5, cw - gap), height: Math.max(0.5, ch - gap), rx: gap ? 1.5 : 0, style: `fill:${fill}`, "data-row": r, "data-column": c }));
  }));
  const every = Math.max(1, Math.ceil(12 / ch));
  for (let r = 0; r < rows; r += every) root.append(svg("text", { x: left - 6, y: (r + 0.5) * ch + 4, "text-anchor": "end" }, r));
  const step = Math.max(1, Math.ceil(26 / cw));
  for (let c = 0; c < columns; c += step) root.append(svg("text", { x: left + (c + 0.5) * cw, y: rows * ch + 15, "text-anchor": "middle" }, c));
  root.append(svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, columnLabel));
  root.append(svg("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(9 ${rows * ch / 2}) rotate(-90)` }, rowLabel));
  const frame = svg("rect", { fill: "none", style: "stroke:var(--ink)", "stroke-width": 1.6, visibility: "hidden", "pointer-events": "none" });
  root.append(frame);
  let at = [0, 0];
  const read = (r, c, px, py) => {
    at = [Math.max(0, Math.min(rows - 1, r)), Math.max(0, Math.min(columns - 1, c))];
    const value = cells[at[0]][at[1]] ?? NaN;
    for (const [name, v] of Object.entries({ x: left + at[1] * cw, y: at[0] * ch, width: cw - gap, height: ch - gap, visibility: "visible" })) frame.setAttribute(name, v);
    showTip(px, py, [Number.isNaN(value) ? "not called" : `density ${digits(value, 3)}`, rowNames[at[0]], `${columnName} ${at[1]}`]);
  };
  const leave = () => { hideTip(); frame.setAttribute("visibility", "hidden"); };
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect(), scale = width / box.width;
    const c = Math.floor(((event.clientX - box.left) * scale - left) / cw), r = Math.floor((event.clientY - box.top) * scale / ch);
    if (r >= 0 && r < rows && c >= 0 && c < columns) read(r, c, event.clientX, event.clientY);
    else leave();
  });
  root.addEventListener("pointerleave", leave);
  root.addEventListener("blur", leave);
  root.addEventListener("keydown", (event) => {
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    const box = root.getBoundingClientRect();
    read(at[0] + move[0], at[1] + move[1], box.left + left + at[1] * cw, box.top + at[0] * ch);
  });
  return root;
}
