// Server-sent events from bytes that may be cut anywhere: inside a line end, a field or a character.

export class EventParser {
  #decoder = new TextDecoder();
  #rest = "";
  #data = [];

  /** The data of each event that these bytes complete. */
  push(bytes) {
    this.#rest += this.#decoder.decode(bytes, { stream: true });
    const lines = this.#rest.split(/\r\n|\n|\r(?!$)/); // a \r that comes last may be the half of a \r\n
    this.#rest = lines.pop();
    return lines.flatMap((line) => this.#take(line));
  }

  #take(line) {
    if (line !== "") {
      const [, field, value] = /^([^:]*):? ?(.*)$/su.exec(line);
      if (field === "data") this.#data.push(value);
      return [];
    }
    const data = this.#data;
    this.#data = [];
    return data.length ? [data.join("\n")] : [];
  }
}

/** The data of each event of a response's body, as it arrives. Whoever stops listening cancels the response. */
export async function* readEvents(body) {
  const parser = new EventParser();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    reader.cancel().catch(() => {}); // it has failed, and the reader of this has been told
  }
}
