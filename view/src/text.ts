// Numbers and texts as people read them.
import type { LightState } from "./api";

export const NONE = "–"; // no number here, unlike 0
/** A state is told by its shape, too. */
export const SHAPES: Record<LightState, string> = { good: "●", look: "▲", bad: "■", unknown: "◌" };

/** Three significant digits, or the whole number before the point; `plus` marks what is above zero. */
export function number(value: number | null | undefined, plus = false): string {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE;
  const size = Math.abs(value);
  const scientific = size !== 0 && Number.isFinite(size) && (size < 1e-3 || size >= 1e6);
  const text = value.toLocaleString("en-US", {
    maximumSignificantDigits: 3,
    signDisplay: plus ? "exceptZero" : "negative",
    ...(scientific ? { notation: "scientific" } : { maximumFractionDigits: 0, roundingPriority: "morePrecision" }),
  });
  return text.replace("E", "e").replaceAll("-", "−");
}

export const signed = (value: number | null | undefined) => number(value, true);

/** A value in its unit; a share is per cent, a difference of shares is points. */
export function measured(value: number | null | undefined, unit: string, plus = false): string {
  if (value === null || value === undefined) return NONE;
  if (unit === "share") return number(value * 100, plus) + " %";
  if (unit === "points") return number(value * 100, plus) + " points";
  return number(value, plus) + (unit && " " + unit);
}

/** What a bin holds: of whole numbers that have one each, the number. */
export function binned(edges: number[], i: number): string {
  const [low, high] = [edges[i], edges[i + 1]];
  return high - low === 1 && low % 1 !== 0 ? number(low + 0.5) : `${number(low)} to ${number(high)}`;
}

/** The first and the last value of bins. */
export function reach(edges: number[]): [string, string] {
  return [binned(edges, 0).split(" to ")[0], binned(edges, edges.length - 2).split(" to ").at(-1)!];
}

export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 60) return number(seconds) + " s";
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function bytes(size: number): string {
  const power = Math.min(4, Math.floor(Math.log2(Math.max(size, 1)) / 10));
  return number(size / 1024 ** power) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][power];
}

export function moment(unix: number | null | undefined): string {
  return unix ? new Date(unix * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }) : NONE;
}

/** A verifier's verdict. */
export function judged(correct: number | null): string {
  return correct === 1 ? "✓ right" : correct === 0 ? "✗ wrong" : number(correct);
}

// What the records' names mean, where a heading or a choice shows them.
const WORDS: Record<string, string> = {
  length: "length in tokens", staleness: "staleness in updates", entropy: "entropy in nats", correct: "right according to the verifier",
  prompt_id: "prompt", from_step: "from step", to_step: "to step",
  logprob_sampler: "log-probability, sampler", logprob_learner: "log-probability, learner",
  logprob_reference: "log-probability, reference", process_reward: "process reward", value: "critic's value",
  weight: "correction weight", ratio: "probability ratio", clipped: "left out by clipping",
  mismatch: "learner minus sampler", kl: "learner minus reference",
  generate: "sampling answers", score: "scoring answers", advantages: "computing advantages", update: "updating the weights",
  publish: "publishing the weights",
  apart: "reward and accuracy apart", rewarded_wrong: "wrong answers among the best-rewarded",
  one_component: "one component decides", digits: "reward for digits", phrases: "phrases that are paid for",
  ensemble: "disagreement of an ensemble", last_token: "process credit on the last token",
};

/** Plain words for a name in the records: of a column, a signal, a phase, a check. */
export function words(name: string): string {
  const [kind, own] = name.split(/:(.*)/);
  if (own !== undefined) return kind === "component" ? `${own} (component)` : `${own} (rescored)`;
  return WORDS[name] ?? name;
}

export function text(value: unknown): string {
  return typeof value === "string" ? value : value === undefined ? "" : JSON.stringify(value, null, 2);
}

const SHARED = 12; // characters that texts may share before their beginning is left out

/** Leaves out the words with which all of these texts begin, so that what tells them apart is seen first. */
export function apart(texts: string[]): (text: string) => string {
  const [first = "", ...others] = new Set(texts);
  let shared = others.length ? first.length : 0;
  for (const other of others) while (!other.startsWith(first.slice(0, shared))) shared--;
  const start = first.slice(0, shared).search(/\S*$/);
  return (text) => (start > SHARED ? "…" + text.slice(start) : text);
}

// Control characters but tab and line feed, marks of direction, invisible joiners, and halves of surrogate pairs.
const HIDDEN =
  // eslint-disable-next-line no-control-regex
  /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff])/;

export interface Piece {
  text: string;
  escape: boolean;
}

/** Splits a text so that what could not be seen is shown as an escape. */
export function pieces(source: string): Piece[] {
  return source
    .split(HIDDEN)
    .map((part, i) => (i % 2 ? { text: "\\u" + part.charCodeAt(0).toString(16).padStart(4, "0"), escape: true } : { text: part, escape: false }))
    .filter(({ text }) => text);
}

export const plain = (source: string) => pieces(source).map(({ text }) => text).join("");
