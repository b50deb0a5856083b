import { expect, test } from "vitest";
import { binned, bytes, duration, measured, number, pieces, plain, signed } from "./text";

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
