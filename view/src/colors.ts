// Colours that people with any colour vision can tell apart; every chart also says its values in words.

/** Of the i-th run, or part of a sum: style.css has them for both themes. */
export const lineColor = (i: number) => `var(--line-${i % 8})`;
const DASHES = [[], [8, 3], [2, 3], [8, 3, 2, 3]];
/** A run is told by its dashes, too. */
export const dashes = (i: number) => DASHES[i % DASHES.length];

type Rgb = readonly [number, number, number];
// Blue to orange through nothing, and nothing to purple: over the page, whatever its theme.
const NEGATIVE: Rgb = [38, 112, 201];
const POSITIVE: Rgb = [224, 114, 20];
const SEQUENTIAL: Rgb = [141, 75, 195];

/** The colour of a value that stands at `share` (0 to 1) of its range; text stays readable on one that is not `full`. */
export function shade(share: number, signed: boolean, full = false): string {
  const strength = (signed ? Math.abs(share - 0.5) * 2 : share) * (full ? 1 : 0.62);
  const color = signed ? (share < 0.5 ? NEGATIVE : POSITIVE) : SEQUENTIAL;
  return `rgb(${color.join(" ")} / ${strength.toFixed(3)})`;
}

/** What `var(--name)` is on this page now: canvases need a plain colour. */
export function resolved(color: string): string {
  const probe = document.createElement("span");
  probe.style.color = color;
  document.body.append(probe);
  const plain = getComputedStyle(probe).color;
  probe.remove();
  return plain;
}
