// Colours that people with any colour vision can tell apart; every chart also says its values in words.

/** Of the i-th run, or part of a sum: style.css has them for both themes. */
export const lineColor = (i: number) => `var(--line-${i % 8})`;
const DASHES = [[], [8, 3], [2, 3], [8, 3, 2, 3]];
/** A run is told by its dashes, too. */
export const dashes = (i: number) => DASHES[i % DASHES.length];

type Rgb = readonly [number, number, number];
// Blue to orange through nothing, and nothing to purple: over the page, so that text stays readable in both themes.
const NEGATIVE: Rgb = [38, 112, 201];
const POSITIVE: Rgb = [224, 114, 20];
const SEQUENTIAL: Rgb = [141, 75, 195];
const STRONGEST = 0.62;

/** Background of a token whose value stands at `share` (0 to 1) of its range. */
export function shade(share: number, signed: boolean): string {
  const strength = signed ? Math.abs(share - 0.5) * 2 : share;
  const color = signed ? (share < 0.5 ? NEGATIVE : POSITIVE) : SEQUENTIAL;
  return `rgb(${color.join(" ")} / ${(strength * STRONGEST).toFixed(3)})`;
}

// Stops of viridis, reversed on light pages so that "many" is always far from the page's colour.
const VIRIDIS: Rgb[] = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

export function heat(share: number, dark: boolean): string {
  const at = (dark ? share : 1 - share) * (VIRIDIS.length - 1);
  const low = Math.min(VIRIDIS.length - 2, Math.floor(at));
  const mix = VIRIDIS[low].map((from, i) => Math.round(from + (VIRIDIS[low + 1][i] - from) * (at - low)));
  return `rgb(${mix.join(" ")})`;
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
