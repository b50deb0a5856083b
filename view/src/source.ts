// Where answers come from: the server of `python -m rlkit.view`, or the JSON in a report.
import type { Columns, Metrics, Samples, Summary, Tokens } from "./api";

export type Query = Record<string, string | number | null | undefined>;

export interface Source {
  readonly embedded: boolean;
  /** Throws an Error whose message is for the reader. */
  get<T>(route: string, query: Query, signal?: AbortSignal): Promise<T>;
  /** Calls back when a run grew or ended, or any may have, and when the connection did; returns how to stop. */
  follow(changed: (run?: string) => void, state: (connected: boolean) => void): () => void;
}

const given = (value: Query[string]) => value !== undefined && value !== null && value !== "";

/** One spelling for equal questions: parameters in order, empty ones left out. */
export function address(route: string, query: Query): string {
  const text = new URLSearchParams();
  for (const key of Object.keys(query).sort()) if (given(query[key])) text.set(key, String(query[key]));
  return `/api/${route}${text.size ? "?" + text : ""}`;
}

export const http: Source = {
  embedded: false,
  async get(route, query, signal) {
    const reply = await fetch(address(route, query), { signal }).catch((error) => {
      throw signal?.aborted ? error : new Error("The server does not answer. Is `python -m rlkit.view` still running?");
    });
    const body = await reply.json().catch(() => null);
    if (!reply.ok) throw new Error(body?.error ?? `The server answered ${reply.status}.`);
    return body;
  },
  follow(changed, state) {
    const events = new EventSource("/api/events");
    events.onopen = () => {
      state(true);
      changed(); // what was missed
    };
    events.onerror = () => state(false);
    events.onmessage = (event) => changed(JSON.parse(event.data).run);
    const timer = setInterval(() => changed(), 5000); // nothing tells that a server has read what was there before
    return () => {
      clearInterval(timer);
      events.close();
    };
  },
};

interface Report {
  results: Record<string, unknown>;
}

/** A report's JSON, from gzip in base64. */
export async function unpacked(text: string): Promise<Report> {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

export function embedded(report: Report): Source {
  const results = new Map(
    Object.entries(report.results).map(([key, result]) => {
      const [path, query = ""] = key.split("?");
      return [address(path.replace("/api/", ""), Object.fromEntries(new URLSearchParams(query))), result];
    }),
  );
  /** What was asked in a report for a part of it. */
  function part(route: string, query: Query): unknown {
    const { run, id } = query;
    const whole = <T>(query: Query) => results.get(address(route, query)) as T | undefined;
    if (route === "metrics") return metricsOf(whole({ run, names: "*" }), query);
    if (route === "samples") return samplesOf(whole({ run }), query);
    if (route === "tokens") return tokensOf(whole({ run, id }), query);
  }
  return {
    embedded: true,
    async get<T>(route: string, query: Query) {
      const result = results.get(address(route, query)) ?? part(route, query);
      if (result !== undefined) return result as T;
      if (query.filter || query.within || query.q) throw new Error("Filters and full-text search are not in this report; `python -m rlkit.view` has them.");
      throw new Error("This is not in this report; `python -m rlkit.view` shows the whole run.");
    },
    follow: () => () => {},
  };
}

function picked<T>(values: Record<string, T>, names: string[]): Record<string, T> {
  return Object.fromEntries(names.flatMap((name) => (name in values ? [[name, values[name]]] : [])));
}

function metricsOf(all: Metrics | undefined, query: Query): Metrics | undefined {
  if (!all) return undefined;
  const names = String(query.names ?? "").split(",").flatMap((name) => [name, name + "/low", name + "/high"]);
  const of = (columns: Columns) => ({ ...columns, values: picked(columns.values, names) });
  return { ...all, training: of(all.training), evaluation: of(all.evaluation) };
}

function samplesOf(all: Samples | undefined, query: Query): Samples | undefined {
  if (!all || query.filter || query.within || query.q) return undefined;
  const equal = (name: string, value: unknown) => !given(query[name]) || String(query[name]) === String(value);
  const [first, last] = [Number(query.from_step || 0), Number(query.to_step || Infinity)];
  const rows = all.rows.filter(
    ({ step, prompt_id, group_id }) =>
      equal("step", step) && equal("prompt_id", prompt_id) && equal("group", group_id) && step >= first && step <= last,
  );
  const sort = String(query.sort ?? "");
  const down = query.order === "desc" ? -1 : 1;
  if (sort) rows.sort((a, b) => compared(valueOf(a, sort), valueOf(b, sort), down));
  return { total: rows.length < all.rows.length ? rows.length : all.total, rows, next: null };
}

/** What a column shows: `reward`, `component:NAME`, `rescored:NAME`. */
export function valueOf(row: Summary, key: string): unknown {
  const [kind, name] = key.split(/:(.*)/);
  if (kind === "component") return row.components[name];
  if (kind === "rescored") return row.rescored[name];
  return row[key as keyof Summary];
}

/** Nothing comes last in either direction. */
function compared(a: unknown, b: unknown, down: 1 | -1): number {
  if (a == null || b == null) return Number(a == null) - Number(b == null);
  return (a < b ? -1 : a > b ? 1 : 0) * down;
}

function tokensOf(all: Tokens | undefined, query: Query): Tokens | undefined {
  const from = Number(query.from ?? all?.from);
  if (!all || from < all.from) return undefined;
  const to = Math.min(Number(query.to ?? all.to), all.to);
  const cut = <T>(values: T[]) => values.slice(from - all.from, to - all.from);
  const names = query.signals ? String(query.signals).split(",") : Object.keys(all.signals);
  const signals = Object.entries(picked(all.signals, names)).map(([name, values]) => [name, cut(values)]);
  const cuts = { pieces: cut(all.pieces), mask: cut(all.mask), version: cut(all.version) };
  return { ...all, from, to, ...cuts, signals: Object.fromEntries(signals) };
}
