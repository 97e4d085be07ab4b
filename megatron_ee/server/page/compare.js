// Two answers to one prompt, side by side.

/** How many tokens are the same from the first on, of how many, and the place of the first that differs, or null. */
export function compare(answer, reference) {
  const longest = Math.max(answer.length, reference.length);
  let same = 0;
  while (same < longest && answer[same]?.text === reference[same]?.text) same += 1;
  return { same, longest, differs: same < longest ? same : null };
}

/** The comparison in a sentence or two; `speed` is the ratio of the two rates of tokens, where both are known. */
export function verdict({ same, longest, differs }, speed) {
  const agreement = longest ? Math.floor((100 * same) / longest) : 100;
  const sentences = [
    differs === null
      ? `All ${longest} tokens are the same (agreement 100 %).`
      : `The first ${same} of ${longest} tokens are the same (agreement ${agreement} %); ` +
        `token ${same + 1}, marked, is the first to differ.`,
  ];
  if (Number.isFinite(speed)) sentences.push(`${speed.toFixed(2)} times the tokens per second of full depth.`);
  return sentences.join(" ");
}
