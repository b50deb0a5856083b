import { expect, test } from "vitest";
import { rows } from "./results";

test("numbers are found where they stand, settings are not", () => {
  const table = rows({
    schema_version: 1,
    config: { seed: { value: 3 } },
    sets: [{ name: "gsm8k", metrics: { "avg@4": { value: 0.5, low: 0.4, high: 0.6, questions: 80, words: "" } } }],
  });
  expect(table).toEqual([{ of: "sets › gsm8k › metrics", metric: "avg@4", value: 0.5, low: 0.4, high: 0.6, count: 80, words: "" }]);
});
