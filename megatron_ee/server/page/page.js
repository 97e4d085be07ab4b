// The page: a form, a run, one pane for its answer or two that are compared.

import { ServerError, describeModel, streamAnswer } from "./api.js";
import { compare, verdict } from "./compare.js";
import { drawLadder } from "./depths.js";
import { Pane } from "./pane.js";
import { offer, requestOf, show, titleOf } from "./settings.js";
import { Note } from "./tokens.js";

const named = (id) => document.getElementById(id);

class Page {
  #form = named("request");
  #key = named("key"); // read from the field for each request, and kept nowhere else
  #note = new Note(named("note"));
  #model = null;
  #running = null;

  constructor() {
    this.#form.addEventListener("input", () => show(this.#form));
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    named("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#form.requestSubmit();
    });
    named("stop").addEventListener("click", () => this.#running?.abort());
    this.#key.addEventListener("change", () => this.connect());
    this.#chooseTheme();
  }

  /** Asks the server for its model, and offers what it allows. */
  async connect() {
    this.#clearError();
    try {
      const model = await describeModel(this.#key.value.trim());
      if (JSON.stringify(model) !== JSON.stringify(this.#model)) this.#present(model); // else the form stays as it is
    } catch (error) {
      if (!this.#model) named("facts").textContent = "The server's model is not known yet; Run asks again.";
      this.#report(error);
      return false;
    }
    return true;
  }

  async run() {
    if (this.#running) return;
    this.#running = new AbortController();
    this.#switch(true);
    try {
      if (this.#model || (await this.connect())) await this.#receive(this.#preparePanes(), this.#running.signal);
    } finally {
      this.#running = null;
      this.#switch(false);
    }
  }

  async #receive(panes, signal) {
    named("status").textContent = "Running …";
    let problem = null;
    try {
      for (const { pane, request } of panes) {
        await pane.receive(streamAnswer(request, this.#key.value.trim(), signal));
      }
    } catch (error) {
      problem = error;
    }
    const preface = problem === null ? "" : signal.aborted ? "Stopped. " : "Not complete. ";
    this.#conclude(panes.map(({ pane }) => pane), preface);
    if (problem !== null && !signal.aborted) this.#report(problem);
  }

  #present(model) {
    const { id, num_layers: layers, exits, max_model_len: room } = model;
    named("model").textContent = document.title = id;
    const places = exits.length ? `exits after ${exits.join(", ")}` : "no exits";
    named("facts").textContent = [`${layers} layers`, places, ...(room ? [`room for ${room} tokens`] : [])].join(" · ");
    drawLadder(named("ladder"), model);
    offer(this.#form, model);
    this.#model = model;
  }

  #preparePanes() {
    this.#clearError();
    this.#note.close();
    named("status").textContent = "";
    named("verdict").hidden = true;
    const { seed, temperature, compare: compared } = this.#form.elements;
    if (compared.checked && Number(temperature.value) > 0 && seed.value === "") {
      seed.value = Math.floor(Math.random() * 2 ** 31); // the two would differ by their random numbers
    }
    const request = requestOf(this.#form, this.#model);
    const asked = [[titleOf(this.#form), request]];
    // One after the other, for together they would slow each other.
    const full = { ...request, body: { ...request.body, early_exit: { mode: "full" } } };
    if (compared.checked) asked.push(["Full depth, for comparison", full]);
    const panes = asked.map(([title, request]) => {
      const pane = new Pane(named("pane"), title, this.#model, this.#note);
      return { pane, request };
    });
    for (const { pane } of panes.slice(1)) pane.say("Waits until the first has ended.");
    named("panes").replaceChildren(...panes.map(({ pane }) => pane.element));
    return panes;
  }

  #conclude(panes, preface) {
    const spoken = panes.filter((pane) => pane.list.tokens.length || pane.ended);
    named("status").textContent = preface + spoken.map((pane) => pane.summary).join(" ");
    for (const pane of panes) pane.say(pane.list.tokens.length ? "" : "No tokens.");
    if (panes.length < 2 || !panes.every((pane) => pane.ended)) return;
    const [answer, reference] = panes;
    const comparison = compare(answer.list.tokens, reference.list.tokens);
    if (comparison.differs !== null) for (const pane of panes) pane.list.mark(comparison.differs);
    named("verdict").textContent = verdict(comparison, answer.rate / reference.rate);
    named("verdict").hidden = false;
  }

  /** Run and Stop change places; whoever pressed one has the focus on the other. */
  #switch(running) {
    const [gone, there] = running ? [named("run"), named("stop")] : [named("stop"), named("run")];
    const focused = document.activeElement === gone;
    gone.disabled = true;
    there.disabled = false;
    if (focused) there.focus();
  }

  #report(error) {
    const known = error instanceof ServerError;
    const again = known && error.retryAfter !== null ? ` Try again in ${error.retryAfter} s.` : "";
    const title = document.createElement("strong");
    title.textContent = known ? error.title : "The page failed";
    named("error").replaceChildren(title, ` ${error.message}${again}`);
    if (!known) console.error(error);
    if (error.status === 401) {
      named("key-field").hidden = false;
      this.#key.setAttribute("aria-invalid", "true");
    }
  }

  #clearError() {
    named("error").replaceChildren();
    this.#key.removeAttribute("aria-invalid");
  }

  #chooseTheme() {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const button = named("theme");
    const chosen = document.documentElement.dataset;
    const show = () => {
      button.ariaPressed = (chosen.theme ?? (dark.matches ? "dark" : "light")) === "dark";
    };
    dark.addEventListener("change", show);
    button.addEventListener("click", () => {
      chosen.theme = button.ariaPressed === "true" ? "light" : "dark";
      show();
    });
    show();
  }
}

await new Page().connect();
