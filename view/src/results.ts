// The tables of results.json, schema 1 of `python -m rlkit.evaluate` (rlkit/assessment/report.py).
import type { Results } from "./api";
import { number } from "./text";

type Estimate = Record<"value" | "low" | "high", number | null> & { questions: number };
type Line = Record<"step" | "answers" | "left_out", number> & Record<"length" | "reward", Estimate | null> & {
  decoding: string;
  mean: Estimate;
  of_k: Record<string, Record<string, Estimate>>;
  wrong: number | null;
};
type Comparison = Record<"better" | "worse" | "sign_test_p", number> & {
  first: string;
  second: string;
  difference: Estimate;
  winner: string | null;
};
export interface Row {
  of: string;
  metric: string;
  numbers: Estimate;
  words?: string;
}

/** What was measured, and the paired differences; null for a schema that this page does not know. */
export function tables(results: Results): { measured: Row[]; differences: Row[] } | null {
  if (results.schema !== 1) return null;
  return { measured: (results.lines as Line[]).flatMap(measured), differences: (results.comparisons as Comparison[]).map(compared) };
}

function measured({ step, decoding, mean, of_k, wrong, answers, left_out, length, reward }: Line): Row[] {
  const of = decoding === "recorded" ? "recorded answers" : `step ${step}, ${decoding}`;
  const left = left_out ? `${number(left_out)} of ${number(answers)} answers were not judged and are not counted` : "";
  const of_each = Object.entries(of_k).flatMap(([name, by_k]) => Object.entries(by_k).map(([k, numbers]) => [name + k, numbers] as const));
  return [
    { of, metric: wrong === null ? "mean" : "accuracy", numbers: mean, words: left },
    ...[...of_each, ["tokens per answer", length] as const, ["reward", reward] as const].flatMap(([metric, numbers]) =>
      numbers ? [{ of, metric, numbers }] : [],
    ),
  ];
}

function compared({ first, second, difference, better, worse, sign_test_p, winner }: Comparison): Row {
  const verdict = winner ? `${winner} is better` : "no winner: the interval contains 0";
  const words = `${verdict}; better on ${better} questions, worse on ${worse}, sign test p ${number(sign_test_p)}`;
  return { of: `${second} minus ${first}`, metric: "difference", numbers: difference, words };
}
