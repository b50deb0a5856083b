// What the server answers: the results of rlkit/view/schema.py, by hand. tests/view compares the two.

export type Values = (number | null)[];

export interface Run {
  id: string;
  path: string;
  kind: "training" | "evaluation";
  state: "running" | "ended" | "silent";
  state_text: string;
  algorithm: string;
  reward: string;
  model: string;
  data: string;
  step: number;
  total_steps: number | null;
  began: number | null;
  updated: number | null;
  samples: number;
  kept_groups: number;
  has: { tokens: boolean; rescored: string[]; correct: boolean; staleness: boolean; components: string[]; results: boolean };
}
export interface Runs {
  rlkit: string;
  runs: Run[];
}

export interface Columns {
  step: number[];
  seconds: Values;
  samples: Values;
  values: Record<string, Values>;
}
export interface Metrics {
  run: string;
  names: string[];
  training: Columns;
  evaluation: Columns;
}

export interface Tile {
  name: string;
  title: string;
  value: number | null;
  first: number | null;
  change: number | null;
  unit: string;
  better: "up" | "down" | null;
  series: [number, number | null][];
  note: string;
}
export type LightState = "good" | "look" | "bad" | "unknown";
export interface Light {
  id: string;
  title: string;
  state: LightState;
  word: string;
  value_text: string;
  meaning: string;
  reading: string;
  remedy: string;
  metrics: string[];
  steps: number[];
}
export interface Overview {
  tiles: Tile[];
  lights: Light[];
  progress: { step: number; total: number | null; seconds_per_step: number | null; remaining_seconds: number | null };
  last: Summary[];
  warnings: { text: string; count: number }[];
}

export interface Summary {
  id: number;
  step: number;
  group_id: string;
  prompt_id: string;
  sample: number;
  rank: string | null;
  reward: number | null;
  components: Record<string, number | null>;
  advantage: number | null;
  length: number | null;
  correct: number | null;
  verdict: number | null;
  finish_reason: string | null;
  staleness: number | null;
  dropped: string | null;
  valid: boolean;
  reason: string;
  set: string | null;
  kind: string;
  rescored: Record<string, number | null>;
  has_tokens: boolean;
  prompt_head: string;
  response_head: string;
}
export interface Samples {
  total: number;
  rows: Summary[];
  next: string | null;
}
export interface Histogram {
  key: string;
  edges: number[];
  counts: number[];
  missing: number;
}

/** What was said: of a prompt, or a turn of an episode. */
export interface Turn {
  role: string;
  content: string | null;
  name?: string;
  calls?: { name: string; arguments: unknown; error?: string | null }[];
  reward?: number | null;
  [other: string]: unknown;
}
/** What the page shows of a row of samples.jsonl; older runs lack fields. */
export interface RawRow {
  sample?: number;
  prompt?: Turn[] | string;
  answer?: unknown;
  references?: string[];
  response?: string;
  turns?: Turn[];
  trace?: unknown;
}
export interface Part {
  name: string;
  value: number | null;
  weight: number | null;
  contribution: number | null;
}
export interface OneSample {
  row: RawRow;
  summary: Summary;
  group: { id: number | null; sample: number; reward: number | null; rank: string | null }[];
  tokens: { signals: string[]; length: number } | null;
  account: Part[];
  account_note: string;
  previous: number | null;
  next: number | null;
}
export interface Range {
  low: number | null;
  high: number | null;
  signed: boolean;
  meaning: string;
}
export interface Tokens {
  from: number;
  to: number;
  total: number;
  pieces: string[];
  mask: boolean[];
  version: number[];
  signals: Record<string, Values>;
  ranges: Record<string, Range>;
}
export interface Group {
  group_id: string;
  step: number;
  prompt: Turn[];
  answer: unknown;
  references: string[];
  rewards: Values;
  rows: (RawRow & { id: number })[];
  equal: boolean;
  dropped: string | null;
}

export interface Distribution {
  key: string;
  edges: number[];
  steps: number[];
  counts: number[][];
}
export interface Scatter {
  points: [number, number, number][];
  total: number;
}
export interface Finding {
  id: string;
  title: string;
  level: "look" | "note";
  text: string;
  evidence: { label: string; value: string }[];
  metrics: string[];
  rows: (Summary & { score: number | null })[];
  filter: string | null;
}
export interface Triage {
  verifier: boolean;
  findings: Finding[];
  missing: { id: string; why: string }[];
}
export interface Config {
  keys: { key: string; values: (string | null)[]; differs: boolean }[];
}
export interface Compare {
  metrics: {
    name: string;
    values: Values;
    best: Values;
    difference: number | null;
    low: number | null;
    high: number | null;
    paired: number;
    words: string;
  }[];
  prompts: { prompt_id: string; prompt_head: string; ids: number[][]; rewards: Values[] }[];
  next: string | null;
}
export interface Time {
  phases: string[];
  steps: number[];
  seconds: Record<string, Values>;
  step_seconds: Values;
  overlap: Values;
  tokens_per_second: Values;
  idle: { learner: Values; engine: Values };
  frozen: Values;
}
export interface Files {
  files: { path: string; bytes: number; modified: number }[];
}
export interface Log {
  path: string;
  text: string;
  from: number;
  bytes: number;
}
/** results.json of an evaluation; its schema is rlkit.evaluate's. */
export type Results = Record<string, unknown>;

export interface Grew {
  run: string;
  step: number;
  state: Run["state"];
  samples: number;
}
