// The table of results.json, schema 1 of `python -m rlkit.evaluate` (rlkit/assessment/report.py).
import type { Results } from "./api";
import { number } from "./text";

interface Estimate {
  value: number | null;
  low: number | null;
  high: number | null;
  questions: number;
}
interface Line {
  step: number;
  decoding: string;
  mean: Estimate;
  of_k: Record<string, Record<string, Estimate>>;
  wrong: number | null;
  answers: number;
  left_out: number;
  length: Estimate | null;
  truncated_share: number | null;
  reward: Estimate | null;
}
interface Comparison {
  first: string;
  second: string;
  difference: Estimate;
  better: number;
  worse: number;
  sign_test_p: number;
  winner: string | null;
}

export interface Row {
  of: string;
  metric: string;
  numbers: Estimate;
  words: string;
}

/** Null for a schema that this page does not know. */
export function rows(results: Results): Row[] | null {
  if (results.schema !== 1) return null;
  return [...(results.lines as Line[]).flatMap(measured), ...(results.comparisons as Comparison[]).map(compared)];
}

function measured(line: Line): Row[] {
  const of = line.decoding === "recorded" ? "recorded answers" : `step ${line.step}, ${line.decoding}`;
  const left = line.left_out ? `${number(line.left_out)} of ${number(line.answers)} answers were not judged and are in no number` : "";
  const of_k = Object.entries(line.of_k).flatMap(([name, by_k]) =>
    Object.entries(by_k).map(([k, numbers]) => ({ of, metric: name + k, numbers, words: "" })),
  );
  const others = { "tokens of an answer": line.length, reward: line.reward };
  return [
    { of, metric: line.wrong === null ? "mean" : "accuracy", numbers: line.mean, words: left },
    ...of_k,
    ...Object.entries(others).flatMap(([metric, numbers]) => (numbers ? [{ of, metric, numbers, words: "" }] : [])),
  ];
}

function compared({ first, second, difference, better, worse, sign_test_p, winner }: Comparison): Row {
  const verdict = winner ? `${winner} is better` : "no winner: the interval holds 0";
  const words = `${verdict}; better on ${better} questions, worse on ${worse}, sign test p ${number(sign_test_p)}`;
  return { of: `${second} less ${first}`, metric: "difference", numbers: difference, words };
}
