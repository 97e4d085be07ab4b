// The form: what may be asked of this server, and the request that it stands for.

const MODES = {
  early_exit: "Early exit",
  speculative: "Self-speculation",
  full: "Full depth",
  sled: "SLED",
  dola: "DoLa",
};
const POLICIES = ["recompute", "fill", "propagate"];
const WITH_EXITS = ["early_exit", "speculative"]; // modes that min_exit and kv_policy mean something to

/** Offers what the server's bounds allow, beginning with its own settings. */
export function offer(form, model) {
  const { bounds, defaults, sampling } = model;
  const { mode, threshold, min_exit, kv_policy, temperature, max_tokens } = form.elements;
  const later = model.exits.filter((layer) => layer > bounds.min_exit);
  choose(mode, [...(bounds.modes ?? Object.keys(MODES)), "full"], defaults.mode, (name) => MODES[name]);
  choose(kv_policy, bounds.kv_policies ?? POLICIES, defaults.kv_policy, String);
  choose(min_exit, [bounds.min_exit, ...later], defaults.min_exit, (layer) => (layer ? `layer ${layer}` : "any"));
  // On the slider's grid, which has to meet 1.00; rounded up, for what lies below the bound is refused.
  threshold.min = (Math.ceil(bounds.threshold * 100 - 1e-9) / 100).toFixed(2);
  threshold.value = defaults.threshold;
  Object.assign(threshold.dataset, { own: threshold.value, exact: defaults.threshold });
  const apart = Object.entries(defaults.thresholds).map(([layer, value]) => `layer ${layer} at ${value}`);
  form.querySelector("#threshold-hint").textContent =
    "1.00 = full depth" + (apart.length ? `; until it is moved, ${apart.join(", ")}` : "");
  temperature.value = sampling.temperature;
  max_tokens.max = bounds.new_tokens;
  max_tokens.value = Math.min(sampling.max_new_tokens, bounds.new_tokens);
  form.querySelector("#kind-field").hidden = !model.has_chat_template;
  form.elements.kind.value = model.has_chat_template ? "chat" : "completion";
  show(form);
}

/** Shows the threshold's number, and disables what the chosen mode has no use for. */
export function show(form) {
  const { mode, threshold, min_exit, kv_policy } = form.elements;
  const value = thresholdOf(threshold);
  form.querySelector("#threshold-value").textContent = value;
  threshold.setAttribute("aria-valuetext", value === "1.00" ? "1.00, full depth" : value);
  threshold.disabled = mode.value !== "early_exit";
  min_exit.disabled = kv_policy.disabled = !WITH_EXITS.includes(mode.value);
}

/** The request that the form stands for. Of exits it names only what differs from the server's own settings. */
export function requestOf(form, model) {
  const { prompt, kind, temperature, max_tokens, seed } = form.elements;
  const chat = kind.value === "chat";
  const body = {
    model: model.id,
    ...(chat ? { messages: [{ role: "user", content: prompt.value }] } : { prompt: prompt.value }),
    max_tokens: Number(max_tokens.value),
    temperature: Number(temperature.value),
    ...(seed.value !== "" && { seed: Number(seed.value) }),
    early_exit: exitOf(form.elements, model),
  };
  return { path: chat ? "v1/chat/completions" : "v1/completions", body };
}

/** What an answer of this request is called. */
export function titleOf(form) {
  const { mode, threshold } = form.elements;
  const name = mode.selectedOptions[0].textContent;
  return threshold.disabled ? name : `${name}, threshold ${thresholdOf(threshold)}`;
}

// The server's own may lie between two steps of the slider.
function thresholdOf({ value, dataset }) {
  const fixed = Number(value).toFixed(2);
  return value !== dataset.own || Number(fixed) === Number(dataset.exact) ? fixed : dataset.exact;
}

function exitOf({ mode, threshold, min_exit, kv_policy }, { defaults }) {
  const asked = {};
  if (mode.value !== defaults.mode) asked.mode = mode.value;
  if (!threshold.disabled && threshold.value !== threshold.dataset.own) asked.threshold = Number(threshold.value);
  if (!min_exit.disabled && Number(min_exit.value) !== defaults.min_exit) asked.min_exit = Number(min_exit.value);
  if (!kv_policy.disabled && kv_policy.value !== defaults.kv_policy) asked.kv_policy = kv_policy.value;
  return asked;
}

function choose(select, values, chosen, name) {
  const options = [...new Set([...values, chosen])].map((value) => new Option(name(value), value));
  select.replaceChildren(...options);
  select.value = chosen;
}
