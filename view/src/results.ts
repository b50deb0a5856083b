// Rows of a table out of results.json of `python -m rlkit.evaluate`.
import type { Results } from "./api";

export interface Row {
  of: string;
  metric: string;
  value: number | null;
  low: number | null;
  high: number | null;
  count: number | null;
  words: string;
}

type Tree = Record<string, unknown>;
const tree = (value: unknown): value is Tree => typeof value === "object" && value !== null && !Array.isArray(value);
const numeric = (value: unknown): number | null => (typeof value === "number" ? value : null);

/** A measured number is a mapping with `value`; the names on the way to it say of what it is. */
export function rows(results: Results): Row[] {
  const found: Row[] = [];
  const walk = (node: unknown, path: string[]) => {
    if (Array.isArray(node)) node.forEach((item, i) => walk(item, [...path, label(item, i)]));
    if (!tree(node)) return;
    if (typeof node.value === "number" || (node.value === null && "low" in node)) found.push(row(node, path));
    else for (const [key, item] of Object.entries(node)) if (!SETTINGS.has(key)) walk(item, [...path, key]);
  };
  walk(results, []);
  return found;
}

const SETTINGS = new Set(["config", "settings", "versions", "data", "schema", "schema_version"]);

function label(item: unknown, i: number): string {
  const named = tree(item) ? (item.name ?? item.checkpoint ?? item.set ?? item.metric) : undefined;
  return named === undefined ? String(i + 1) : String(named);
}

function row(node: Tree, path: string[]): Row {
  return {
    of: path.slice(0, -1).join(" › "),
    metric: String(node.metric ?? path.at(-1) ?? ""),
    value: numeric(node.value),
    low: numeric(node.low),
    high: numeric(node.high),
    count: numeric(node.questions ?? node.n ?? node.count),
    words: String(node.words ?? node.comparison ?? ""),
  };
}

export function settings(results: Results): Tree {
  return Object.fromEntries(Object.entries(results).filter(([key, value]) => SETTINGS.has(key) || !tree(value)));
}
