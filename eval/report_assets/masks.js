"use strict";

/**
 * Which blocks a patch of the video reads, drawn over the frames. `mask` is one captured run: its grid, its calls and,
 * for every window, the place of each token of the video in the order that the mask knows.
 */
class MaskViewer {
  constructor() {
    this.bar = el("div", { class: "controls" });
    this.frames = el("div", { class: "frames" });
    this.map = el("canvas", { tabindex: "0", role: "img", "aria-label": "Blocks read by each block of queries; click a row to go there", onclick: (event) => this.clickMap(event) });
    this.facts = el("dl", { class: "facts", "aria-live": "polite" });
    this.note = el("p", { class: "note" });
    this.node = el("div", {}, this.bar, el("div", { class: "masks" }, this.frames,
      el("div", { class: "map" }, el("h3", {}, "The whole mask of this head"), el("figure", {}, this.map, el("p", { class: "note" }, "Rows are blocks of queries, columns blocks of keys, in the order the kernel walks them. The line is the block of the chosen patch.")), this.facts)), this.note);
    this.at = null;
    this.head = 0;
    this.row = 0;
    this.show = "blocks";
  }

  /** `mask` of `DATA.masks`. */
  load(mask) {
    this.mask = mask;
    const [f, h, w] = mask.grid;
    if (!this.at || this.at.some((x, i) => x >= mask.grid[i])) this.at = [Math.floor(f / 2), Math.floor(h / 2), Math.floor(w / 2)];
    // Where nothing was chosen yet, the call that reads least has the most to show.
    const share = (call) => call.density.flat().reduce((a, b) => a + b) / call.density.flat().length;
    const sparsest = mask.calls.reduce((a, b) => (share(b) < share(a) ? b : a));
    this.layer = mask.calls.some((c) => c.layer === this.layer) ? this.layer : sparsest.layer;
    this.step = mask.calls.some((c) => c.step === this.step) ? this.step : sparsest.step;
    this.branch = mask.calls.some((c) => c.branch === this.branch) ? this.branch : sparsest.branch;
    this.pictures = mask.stills.map((source) => {
      const image = new Image();
      image.onload = () => this.drawSoon();
      image.src = source;
      return image;
    });
    this.canvases = Array.from({ length: f }, (_, t) => this.frameCanvas(t, h, w));
    // Few frames are drawn large.
    this.frames.style.setProperty("--wide", f === 1 ? "24rem" : f <= 4 ? "15rem" : f <= 12 ? "12rem" : "9.5rem");
    this.frames.replaceChildren(...this.canvases.map((canvas, t) => el("figure", {}, f > 1 && el("figcaption", {}, `latent frame ${t}`), canvas)));
    this.controls();
    this.draw();
  }

