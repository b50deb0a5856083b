// Which columns a list of samples has, and how their values read.
import type { Run, Summary } from "./api";
import { extent, place } from "./numbers";
import { valueOf } from "./source";
import { number } from "./text";

export interface Column {
  key: string;
  title: string;
  note: string;
  width: string;
  number: boolean;
  sortable: boolean;
  /** ends of a bar behind the number */
  range?: [number, number] | null;
}

const column = (key: string, title: string, note: string, width = "80px", kind = "number"): Column => ({
  key,
  title,
  note,
  width,
  number: kind === "number",
  sortable: kind === "number",
});

function all(run: Run | undefined, rows: Summary[]): Column[] {
  const has = run?.has;
  const some = (key: keyof Summary) => rows.some((row) => row[key] !== null && row[key] !== undefined);
  const components = has?.components ?? [];
  const columns = [
    column("step", "step", "training step that used it, or the checkpoint's step", "52px"),
    column("prompt_id", "prompt", "which prompt of the data", "76px", "text"),
    column("sample", "#", "place in its group", "36px"),
    column("reward", "reward", "what the algorithm learnt from", "80px"),
    ...components.map((name) => column("component:" + name, name, `component ${name} of the reward`, "72px")),
    ...(has?.rescored ?? []).map((name) => column("rescored:" + name, name + " (later)", `reward by ${name}, asked afterwards`, "96px")),
    column("advantage", "advantage", "mean over the trained tokens", "92px"),
    column("length", "length", "tokens of the response", "68px"),
    ...(has?.correct ? [column("correct", "correct", "verdict of the verifier on this sample", "76px")] : []),
    ...(some("verdict") ? [column("verdict", "verdict", "value that the verifier gave", "72px")] : []),
    ...(has?.staleness ? [column("staleness", "stale", "updates between the weights that sampled it and those that learnt", "56px")] : []),
    column("response_head", "response", "its beginning", "minmax(280px, 1fr)", "text"),
    column("finish_reason", "finish", "why the response ended", "60px", "text"),
    column("rank", "rank", "best or worst of its group", "56px", "text"),
    ...(some("dropped") ? [column("dropped", "dropped", "why its group was not trained", "84px", "text")] : []),
    ...(some("set") ? [column("set", "set", "held-out set", "84px", "text")] : []),
  ];
  for (const entry of columns)
    if (entry.key === "reward" || entry.key.includes(":"))
      entry.range = extent(rows.map((row) => valueOf(row, entry.key) as number | null));
  return columns;
}

function shown({ key }: Column, value: unknown): string {
  if (key === "correct") return value === 1 ? "✓ right" : value === 0 ? "✗ wrong" : number(value as number);
  if (typeof value === "number") return number(value);
  return String(value).replace(/\s+/g, " ");
}

function share(value: unknown, [low, high]: [number, number]): number {
  return place(Number(value), { low: Math.min(0, low), high, signed: false });
}

export const columns = { all, shown, share };
