// What the page asks the server, and what comes back: facts of the model, tokens, or an error with the server's words.

import { readEvents } from "./sse.js";

/** What went wrong, for people. `status` is 0 where no answer came, or the answer broke off. */
export class ServerError extends Error {
  constructor(message, { title = "The server cannot be reached", status = 0, retryAfter = null } = {}) {
    super(message);
    this.title = title;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The first model that is served: its id and what the field early_exit tells of it. */
export async function describeModel(key) {
  const response = await send("v1/models", key, {});
  const body = await response.json().catch(() => null);
  const model = body?.data?.[0];
  if (!model?.early_exit) {
    throw new ServerError("Its list of models says nothing of early exits.", { title: "Not this server" });
  }
  return { id: model.id, ...model.early_exit };
}

/** Pieces of one answer as they arrive: `{tokens, finish}`; finish is null until the last one. */
export async function* streamAnswer({ path, body }, key, signal) {
  const headers = { "Content-Type": "application/json" };
  const sent = JSON.stringify({ ...body, stream: true });
  const response = await send(path, key, { method: "POST", headers, body: sent, signal });
  for await (const data of received(response.body, signal)) {
    if (data === "[DONE]") return;
    const piece = pieceOf(data);
    if (piece) yield piece;
  }
  throw brokeOff("The server closed the connection before the answer was complete.");
}

async function send(path, key, options) {
  if (/[^\x21-\x7e]/u.test(key)) {
    throw new ServerError("It has characters that no key has.", { title: "API key", status: 401 });
  }
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError("There is no connection to it, or it is not running.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const error = (await response.json().catch(() => null))?.error;
  const seconds = Number.parseInt(response.headers.get("Retry-After"), 10);
  const titles = { 401: "API key", 429: "Too much at once", 503: "Not now" };
  return new ServerError(String(error?.message ?? `It answered ${response.status} ${response.statusText}`.trim()), {
    title: titles[response.status] ?? (response.status < 500 ? "The server refused this request" : "The server failed"),
    status: response.status,
    retryAfter: Number.isNaN(seconds) ? null : seconds,
  });
}

async function* received(body, signal) {
  try {
    yield* readEvents(body);
  } catch (error) {
    if (signal.aborted) throw error;
    throw brokeOff("The connection was lost before the answer was complete.");
  }
}

function brokeOff(message) {
  return new ServerError(message, { title: "The answer broke off" });
}

function pieceOf(data) {
  let message;
  try {
    message = JSON.parse(data);
  } catch {
    throw brokeOff("The server sent what is not JSON.");
  }
  if (message.error) throw brokeOff(String(message.error.message));
  const choice = message.choices?.[0];
  if (!choice) return null; // a chunk that tells the usage alone
  const { tokens = [], mean_depth: meanDepth = null, acceptance = null } = choice.early_exit ?? {};
  return { tokens, finish: choice.finish_reason && { reason: choice.finish_reason, meanDepth, acceptance } };
}
