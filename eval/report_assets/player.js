"use strict";

/**
 * Two clips of the same prompt and seed, held on the same frame, and their difference.
 *
 * A paused player seeks both; a playing one lets both run and pulls the second back whenever it is off by more than
 * half a frame. The difference is only ever drawn from two pictures of one frame number.
 */
class Player {
  constructor() {
    this.frame = 0;
    this.frames = 1;
    this.gain = 4;
    this.rate = 1;
    this.playing = false;
    this.loads = 0;
    this.grabbed = [new Map(), new Map()];
    this.work = el("canvas");
    this.build();
  }

  build() {
    this.panes = ["a", "b", "d"].map((name) => this.pane(name));
    this.videos = this.panes.slice(0, 2).map((pane) => pane.media);
    this.canvas = this.panes[2].media;
    this.seam = el("div", { class: "seam", "aria-hidden": "true" }, el("i"));
    this.stage = el("div", { class: "stage", "data-mode": "side" }, this.panes.map((pane) => pane.figure), this.seam);
    this.wipe = el("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Wipe between the two clips", oninput: () => this.setWipe(this.wipe.value) });
    this.playButton = el("button", { type: "button", class: "play", onclick: () => (this.playing ? this.pause() : this.play()) }, "Play");
    this.scrubber = el("input", { type: "range", min: 0, max: 0, value: 0, step: 1, "aria-label": "Frame", oninput: () => this.goTo(Number(this.scrubber.value)) });
    this.counter = el("output", { class: "counter" });
    this.readout = el("output", { class: "apart" });
    const speeds = [0.25, 0.5, 1, 2].map((rate) => [String(rate), `${rate}×`]);
    const gains = [1, 2, 4, 8, 16].map((gain) => [String(gain), `${gain}×`]);
    const modes = segmented("View", [["side", "Side by side"], ["wipe", "Wipe"], ["difference", "Difference"]], "side", (mode) => { this.stage.dataset.mode = mode; });
    this.node = el("div", { class: "player" }, this.stage, el("div", { class: "wipe" }, this.wipe),
      el("div", { class: "controls" }, this.playButton, el("div", { class: "scrub" }, this.scrubber, this.counter), modes,
        selectField("Speed", speeds, "1", (rate) => { this.rate = Number(rate); this.videos.forEach((v) => { v.playbackRate = this.rate; }); }, { class: "speed" }).field,
        selectField("Gain", gains, "4", (gain) => { this.gain = Number(gain); this.drawDifference(); }).field),
      el("p", { class: "note" }, this.readout));
    this.setWipe(50);
    this.stage.addEventListener("pointerdown", (event) => this.drag(event));
    this.stage.addEventListener("pointermove", (event) => { if (event.buttons) this.drag(event); });
    this.videos.forEach((video, which) => this.listen(video, which));
  }

  pane(name) {
    const caption = [el("span"), el("span")];
    const media = name === "d" ? el("canvas") : el("video", { muted: true, playsinline: true, preload: "auto", "aria-label": "clip" });
    if (name !== "d") media.muted = true;
    const message = el("p", { hidden: true });
    const screen = el("div", { class: "screen" }, media, message);
    const figure = el("figure", { class: `pane ${name}` }, el("figcaption", {}, caption), screen);
    return { figure, caption, media, message, screen };
  }

  listen(video, which) {
    video.addEventListener("seeked", () => { if (!this.playing) this.grab(which, this.frame); });
    video.addEventListener("error", () => { if (video.hasAttribute("src")) this.say(which, said("This clip cannot be played here.")); });
    video.addEventListener("ended", () => { if (which === 0 && this.playing) this.restart(); });
    if ("requestVideoFrameCallback" in video) {
      const each = (now, info) => {
        if (this.playing) {
          this.grab(which, this.frameAt(info.mediaTime));
          if (which === 0) this.follow(this.frameAt(info.mediaTime));
        } else if (!video.seeking) {
          // A busy machine may say "seeked" before the picture is there to be read.
          this.grab(which, this.frame);
        }
        video.requestVideoFrameCallback(each);
      };
      video.requestVideoFrameCallback(each);
    }
  }

  /** `a`, `b`: `{label, arm, clip}`; either clip may be missing. */
  async load(a, b, fps) {
    const load = ++this.loads, was = this.playing;
    this.pause();
    this.fps = fps;
    this.grabbed.forEach((frames) => frames.clear());
    this.clear();
    const shape = a.clip?.shape ?? b.clip?.shape ?? [1, 1, 1];
    this.frames = Math.max(1, Math.min(...[a, b].map((side) => side.clip?.shape?.[0] ?? Infinity), 1e9));
    if (this.frames === 1e9) this.frames = 1;
    this.node.classList.toggle("still", STILL);
    this.stage.style.setProperty("--aspect", shape[2] && shape[1] ? shape[2] / shape[1] : 1);
    this.canvas.width = this.work.width = shape[2] || 1;
    this.canvas.height = this.work.height = shape[1] || 1;
    this.scrubber.max = this.frames - 1;
    const ready = [a, b].map((side, which) => this.source(side, which));
    this.panes[2].caption[0].textContent = "Difference";
    await Promise.all(ready);
    if (load !== this.loads) return;
    await this.seek(Math.min(this.frame, this.frames - 1));
    if (was) this.play();
  }

  source(side, which) {
    const { caption, media } = this.panes[which];
    caption[0].replaceChildren(dot(side.arm), side.label);
    caption[1].textContent = side.note ?? "";
    media.setAttribute("aria-label", `${said("clip")} of ${side.label}`);
    this.say(which, null);
    const video = side.clip?.video;
    if (!video) {
      media.removeAttribute("src");
      media.load();
      this.say(which, said(side.clip ? "No clip was kept." : "This arm has no clip of this prompt."));
      return Promise.resolve();
    }
    media.src = video.inline ? videoUrl(video.inline) : video.href;
    media.playbackRate = this.rate;
    return new Promise((done) => {
      media.addEventListener("loadeddata", done, { once: true });
      media.addEventListener("error", done, { once: true });
    });
  }

  say(which, text) {
    const { message, media } = this.panes[which];
    message.hidden = !text;
    message.textContent = text ?? "";
    media.style.visibility = text ? "hidden" : "";
  }

  frameAt(seconds) {
    return Math.max(0, Math.min(this.frames - 1, Math.floor(seconds * this.fps + 0.02)));
  }

  goTo(frame) {
    this.pause();
    this.seek(Math.max(0, Math.min(this.frames - 1, frame)));
  }

  /** Both clips on `frame`; resolves when both show it. */
  seek(frame) {
    this.follow(frame);
    const time = (frame + 0.5) / this.fps;
    this.grabbed.forEach((frames) => frames.clear());
    return Promise.all(this.playable().map((video) => new Promise((done) => {
      video.addEventListener("seeked", done, { once: true });
      video.currentTime = Math.min(time, video.duration || time);
    })));
  }

  playable() {
    return this.videos.filter((video) => video.hasAttribute("src") && video.readyState > 0 && !video.error);
  }

  follow(frame) {
    this.frame = frame;
    this.scrubber.value = frame;
    this.scrubber.setAttribute("aria-valuetext", `frame ${frame} of 0 to ${this.frames - 1}`);
    this.counter.textContent = `frame ${frame} / ${this.frames - 1}`;
  }

  async play() {
    const playable = this.playable();
    if (!playable.length) return;
    this.playing = true;
    this.playButton.textContent = "Pause";
    if (this.frame >= this.frames - 1) await this.seek(0);
    await Promise.all(playable.map((video) => video.play().catch(() => {})));
    this.tick();
  }

  /** While playing: hold the second clip to the first. */
  tick() {
    if (!this.playing) return;
    const [a, b] = this.playable();
    if (a && b && !b.seeking && Math.abs(b.currentTime - a.currentTime) > 0.5 / this.fps) b.currentTime = a.currentTime;
    if (a && !("requestVideoFrameCallback" in a)) this.follow(this.frameAt(a.currentTime));
    if (a && a.currentTime >= this.frames / this.fps) this.restart();
    requestAnimationFrame(() => this.tick());
  }

  restart() {
    for (const video of this.playable()) {
      video.currentTime = 0;
      video.play().catch(() => {});
    }
  }

  pause() {
    const was = this.playing;
    this.playing = false;
    this.playButton.textContent = "Play";
    this.videos.forEach((video) => video.pause());
    if (was) this.seek(this.frame);
  }

  /** Keep the picture that a clip shows now, and compare it with the other's of the same number. */
  grab(which, frame) {
    const video = this.videos[which], frames = this.grabbed[which];
    if (!video.videoWidth || this.broken) return;
    const pen = this.work.getContext("2d", { willReadFrequently: true });
    pen.drawImage(video, 0, 0, this.work.width, this.work.height);
    try {
      frames.set(frame, pen.getImageData(0, 0, this.work.width, this.work.height));
    } catch {
      // A clip that lies beside the page as a file of its own may be shown, but not read.
      this.panes[2].message.textContent = "The difference needs clips inside this page; these are linked files.";
      this.panes[2].message.hidden = false;
      return;
    }
    if (frames.size > 4) frames.delete(frames.keys().next().value);
    const other = this.grabbed[1 - which].get(frame);
    if (!other) return;
    this.pair = which === 0 ? [frames.get(frame), other] : [other, frames.get(frame)];
    this.pairFrame = frame;
    this.drawDifference();
  }

  drawDifference() {
    if (!this.pair) return;
    const [a, b] = this.pair.map((image) => image.data);
    const pen = this.canvas.getContext("2d"), image = pen.createImageData(this.canvas.width, this.canvas.height), out = image.data;
    let sum = 0;
    for (let i = 0; i < a.length; i += 4) {
      const apart = Math.abs(a[i] - b[i]) + Math.abs(a[i + 1] - b[i + 1]) + Math.abs(a[i + 2] - b[i + 2]);
      sum += apart;
      const k = 3 * Math.min(255, Math.round(apart * this.gain / 3));
      out[i] = HEAT_TABLE[k]; out[i + 1] = HEAT_TABLE[k + 1]; out[i + 2] = HEAT_TABLE[k + 2]; out[i + 3] = 255;
    }
    pen.putImageData(image, 0, 0);
    const mean = sum / (a.length / 4 * 3);
    this.panes[2].message.hidden = true;
    this.panes[2].caption[1].textContent = `${this.gain}×`;
    this.readout.textContent = `${STILL ? "The two pictures" : `Frame ${this.pairFrame}: the two clips`} are ${digits(mean, 2)} of 255 levels apart on average. The map is white from ${Math.round(255 / this.gain)} levels on; it compares ${said("the compressed clips")}, the figures above the originals.`;
    this.node.dataset.apart = mean;
    this.node.dataset.pairFrame = this.pairFrame;
  }

  clear() {
    this.pair = null;
    this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.panes[2].message.hidden = true;
    this.panes[2].caption[1].textContent = "";
    this.readout.textContent = "";
    delete this.node.dataset.apart;
    delete this.node.dataset.pairFrame;
  }

  setWipe(value) {
    this.stage.style.setProperty("--wipe", `${value}%`);
    this.wipe.value = value;
    this.wipe.setAttribute("aria-valuetext", `${Math.round(value)} % of the first clip`);
  }

  drag(event) {
    if (this.stage.dataset.mode !== "wipe") return;
    const box = this.panes[0].screen.getBoundingClientRect();
    this.setWipe(Math.max(0, Math.min(100, (event.clientX - box.left) / box.width * 100)));
  }
}
