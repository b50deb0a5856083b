import { expect, test } from "vitest";
import type { Metrics, Samples, Tokens } from "./api";
import { address, embedded, unpacked } from "./source";

test("equal questions have one address", () => {
  expect(address("samples", { run: "a b", step: undefined, q: "", filter: "x > 1" })).toBe(
    "/api/samples?filter=x+%3E+1&run=a+b",
  );
  expect(address("runs", {})).toBe("/api/runs");
});

const columns = { step: [1, 2], seconds: [1, 2], samples: [4, 8], values: { a: [1, 2], "a/low": [0, 1], b: [3, 4] } };
const row = (id: number, step: number, reward: number | null, format: number) => ({ id, step, reward, components: { format } });
const report = embedded({
  results: {
    "/api/metrics?run=r%20un&names=%2A": { run: "r un", names: ["a", "b"], training: columns, evaluation: columns },
    "/api/samples?run=r": { total: 90, rows: [row(0, 1, 2, 5), row(1, 2, null, 7), row(2, 2, 9, 6)], next: null },
    "/api/tokens?run=r&id=3": {
      from: 0, to: 4, total: 4, pieces: ["a", "b", "c", "d"], mask: [true, true, true, true], version: [0, 0, 0, 0],
      signals: { entropy: [1, 2, 3, 4], advantage: [0, 0, 1, 1] }, ranges: {},
    },
  },
});

test("a report is unpacked", async () => {
  const content = { results: { "/api/runs": "käse <script> 日本" } };
  const gzip = new Blob([JSON.stringify(content)]).stream().pipeThrough(new CompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(gzip).arrayBuffer());
  expect(await unpacked(btoa(String.fromCharCode(...bytes)))).toEqual(content);
});

test("a report answers for some metrics out of all", async () => {
  const metrics = (await report.get("metrics", { run: "r un", names: "a" })) as Metrics;
  expect(Object.keys(metrics.training.values)).toEqual(["a", "a/low"]);
});

test("a report sorts and narrows the samples it holds, and keeps the run's own count", async () => {
  const ids = async (query: object) => ((await report.get("samples", { run: "r", ...query })) as Samples).rows.map(({ id }) => id);
  expect(await ids({ sort: "reward", order: "desc", limit: 400 })).toEqual([2, 0, 1]);
  expect(await ids({ sort: "component:format", order: "asc" })).toEqual([0, 2, 1]);
  expect(await ids({ step: "2" })).toEqual([1, 2]);
  expect(((await report.get("samples", { run: "r", limit: 400 })) as Samples).total).toBe(90);
});

test("a report cuts windows and signals of tokens", async () => {
  const tokens = (await report.get("tokens", { run: "r", id: 3, signals: "entropy", from: 1, to: 3 })) as Tokens;
  expect([tokens.pieces, tokens.signals]).toEqual([["b", "c"], { entropy: [2, 3] }]);
});

test("what a report lacks is said, never shown as empty", async () => {
  await expect(report.get("triage", { run: "r" })).rejects.toThrow("not in this report");
  await expect(report.get("samples", { run: "r", filter: "reward > 1" })).rejects.toThrow("not in this report");
  await expect(report.get("metrics", { run: "other", names: "a" })).rejects.toThrow("not in this report");
});
