import { expect, test } from "vitest";
import { tables } from "./results";

const estimate = (value: number) => ({ value, low: value - 0.1, high: value + 0.1, questions: 80 });

test("a row for each number, and words for each comparison", () => {
  const line = { step: 60, decoding: "sampled", mean: estimate(0.5), of_k: { "pass@": { "4": estimate(0.7) } }, wrong: 40 };
  const more = { answers: 90, left_out: 10, length: estimate(12), truncated_share: 0, reward: null };
  const comparison = { first: "step 0", second: "step 60", difference: estimate(0.05), better: 9, worse: 8, sign_test_p: 1 };
  const { measured, differences } = tables({ schema: 1, lines: [{ ...line, ...more }], comparisons: [{ ...comparison, winner: null }] })!;
  expect([...measured, ...differences].map(({ of, metric }) => [of, metric])).toEqual([
    ["step 60, sampled", "accuracy"],
    ["step 60, sampled", "pass@4"],
    ["step 60, sampled", "tokens per answer"],
    ["step 60 minus step 0", "difference"],
  ]);
  expect(measured[0].words).toContain("10 of 90 answers");
  expect(differences[0].words).toContain("no winner");
});

test("another schema is not guessed at", () => expect(tables({ schema: 2 })).toBeNull());
