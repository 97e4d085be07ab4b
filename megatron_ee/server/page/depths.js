// How deep tokens went: a colour for each depth, a table of counts that is the legend too, and the model as a ladder.

/** The layers that a token can leave at, ascending; the last is full depth. */
export function depthsOf({ exits, num_layers: numLayers }) {
  return [...new Set([...exits, numLayers])].sort((one, other) => one - other);
}

/** Gives an element the colour of a depth, which the style sheet makes of --depth: 0 the first exit, 1 full depth. */
export function paint(element, layer, depths) {
  const rank = depths.findIndex((depth) => depth >= layer);
  element.style.setProperty("--depth", rank < 0 || depths.length === 1 ? 1 : rank / (depths.length - 1));
  element.classList.add("painted");
}

/** Draws the model as a row of layers, those with an exit in their colour. */
export function drawLadder(list, model) {
  const depths = depthsOf(model);
  const layers = Array.from({ length: model.num_layers }, (_, index) => {
    const item = document.createElement("li");
    if (depths.includes(index + 1)) {
      paint(item, index + 1, depths);
      if (depths.length <= 12) item.textContent = index + 1;
    }
    return item;
  });
  list.replaceChildren(...layers);
}

/** A row for each depth with its colour, its share of the tokens as a bar and in words, and their number. */
export class DepthTable {
  #rows = new Map();
  #counts = new Map();
  #total = 0;

  constructor(body, depths) {
    for (const layer of depths) {
      const row = body.insertRow();
      const head = document.createElement("th");
      head.scope = "row";
      const [swatch, bar] = ["swatch", "bar"].map((name) => {
        const span = Object.assign(document.createElement("span"), { className: name });
        paint(span, layer, depths);
        return span;
      });
      head.append(swatch, layer === depths.at(-1) ? `${layer}, all` : layer);
      row.append(head);
      row.insertCell().append(bar);
      this.#rows.set(layer, { bar, percent: row.insertCell(), count: row.insertCell() });
      this.#counts.set(layer, 0);
    }
    this.draw();
  }

  count(layer) {
    this.#counts.set(layer, (this.#counts.get(layer) ?? 0) + 1);
    this.#total += 1;
  }

  draw() {
    for (const [layer, { bar, percent, count }] of this.#rows) {
      const share = this.#total ? this.#counts.get(layer) / this.#total : 0;
      bar.style.setProperty("--share", share);
      percent.textContent = `${Math.round(100 * share)} %`;
      count.textContent = this.#counts.get(layer);
    }
  }
}
