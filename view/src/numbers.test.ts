import { describe, expect, test } from "vitest";
import { areas, bin, conditions, ends, exactly, extent, interval, merged, place, smooth, spans } from "./numbers";

test("smoothing starts at the first value and leaves gaps", () => {
  expect(smooth([4, null, 4], 0.9)).toEqual([4, null, 4]);
  // weights of an average over 2 values with keep 0.5: (0.5 * 0.5 * 1 + 0.5 * 3) / 0.75
  expect(smooth([1, 3], 0.5)[1]).toBeCloseTo(7 / 3);
});

test("extent of nothing is nothing", () => {
  expect(extent([null, undefined, NaN])).toBeNull();
  expect(extent([2, null, -1])).toEqual([-1, 2]);
});

test("merged columns are means of what is known", () => {
  expect(merged([1, 3, null, null, 5], 3)).toEqual([2, null, 5]);
  expect(merged([1, 2], 3)).toEqual([1, 2]);
});

test("areas are what stands before the first slash", () => {
  expect(areas(["reward/mean", "reward/std", "lr", "timing/step"], "r")).toEqual([
    { area: "reward", names: ["reward/mean", "reward/std"] },
    { area: "run", names: ["lr"] },
  ]);
  expect(() => areas(["a"], "(")).toThrow();
});

test("exactly these names", () => {
  const pattern = new RegExp(exactly(["a/b", "c.d"]));
  expect(["a/b", "c.d", "xa/b", "a/bc", "cxd"].filter((name) => pattern.test(name))).toEqual(["a/b", "c.d"]);
});

describe("place in a range", () => {
  test.each([
    [0, -1, 2, true, 0.5],
    [2, -1, 2, true, 1],
    [-1, -1, 2, true, 0.25],
    [5, 0, 10, false, 0.5],
    [99, 0, 10, false, 1],
    [3, 3, 3, false, 0],
    [0, 0, 0, true, 0.5],
  ])("%d of %d to %d, signed %s", (value, low, high, signed, share) => {
    expect(place(value, ends({ low, high, signed }))).toBe(share);
  });
});

test("intervals are conditions", () => {
  const intervals = { reward: { low: 0, high: 1 }, length: { low: 5, high: 9 } };
  expect(conditions(intervals)).toBe("reward >= 0 and reward < 1 and length >= 5 and length < 9");
  expect(conditions({ reward: null })).toBe("");
});

test("intervals of the address", () => {
  expect(interval("0.5..1e3")).toEqual({ low: 0.5, high: 1000 });
  expect(interval("-2..-1")).toEqual({ low: -2, high: -1 });
  for (const broken of ["", null, "1", "a..b"]) expect(interval(broken)).toBeNull();
});

test("the last bin holds its upper edge", () => {
  expect(bin([0, 1, 2], 0)).toEqual({ low: 0, high: 1 });
  expect(bin([0, 1, 2], 1).high).toBeGreaterThan(2);
});

test("a span begins after the end of the one before", () => {
  expect(spans([null, null, 0.5, null, -1, null], 10)).toEqual([
    { start: 10, end: 12, value: 0.5 },
    { start: 13, end: 14, value: -1 },
  ]);
  expect(spans([1, 1, 1], 0)).toBeNull();
});