  frameCanvas(frame, h, w) {
    const cell = Math.max(4, Math.min(16, Math.floor(320 / w)));
    const canvas = el("canvas", { width: w * cell, height: h * cell, tabindex: "0", role: "button", "aria-label": `${STILL ? "picture" : `latent frame ${frame}`}: click a patch, or move with the arrow keys`, "data-frame": frame });
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      this.choose([frame, Math.floor((event.clientY - box.top) / box.height * h), Math.floor((event.clientX - box.left) / box.width * w)]);
    });
    canvas.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0], ArrowLeft: [0, 0, -1], ArrowRight: [0, 0, 1], PageUp: [-1, 0, 0], PageDown: [1, 0, 0] }[event.key];
      if (!move) return;
      event.preventDefault();
      const from = event.key.startsWith("Page") || this.at[0] === frame ? this.at : [frame, this.at[1], this.at[2]];
      this.choose(from.map((x, i) => x + move[i]));
      this.canvases[this.at[0]].focus();
    });
    return canvas;
  }

  choose(at) {
    this.at = at.map((x, i) => Math.max(0, Math.min(this.mask.grid[i] - 1, x)));
    this.draw();
  }

  controls() {
    const { calls } = this.mask;
    const unique = (name) => [...new Set(calls.map((call) => call[name]))];
    const fields = [];
    const add = (label, options, value, change) => fields.push(selectField(label, options, value, change).field);
    add("Layer", unique("layer").map((name) => [name, name.replace(/^transformer\./, "")]), this.layer, (v) => { this.layer = v; this.controls(); this.draw(); });
    add("Step", unique("step").sort((a, b) => a - b).map((s) => [s, String(s)]), this.step, (v) => { this.step = Number(v); this.controls(); this.draw(); });
    if (unique("branch").length > 1) add("Guidance", unique("branch").map((b) => [b, b]), this.branch, (v) => { this.branch = v; this.controls(); this.draw(); });
    const call = this.call();
    if (call) {
      this.head = Math.min(this.head, call.heads.length - 1);
      this.row = Math.min(this.row, call.density.length - 1);
      add("Head", call.heads.map((head, i) => [i, `${head} (${digits(call.density[this.row][i], 2)})`]), this.head, (v) => { this.head = Number(v); this.draw(); });
      if (call.density.length > 1) add("Batch row", call.density.map((_, i) => [i, String(i)]), this.row, (v) => { this.row = Number(v); this.controls(); this.draw(); });
      if (call.mass) fields.push(segmented("Show", [["blocks", "Blocks read"], ["mass", "Attention"]], this.show, (v) => { this.show = v; if (this.ready) this.draw(); }));
    }
    this.ready = true;
    const focus = [...this.bar.querySelectorAll("select")].indexOf(document.activeElement);
    this.bar.replaceChildren(...fields);
    if (focus >= 0) this.bar.querySelectorAll("select")[focus]?.focus();
  }

  call() {
    const { calls } = this.mask;
    return calls.find((c) => c.layer === this.layer && c.step === this.step && c.branch === this.branch);
  }

  /** Where each token of the video stands in the order of the mask: `place(i)`. */
  placer(call) {
    const window = call.windows ? call.windows[this.row % call.windows.length][this.head] : null;
    if (window == null || call.names[window] == null) return (i) => i + this.mask.start;
    const raw = bytes(call.names[window]);
    const places = new Uint32Array(raw.buffer, raw.byteOffset, raw.byteLength / 4);
    return (i) => places[i];
  }

  /** Whether the block pair is read. */
  reader(call) {
    if (!call.bits) return () => true;
    const [batch, heads, rows, width] = call.shape, data = bytes(call.bits);
    const base = ((this.row % batch) * heads + (this.head % heads)) * rows * width;
    return (r, c) => ((data[base + r * width + (c >> 3)] >> (c & 7)) & 1) === 1;
  }

  /** Share of the row's attention in a block, or null. */
  masses(call) {
    if (!call.mass) return null;
    const [rows, columns] = call.blocks, data = bytes(call.mass);
    const base = (this.row * call.heads.length + this.head) * rows * columns;
    // One byte a block: 8 steps to a halving, 0 for nothing.
    return (r, c) => (data[base + r * columns + c] ? 2 ** ((data[base + r * columns + c] - 255) / 8) : 0);
  }

  /** Once, however many pictures arrive before the next frame of the screen. */
  drawSoon() {
    cancelAnimationFrame(this.waiting);
    this.waiting = requestAnimationFrame(() => this.draw());
  }

  draw() {
    const call = this.call(), [f, h, w] = this.mask.grid;
    if (!call) {
      this.facts.replaceChildren(el("dt", {}, "This layer was not called at this step."));
      return;
    }
    const place = this.placer(call), reads = this.reader(call), mass = this.masses(call), [bq, bk] = call.block;
    const token = (this.at[0] * h + this.at[1]) * w + this.at[2];
    const row = Math.floor(place(token) / bq);
    let read = 0;
    const lit = new Uint8Array(f * h * w), heat = mass && this.show === "mass" ? new Float32Array(f * h * w) : null;
    let hottest = 0;
    for (let i = 0; i < lit.length; i++) {
      const column = Math.floor(place(i) / bk);
      lit[i] = reads(row, column);
      read += lit[i];
      if (heat) { heat[i] = mass(row, column); hottest = Math.max(hottest, heat[i]); }
    }
    this.canvases.forEach((canvas, t) => this.drawFrame(canvas, t, lit, heat, hottest, row, place, bq));
    this.drawMap(call, reads, row, mass);
    this.tell(call, reads, row, read / lit.length, mass);
    this.node.dataset.lit = read;
  }

  drawFrame(canvas, t, lit, heat, hottest, row, place, bq) {
    const [, h, w] = this.mask.grid, pen = canvas.getContext("2d"), cw = canvas.width / w, ch = canvas.height / h;
    const picture = this.pictures[t];
    pen.fillStyle = "#8a8780";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    if (picture?.complete && picture.naturalWidth) pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const on = (y, x) => y >= 0 && x >= 0 && y < h && x < w && lit[(t * h + y) * w + x];
    for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
      const i = (t * h + y) * w + x;
      if (heat) {
        pen.fillStyle = `rgb(${ramp(Math.sqrt(heat[i] / (hottest || 1))).join(" ")} / 78%)`;
        pen.fillRect(x * cw, y * ch, cw, ch);
      } else if (!lit[i]) {
        pen.fillStyle = "rgb(16 16 18 / 80%)";
        pen.fillRect(x * cw, y * ch, cw, ch);
      }
    }
    pen.strokeStyle = "#f0e442";
    pen.lineWidth = 2;
    pen.beginPath();
    for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
      if (!on(y, x)) continue;
      const edges = [[!on(y - 1, x), 0, 0, 1, 0], [!on(y + 1, x), 0, 1, 1, 1], [!on(y, x - 1), 0, 0, 0, 1], [!on(y, x + 1), 1, 0, 1, 1]];
      for (const [edge, x1, y1, x2, y2] of edges) {
        if (!edge) continue;
        pen.moveTo((x + x1) * cw, (y + y1) * ch);
        pen.lineTo((x + x2) * cw, (y + y2) * ch);
      }
    }
    pen.stroke();
    // The block that asks, and in it the patch itself.
    for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
      if (Math.floor(place((t * h + y) * w + x) / bq) !== row) continue;
      pen.fillStyle = "rgb(230 110 10 / 34%)";
      pen.fillRect(x * cw, y * ch, cw, ch);
    }
    if (t === this.at[0]) {
      pen.strokeStyle = "#ffffff";
      pen.lineWidth = 2.5;
      pen.strokeRect(this.at[2] * cw + 1, this.at[1] * ch + 1, cw - 2, ch - 2);
      pen.strokeStyle = "#d55e00";
      pen.lineWidth = 1.5;
      pen.strokeRect(this.at[2] * cw - 1, this.at[1] * ch - 1, cw + 2, ch + 2);
    }
  }

  drawMap(call, reads, row, mass) {
    const [rows, columns] = call.blocks, pen = this.map.getContext("2d");
    this.map.width = columns;
    this.map.height = rows;
    const image = pen.createImageData(columns, rows);
    const heat = mass && this.show === "mass";
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
      const on = reads(r, c), k = 4 * (r * columns + c);
      let shade = on ? [0, 94, 148] : [236, 233, 227];
      if (heat) shade = ramp(Math.sqrt(Math.min(1, mass(r, c) * 4)));
      else if (r === row) shade = on ? [213, 94, 0] : [248, 222, 200];
      image.data.set([...shade, 255], k);
    }
    pen.putImageData(image, 0, 0);
  }

  clickMap(event) {
    const call = this.call(), box = this.map.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / box.height * call.blocks[0]), place = this.placer(call);
    const [f, h, w] = this.mask.grid;
    for (let i = 0; i < f * h * w; i++) {
      if (Math.floor(place(i) / call.block[0]) !== row) continue;
      this.choose([Math.floor(i / (h * w)), Math.floor(i / w) % h, i % w]);
      return;
    }
  }

  tell(call, reads, row, share, mass) {
    const [rows, columns] = call.blocks;
    let blocks = 0;
    for (let c = 0; c < columns; c++) blocks += reads(row, c);
    const facts = [["Patch", `${STILL ? "" : `frame ${this.at[0]}, `}row ${this.at[1]}, column ${this.at[2]}`], ["Reads", `${blocks} of ${columns} blocks`], [STILL ? "Of the picture" : "Of the video", percent(share)]];
    if (mass) {
      const at = 2 * ((this.row * call.heads.length + this.head) * rows + row), [low, high] = bytes(call.kept).slice(at, at + 2);
      facts.push(["Of its attention", percent((low + 256 * high) / 65535)]);
    }
    facts.push(["Head density", digits(call.density[this.row][this.head], 3)], ["Block", `${call.block.join(" × ")} tokens`], ["Order", call.windowNames ? call.windowNames[call.windows[this.row % call.windows.length][this.head]] : "as in the sequence"]);
    if (this.mask.outside) facts.push(["Other tokens", this.mask.outside]);
    if (call.reason) facts.push(["Ran dense", call.reason]);
    this.facts.replaceChildren(...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
    this.note.textContent = this.mask.note;
  }
}
