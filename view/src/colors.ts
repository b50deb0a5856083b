// Colours that people with any colour vision can tell apart; every chart also says its values in words.

/** Lines of several runs, parts of a sum: style.css has them for both themes. */
export const LINES = Array.from({ length: 8 }, (_, i) => `var(--line-${i})`);
/** A run is told by its dashes, too. */
export const DASHES = [[], [8, 3], [2, 3], [8, 3, 2, 3]];

type Rgb = readonly [number, number, number];
// Blue to orange through nothing, and nothing to purple: over the page, so that text stays readable in both themes.
const NEGATIVE: Rgb = [38, 112, 201];
const POSITIVE: Rgb = [224, 114, 20];
const SEQUENTIAL: Rgb = [141, 75, 195];
const STRONGEST = 0.62;

/** Background of a token whose value stands at `share` (0 to 1) of its range. */
export function shade(share: number, signed: boolean): string {
  const strength = signed ? Math.abs(share - 0.5) * 2 : share;
  const [r, g, b] = signed ? (share < 0.5 ? NEGATIVE : POSITIVE) : SEQUENTIAL;
  return `rgb(${r} ${g} ${b} / ${(strength * STRONGEST).toFixed(3)})`;
}

// Stops of viridis, reversed on light pages so that "many" is always far from the page's colour.
const VIRIDIS: Rgb[] = [
  [68, 1, 84],
  [59, 82, 139],
  [33, 145, 140],
  [94, 201, 98],
  [253, 231, 37],
];

export function heat(share: number, dark: boolean): string {
  const at = (dark ? share : 1 - share) * (VIRIDIS.length - 1);
  const low = Math.min(VIRIDIS.length - 2, Math.floor(at));
  const mix = VIRIDIS[low].map((from, i) => Math.round(from + (VIRIDIS[low + 1][i] - from) * (at - low)));
  return `rgb(${mix.join(" ")})`;
}

/** A canvas of this size in the pixels of the page, ready to be drawn on. */
export function pen(canvas: HTMLCanvasElement, width: number, height: number): CanvasRenderingContext2D {
  const scale = devicePixelRatio || 1;
  [canvas.width, canvas.height] = [width * scale, height * scale];
  const context = canvas.getContext("2d")!;
  context.scale(scale, scale);
  return context;
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
