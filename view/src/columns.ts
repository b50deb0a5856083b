// Which columns a list of samples has, and how their values read.
import type { Run, Summary } from "./api";
import { extent } from "./numbers";
import { valueOf } from "./source";
import { apart, judged, number } from "./text";

export interface Column {
  key: string;
  title: string;
  note: string;
  width: string;
  /** Numbers can be sorted by. */
  number: boolean;
  /** ends of a bar behind the number */
  range?: [number, number];
  /** how a text reads */
  short?: (text: string) => string;
}

const text = (key: string, title: string, note: string, width: string): Column => ({ key, title, note, width, number: false });
const numeric = (...column: Parameters<typeof text>): Column => ({ ...text(...column), number: true });

export function columnsOf(run: Run | undefined, rows: Summary[]): Column[] {
  const has = run?.has;
  const some = (key: keyof Summary) => rows.some((row) => row[key] !== null && row[key] !== undefined);
  const paid = (key: string, title: string, note: string, width = "72px"): Column => {
    const [low, high] = extent(rows.map((row) => valueOf(row, key) as number | null)) ?? [0, 0];
    return { ...numeric(key, title, note, width), range: [Math.min(0, low), high] };
  };
  return [
    numeric("step", "step", "training step that used it, or the checkpoint's step", "52px"),
    {
      ...text("prompt_head", "prompt", "its last message, without the words that all of them begin with", "minmax(160px, 0.5fr)"),
      short: apart(rows.map(({ prompt_head }) => prompt_head)),
    },
    numeric("sample", "#", "number in its group", "36px"),
    paid("reward", "reward", "what the algorithm learnt from", "80px"),
    ...(has?.components ?? []).map((name) => paid("component:" + name, name, `component ${name} of the reward, as measured`)),
    ...(has?.rescored ?? []).map((name) => paid("rescored:" + name, name + " (later)", `reward by ${name}, rescored afterwards`, "96px")),
    numeric("advantage", "advantage", "mean over the trained tokens", "92px"),
    numeric("length", "length", "tokens of the response", "68px"),
    has?.correct && numeric("correct", "correct", "the verifier's verdict on this sample", "76px"),
    some("verdict") && numeric("verdict", "verdict", "value that the verifier gave", "72px"),
    has?.staleness && numeric("staleness", "stale", "updates between the weights that sampled it and those that learnt from it", "56px"),
    text("response_head", "response", "its beginning", "minmax(280px, 1fr)"),
    text("finish_reason", "ended", "why the response ended", "60px"),
    text("rank", "rank", "best or worst in its group", "56px"),
    some("dropped") && text("dropped", "left out", "why its group was not trained on", "84px"),
    some("set") && text("set", "set", "held-out set", "84px"),
  ].filter((column) => !!column);
}

export function shown({ key, short = String }: Column, value: unknown): string {
  if (key === "correct") return judged(value as number);
  return typeof value === "number" ? number(value) : short(String(value)).replace(/\s+/g, " ");
}
