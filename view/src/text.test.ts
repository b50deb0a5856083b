import { expect, test } from "vitest";
import { apart, binned, bytes, duration, measured, number, pieces, plain, signed } from "./text";

test.each([
  [null, "–"],
  [0, "0"],
  [0.12345, "0.123"],
  [-1.5, "−1.5"],
  [123456, "123,456"],
  [12.3456, "12.3"],
  [1234.56, "1,235"],
  [0.00012345, "1.23e−4"],
  [12345678, "1.23e7"],
  [Infinity, "∞"],
])("number %s", (value, text) => expect(number(value)).toBe(text));

test("units and signs", () => {
  expect(signed(0.5)).toBe("+0.5");
  expect(measured(0.251, "share")).toBe("25.1 %");
  expect(measured(-0.05, "points", true)).toBe("−5 points");
  expect(measured(null, "share")).toBe("–");
  expect(measured(3, "tokens")).toBe("3 tokens");
  expect(bytes(1536)).toBe("1.5 KiB");
  expect([12, 90, 5000, 300000].map((seconds) => duration(seconds))).toEqual(["12 s", "2 min", "1 h 23 min", "3 d 11 h"]);
});

test("bins of whole numbers are called by them", () => {
  expect(binned([-0.5, 0.5, 1.5], 0)).toBe("0");
  expect(binned([0, 0.5, 1], 1)).toBe("0.5 to 1");
});

test("what cannot be seen is an escape", () => {
  expect(plain("a\u0000b\u202ec\ufeff")).toBe("a\\u0000b\\u202ec\\ufeff");
  expect(plain("tab\tline\n")).toBe("tab\tline\n");
  expect(plain("\r\u001b[31m")).toBe("\\u000d\\u001b[31m");
});

test("halves of surrogate pairs are escapes, whole pairs are not", () => {
  expect(plain("😀")).toBe("😀");
  expect(plain("\ud83d x \ude00")).toBe("\\ud83d x \\ude00");
  expect(pieces("<b>&amp;")).toEqual([{ text: "<b>&amp;", escape: false }]);
});

test("what all texts begin with is left out, but not words that begin alike", () => {
  expect(["Solve this problem: 12 + 3", "Solve this problem: 14 + 3"].map((text, _, all) => apart(all)(text))).toEqual(["…12 + 3", "…14 + 3"]);
  expect(apart(["A bus has 6 riders", "A cat has 4 legs"])("A bus has 6 riders")).toBe("A bus has 6 riders");
  expect(apart(["the same text of all", "the same text of all"])("the same text of all")).toBe("the same text of all");
});
