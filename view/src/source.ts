// Where answers come from: the server of `python -m rlkit.view`, or the JSON in a report.
import type { Columns, Grew, Metrics, Samples, Summary, Tokens } from "./api";

export type Query = Record<string, string | number | null | undefined>;

export interface Source {
  readonly embedded: boolean;
  /** Throws an Error whose message is for the reader. */
  get(route: string, query: Query, signal?: AbortSignal): Promise<unknown>;
  /** Calls back when a run grew or ended (null: something may have been missed); returns how to stop. */
  follow(changed: (event: Grew | null) => void, state: (connected: boolean) => void): () => void;
}

/** One spelling for equal questions: parameters in order, empty ones left out. */
export function address(route: string, query: Query): string {
  const pairs = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  pairs.sort(([a], [b]) => (a < b ? -1 : 1));
  const text = new URLSearchParams(pairs.map(([key, value]) => [key, String(value)])).toString();
  return `/api/${route}${text && "?" + text}`;
}

export const http: Source = {
  embedded: false,
  async get(route, query, signal) {
    let reply: Response;
    try {
      reply = await fetch(address(route, query), { signal });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Error("The server does not answer. Is `python -m rlkit.view` still running?");
    }
    const body = await reply.json().catch(() => null);
    if (!reply.ok) throw new Error(body?.error ?? `The server answered ${reply.status}.`);
    return body;
  },
  follow(changed, state) {
    const events = new EventSource("/api/events");
    let lost = false;
    events.onopen = () => {
      state(true);
      if (lost) changed(null);
      lost = false;
    };
    events.onerror = () => {
      lost = true;
      state(false);
    };
    events.onmessage = (event) => changed(JSON.parse(event.data));
    return () => events.close();
  },
};

interface Report {
  results: Record<string, unknown>;
}

export function embedded(report: Report): Source {
  const results = new Map(
    Object.entries(report.results).map(([key, result]) => {
      const [path, query = ""] = key.split("?");
      return [address(path.replace(/^\/api\//, ""), Object.fromEntries(new URLSearchParams(query))), result];
    }),
  );
  return {
    embedded: true,
    async get(route, query) {
      const key = address(route, query);
      const { run } = query;
      let result = results.get(key);
      if (route === "metrics") result ??= metricsOf(results.get(address(route, { run, names: "*" })) as Metrics, query);
      if (route === "samples") result ??= samplesOf(results.get(address(route, { run })) as Samples, query);
      if (route === "tokens") result ??= tokensOf(results.get(address(route, { run, id: query.id })) as Tokens, query);
      if (result === undefined) throw new Error(absent(query));
      return result;
    },
    follow: () => () => {},
  };
}

function absent(query: Query): string {
  if (query.filter || query.q) return "Filters and full text search are not in this report; `python -m rlkit.view` has them.";
  return "This is not in this report; `python -m rlkit.view` shows the whole run.";
}

function metricsOf(all: Metrics | undefined, query: Query): Metrics | undefined {
  if (!all) return undefined;
  const names = String(query.names ?? "").split(",");
  const of = (columns: Columns): Columns => ({
    ...columns,
    values: Object.fromEntries(
      names.flatMap((name) => [name, name + "/low", name + "/high"]).flatMap((name) =>
        columns.values[name] ? [[name, columns.values[name]]] : [],
      ),
    ),
  });
  return { ...all, training: of(all.training), evaluation: of(all.evaluation) };
}

function samplesOf(all: Samples | undefined, query: Query): Samples | undefined {
  if (!all || query.filter || query.q) return undefined;
  const equal = (name: "step" | "prompt_id", row: Summary) =>
    query[name] === undefined || query[name] === null || query[name] === "" || String(row[name]) === String(query[name]);
  const rows = all.rows.filter(
    (row) =>
      equal("step", row) &&
      equal("prompt_id", row) &&
      (!query.group || row.group_id === String(query.group)) &&
      (!query.from_step || (row.step ?? 0) >= Number(query.from_step)) &&
      (!query.to_step || (row.step ?? 0) <= Number(query.to_step)),
  );
  const sort = String(query.sort ?? "");
  if (sort) {
    const down = query.order === "desc" ? -1 : 1;
    rows.sort((a, b) => compared(valueOf(a, sort), valueOf(b, sort), down));
  }
  const narrowed = rows.length < all.rows.length;
  return { total: narrowed ? rows.length : all.total, rows, next: null };
}

/** What a column shows: `reward`, `component:NAME`, `rescored:NAME`. */
export function valueOf(row: Summary, key: string): unknown {
  const [kind, name] = [key.slice(0, key.indexOf(":")), key.slice(key.indexOf(":") + 1)];
  if (kind === "component") return row.components[name];
  if (kind === "rescored") return row.rescored[name];
  return row[key as keyof Summary];
}

/** Nothing comes last in either direction. */
function compared(a: unknown, b: unknown, down: 1 | -1): number {
  if (a == null || b == null) return a == null ? (b == null ? 0 : 1) : -1;
  return (a < b ? -1 : a > b ? 1 : 0) * down;
}

function tokensOf(all: Tokens | undefined, query: Query): Tokens | undefined {
  if (!all) return undefined;
  const from = Number(query.from ?? all.from);
  const to = Math.min(Number(query.to ?? all.to), all.to);
  if (from < all.from) return undefined;
  const cut = <T>(values: T[]) => values.slice(from - all.from, to - all.from);
  const names = query.signals ? String(query.signals).split(",") : Object.keys(all.signals);
  return {
    ...all,
    from,
    to,
    pieces: cut(all.pieces),
    mask: cut(all.mask),
    version: cut(all.version),
    signals: Object.fromEntries(names.flatMap((name) => (all.signals[name] ? [[name, cut(all.signals[name])]] : []))),
  };
}
