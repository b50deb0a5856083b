// Computations behind the charts.
import type { Values } from "./api";

/** Exponential moving average that starts unbiased and leaves gaps where there is nothing. */
export function smooth(values: Values, keep: number): Values {
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

export function extent(values: Iterable<number | null | undefined>): [number, number] | null {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) if (Number.isFinite(value)) [low, high] = [Math.min(low, value!), Math.max(high, value!)];
  return low <= high ? [low, high] : null;
}

export function mean(values: Values): number | null {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}

/** Merges neighbours so that at most `most` columns are left; each is the mean of what is known. */
export function merged(values: Values, most: number): Values {
  const size = Math.ceil(values.length / most);
  if (size <= 1) return values;
  return Array.from({ length: Math.ceil(values.length / size) }, (_, i) => mean(values.slice(i * size, (i + 1) * size)));
}

export function areas(names: string[], pattern: string): { area: string; names: string[] }[] {
  const test = new RegExp(pattern, "i");
  const groups = new Map<string, string[]>();
  for (const name of names.filter((name) => test.test(name))) {
    const area = name.includes("/") ? name.slice(0, name.indexOf("/")) : "run";
    groups.set(area, [...(groups.get(area) ?? []), name]);
  }
  return [...groups].map(([area, names]) => ({ area, names }));
}

export function clamp(value: number, low: number, high: number): number {
  return Math.max(low, Math.min(high, value));
}

/** Ends of a signal's range; signed ones reach equally far to both sides of 0. */
export function ends(range: { low: number | null; high: number | null; signed: boolean }): [number, number] {
  const [low, high] = [range.low ?? 0, range.high ?? 0];
  const reach = Math.max(Math.abs(low), Math.abs(high)) || 1;
  return range.signed ? [-reach, reach] : [low, high];
}

/** Where a value stands between the ends of its range, 0 to 1; nothing of a range without a width. */
export function place(value: number, [low, high]: [number, number]): number {
  return high > low ? clamp((value - low) / (high - low), 0, 1) : 0;
}

export interface Interval {
  low: number;
  high: number;
}

/** `in-reward=0.2..0.4` in the address is a condition that the server understands. */
export function conditions(intervals: Record<string, Interval | null>): string {
  const parts = Object.entries(intervals).flatMap(([key, interval]) =>
    interval ? [`${key} >= ${interval.low}`, `${key} < ${interval.high}`] : [],
  );
  return parts.join(" and ");
}

export function interval(text: string | null): Interval | null {
  const [low, high] = (text ?? "").split("..").map(Number);
  return text && Number.isFinite(low) && Number.isFinite(high) ? { low, high } : null;
}

/** The regular expression that matches these names and no others. */
export function exactly(names: string[]): string {
  return names.map((name) => `^${name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}$`).join("|");
}

/** Rewards of spans: each stands at the last token of its span, so a span begins after the one before it. Null where
 * nearly every token has a value of its own. */
export function spans(values: Values, from: number): { start: number; end: number; value: number }[] | null {
  const found: { start: number; end: number; value: number }[] = [];
  let start = 0;
  values.forEach((value, i) => {
    if (value === null || value === 0) return;
    found.push({ start: from + start, end: from + i, value });
    start = i + 1;
  });
  return found.length > values.length / 2 || found.length > 200 ? null : found;
}

/** Bins are half open but the last, whose upper edge is one of its values. */
export function bin(edges: number[], i: number): Interval {
  const last = i === edges.length - 2;
  return { low: edges[i], high: edges[i + 1] + (last ? (edges[i + 1] - edges[0]) * 1e-9 : 0) };
}
