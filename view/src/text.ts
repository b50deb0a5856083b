// Numbers and texts as people read them.

export const NONE = "–"; // no number here, unlike 0

export function number(value: number | null | undefined, digits = 3): string {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE;
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return minus(value.toExponential(digits - 1).replace("e+", "e"));
  if (Number.isInteger(value) && size < 1e6) return minus(value.toLocaleString("en-US"));
  const after = Math.max(0, Math.min(4, digits - Math.floor(Math.log10(size)) - 1));
  return minus(value.toLocaleString("en-US", { maximumFractionDigits: after }));
}

function minus(text: string): string {
  return text.replaceAll("-", "−");
}

export function signed(value: number | null | undefined, digits = 3): string {
  return (value ?? 0) > 0 ? "+" + number(value, digits) : number(value, digits);
}

/** A value in its unit; a share is per cent, a difference of shares is points. */
export function measured(value: number | null | undefined, unit: string, plus = false): string {
  if (value === null || value === undefined) return NONE;
  const text = plus ? signed : number;
  if (unit === "share") return text(value * 100) + " %";
  if (unit === "points") return text(value * 100) + " points";
  return text(value) + (unit ? " " + unit : "");
}

/** What a bin holds: of whole numbers that have one each, the number. */
export function binned(edges: number[], i: number): string {
  const [low, high] = [edges[i], edges[i + 1]];
  return high - low === 1 && low % 1 !== 0 ? number(low + 0.5) : `${number(low)} to ${number(high)}`;
}

export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 60) return number(seconds, 2) + " s";
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function bytes(size: number): string {
  const power = Math.min(4, Math.floor(Math.log2(Math.max(size, 1)) / 10));
  return number(size / 1024 ** power) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][power];
}

export function moment(unix: number | null | undefined): string {
  return unix ? new Date(unix * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }) : NONE;
}

export function text(value: unknown): string {
  return typeof value === "string" ? value : value === undefined ? "" : JSON.stringify(value, null, 2);
}

// Control characters but tab and line feed, marks of direction, invisible joiners, and halves of surrogate pairs.
const HIDDEN =
  // eslint-disable-next-line no-control-regex
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

export interface Piece {
  text: string;
  escape: boolean;
}

/** Splits a text so that what could not be seen is shown as an escape. */
export function pieces(source: string): Piece[] {
  const parts: Piece[] = [];
  let from = 0;
  for (const match of source.matchAll(HIDDEN)) {
    if (match.index > from) parts.push({ text: source.slice(from, match.index), escape: false });
    parts.push({ text: "\\u" + match[0].charCodeAt(0).toString(16).padStart(4, "0"), escape: true });
    from = match.index + 1;
  }
  if (from < source.length) parts.push({ text: source.slice(from), escape: false });
  return parts;
}

export function plain(source: string): string {
  return pieces(source)
    .map((piece) => piece.text)
    .join("");
}
