// The tokens of an answer, one element each, and the note on the one that is pointed at or has the focus.
// What a model wrote is only ever set as text.

import { paint } from "./depths.js";

const STEPS = { ArrowLeft: -1, ArrowRight: 1 };
const LINES = { ArrowUp: -1, ArrowDown: 1 };

/** One note for the whole page. It stays while the pointer is over it, and Escape closes it. */
export class Note {
  #element;
  #subject = null;
  #closing = 0;

  constructor(element) {
    this.#element = element;
    element.addEventListener("pointerenter", () => clearTimeout(this.#closing));
    element.addEventListener("pointerleave", () => this.close());
    document.addEventListener("keydown", ({ key }) => key === "Escape" && this.close());
    document.addEventListener("scroll", () => this.#place(), { passive: true });
  }

  show(subject, lines) {
    this.close();
    this.#subject = subject;
    const paragraphs = lines.map((line) => Object.assign(document.createElement("p"), { textContent: line }));
    this.#element.replaceChildren(...paragraphs);
    this.#element.hidden = false;
    subject.setAttribute("aria-describedby", this.#element.id);
    this.#place();
  }

  /** Closes it unless the pointer reaches it in time. */
  closeSoon() {
    clearTimeout(this.#closing);
    this.#closing = setTimeout(() => this.close(), 150);
  }

  close() {
    clearTimeout(this.#closing);
    this.#subject?.removeAttribute("aria-describedby");
    this.#subject = null;
    this.#element.hidden = true;
  }

  #place() {
    if (!this.#subject) return;
    const { left, bottom, top } = this.#subject.getClientRects()[0] ?? this.#subject.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.#element;
    const fits = bottom + height + 8 < document.documentElement.clientHeight;
    const most = document.documentElement.clientWidth - width - 8;
    this.#element.style.setProperty("left", `${Math.max(8, Math.min(left, most))}px`);
    this.#element.style.setProperty("top", `${fits ? bottom + 4 : Math.max(4, top - height - 4)}px`);
  }
}

/** A list box of tokens: Tab reaches one of them, the arrow keys, Home and End the others. */
export class TokenList {
  #element;
  #note;
  #depths;
  #tokens = [];
  #current = null;

  constructor(element, note, depths) {
    this.#element = element;
    this.#note = note;
    this.#depths = depths;
    element.addEventListener("focusin", ({ target }) => this.#focused(target));
    element.addEventListener("focusout", () => note.close());
    element.addEventListener("pointerover", ({ target }) => this.#describe(target));
    element.addEventListener("pointerout", () => note.closeSoon());
    element.addEventListener("keydown", (event) => this.#move(event));
  }

  get tokens() {
    return this.#tokens;
  }

  get text() {
    return this.#tokens.map(({ text }) => text).join("");
  }

  add(token) {
    const span = document.createElement("span");
    span.textContent = token.text;
    span.className = "token";
    span.role = "option";
    span.ariaSelected = "false";
    span.tabIndex = this.#tokens.length ? -1 : 0;
    span.dataset.index = this.#tokens.length;
    span.classList.toggle("unseen", /^[\p{C}]*$/u.test(token.text)); // a line's end, or a part of a character
    if (token.text.trim() === "") span.ariaLabel = token.text === "" ? "no text" : quoted(token.text);
    span.classList.toggle("drafted", Boolean(token.drafted));
    paint(span, token.exit_layer, this.#depths);
    this.#tokens.push(token);
    this.#element.append(span);
    this.#current ??= span;
  }

  /** Marks the first token that differs from another answer's, if this one has it. */
  mark(index) {
    const span = this.#element.children[index];
    if (!span) return;
    span.classList.add("differs");
    this.#tokens[index] = { ...this.#tokens[index], differs: true };
  }

  #focused(span) {
    this.#current.tabIndex = -1;
    this.#current.ariaSelected = "false";
    this.#current = span;
    span.tabIndex = 0;
    span.ariaSelected = "true";
    this.#describe(span);
  }

  #describe(span) {
    const token = this.#tokens[span.dataset.index];
    if (token) this.#note.show(span, this.#lines(token, Number(span.dataset.index)));
  }

  #lines({ text, exit_layer: layer, confidence, drafted, differs }, index) {
    const all = this.#depths.at(-1);
    return [
      `Token ${index + 1}: ${text === "" ? "no text of its own" : quoted(text)}`,
      layer === all ? `Ran all ${all} layers` : `Left at layer ${layer} of ${all}`,
      Number.isFinite(confidence) ? `Confidence ${confidence.toFixed(3)}` : "Confidence not measured",
      drafted ? "Drafted by an exit, accepted by full depth" : "Not drafted",
      ...(differs ? ["The first that differs from the other answer"] : []),
    ];
  }

  #move(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || !this.#current) return;
    const spans = [...this.#element.children];
    const index = spans.indexOf(this.#current);
    let next;
    if (event.key in STEPS) next = spans[index + STEPS[event.key]];
    else if (event.key in LINES) next = onLine(spans, index, LINES[event.key]);
    else if (event.key === "Home") next = spans[0];
    else if (event.key === "End") next = spans.at(-1);
    else return;
    event.preventDefault();
    next?.focus();
  }
}

/** The token of the line above (-1) or below (1) that is nearest. */
function onLine(spans, index, step) {
  const from = spans[index].getClientRects()[0];
  let line = null;
  let nearest = null;
  for (let other = index + step; other in spans; other += step) {
    const place = spans[other].getClientRects()[0];
    if (!place || Math.abs(place.top - (line ?? from.top)) < from.height / 2) {
      if (line === null || !place) continue;
    } else if (line !== null) break;
    line ??= place.top;
    const distance = Math.abs(place.left - from.left);
    if (!nearest || distance < nearest.distance) nearest = { span: spans[other], distance };
  }
  return nearest?.span;
}

/** In quotes, with what cannot be seen written out. */
function quoted(text) {
  return JSON.stringify(text).replace(/\p{C}/gu, (sign) => `\\u{${sign.codePointAt(0).toString(16)}}`);
}
