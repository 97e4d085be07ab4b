// One answer: its tokens as they arrive, its figures, and how deep its tokens went.

import { DepthTable, depthsOf } from "./depths.js";
import { TokenList } from "./tokens.js";

const REASONS = { stop: "ended by itself", length: "has the most tokens that were asked for" };

export class Pane {
  #figures = {};
  #drawing = 0;
  #sum = 0;
  #started = 0;
  #first = null; // time and number of tokens of the first piece
  #last = null;

  constructor(template, title, model, note) {
    this.element = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    this.title = title;
    this.numLayers = model.num_layers;
    this.ended = null;
    find("h2").textContent = title;
    for (const figure of this.element.querySelectorAll("[data-figure]")) this.#figures[figure.dataset.figure] = figure;
    const box = find(".tokens");
    box.ariaLabel = `Tokens, ${title}`;
    this.list = new TokenList(box, note, depthsOf(model));
    this.depths = new DepthTable(find("tbody"), depthsOf(model));
    this.drafted = find(".drafted");
    this.waiting = find(".waiting");
    this.plain = find("pre");
  }

  /** Takes in the pieces of an answer. What has arrived stays when it breaks off. */
  async receive(pieces) {
    this.#started = performance.now();
    this.say("");
    this.element.ariaBusy = "true";
    try {
      for await (const piece of pieces) this.#take(piece);
    } finally {
      this.element.ariaBusy = "false";
      cancelAnimationFrame(this.#drawing);
      this.#draw();
      this.plain.textContent = this.list.text;
    }
  }

  /** What stands in place of tokens. */
  say(text) {
    this.waiting.textContent = text;
  }

  /** Tokens per second, once they flow: the first piece's wait is another figure. */
  get rate() {
    const later = this.list.tokens.length - (this.#first?.count ?? 0);
    return later > 0 ? (1000 * later) / (this.#last - this.#first.time) : NaN;
  }

  get meanDepth() {
    return this.ended?.meanDepth ?? this.#sum / this.list.tokens.length;
  }

  /** In one sentence, for who does not see it. */
  get summary() {
    const { length } = this.list.tokens;
    if (!length) return `${this.title}: no tokens.`;
    const seconds = ((this.#last - this.#started) / 1000).toFixed(1);
    const depth = `mean depth ${this.meanDepth.toFixed(1)} of ${this.numLayers} layers`;
    const reason = this.ended ? `; it ${REASONS[this.ended.reason] ?? this.ended.reason}` : "";
    return `${this.title}: ${length} ${length === 1 ? "token" : "tokens"} in ${seconds} s, ${depth}${reason}.`;
  }

  #take({ tokens, finish }) {
    for (const token of tokens) {
      this.list.add(token);
      this.depths.count(token.exit_layer);
      this.#sum += token.exit_layer;
      if (token.drafted) this.drafted.hidden = false;
    }
    if (tokens.length) {
      this.#last = performance.now();
      this.#first ??= { time: this.#last, count: this.list.tokens.length };
    }
    if (finish) this.ended = finish;
    this.#drawing ||= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.#drawing = 0;
    this.depths.draw();
    const { tokens, rate, first, depth, acceptance } = this.#figures;
    const { length } = this.list.tokens;
    tokens.textContent = length;
    if (Number.isFinite(this.rate)) rate.textContent = this.rate.toFixed(this.rate < 10 ? 1 : 0);
    if (this.#first) first.textContent = milliseconds(this.#first.time - this.#started);
    if (length) depth.textContent = `${this.meanDepth.toFixed(1)} of ${this.numLayers}`;
    const accepted = this.ended?.acceptance ?? null;
    acceptance.parentElement.hidden = accepted === null;
    if (accepted !== null) acceptance.textContent = `${Math.round(100 * accepted)} %`;
  }
}

function milliseconds(time) {
  return time < 1000 ? `${Math.round(time)} ms` : `${(time / 1000).toFixed(2)} s`;
}
