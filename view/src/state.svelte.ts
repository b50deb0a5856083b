// What the page shows is in its address: #/samples?run=a&step=12. A link reopens exactly this view.
import type { Grew, Run, Runs } from "./api";
import { embedded, http, type Query, type Source } from "./source";

export type Theme = "auto" | "light" | "dark";
type Params = Record<string, string | number | null | undefined>;

const report = document.getElementById("report")?.textContent?.trim();
export const source: Source = report ? embedded(JSON.parse(report)) : http;

function read(): { screen: string; params: URLSearchParams } {
  const [screen, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { screen: screen || "overview", params: new URLSearchParams(query) };
}

class Page {
  route = $state.raw(read());
  runs = $state.raw<Runs | null>(null);
  error = $state<string | null>(null);
  connected = $state(true);
  theme = $state<Theme>((store.get("theme") as Theme) ?? "auto");
  help = $state(false);
  /** Counts what happened to a run, so that whoever shows it asks anew. */
  ticks = $state<Record<string, number>>({});

  get dark(): boolean {
    return this.theme === "auto" ? this.#system : this.theme === "dark";
  }
  #media = matchMedia("(prefers-color-scheme: dark)");
  #system = $state(this.#media.matches);

  constructor() {
    this.#media.addEventListener("change", () => (this.#system = this.#media.matches));
    addEventListener("hashchange", () => (this.route = read()));
  }

  get(name: string): string {
    return this.route.params.get(name) ?? "";
  }
  /** The run that is looked at, and those laid over it. */
  get run(): string {
    return this.get("run") || (this.runs?.runs[0]?.id ?? "");
  }
  get others(): string[] {
    return this.get("with").split(",").filter((id) => id && id !== this.run);
  }
  get all(): string[] {
    return [this.run, ...this.others];
  }
  get current(): Run | undefined {
    return this.runs?.runs.find((run) => run.id === this.run);
  }

  link(screen: string, params: Params = {}): string {
    const query = new URLSearchParams();
    for (const [key, value] of Object.entries({ run: this.run, with: this.get("with"), ...params }))
      if (value !== null && value !== undefined && value !== "") query.set(key, String(value));
    return `#/${screen}?${query}`;
  }
  go(screen: string, params: Params = {}): void {
    location.hash = this.link(screen, params);
  }
  /** Changes this view without a new entry in the browser's history. */
  set(params: Params): void {
    const kept = { ...Object.fromEntries(this.route.params), ...params };
    history.replaceState(null, "", this.link(this.route.screen, kept));
    this.route = read();
  }

  async load(): Promise<void> {
    try {
      const known = new Map(this.runs?.runs.map(({ id, samples }) => [id, samples]));
      this.runs = (await source.get("runs", {})) as Runs;
      this.error = null;
      // A server that has just begun is still reading: what it knows grows though the runs do not.
      const fed = this.runs.runs.filter(({ id, samples }) => known.get(id) !== samples);
      for (const { id } of fed) if (known.has(id)) this.ticks[id] = (this.ticks[id] ?? 0) + 1;
      if (fed.length && !source.embedded) setTimeout(() => void this.load(), 1500);
    } catch (error) {
      this.error = (error as Error).message;
    }
  }
  #grown = new Set<string>();
  #waiting = false;
  /** A run grew (null: something may have been missed). What came within a second, or while nobody looked, is one. */
  grew(event: Grew | null): void {
    for (const run of event ? [event.run] : (this.runs?.runs ?? []).map(({ id }) => id)) this.#grown.add(run);
    if (this.#waiting) return;
    this.#waiting = true;
    const tell = () => {
      this.#waiting = false;
      for (const run of this.#grown) this.ticks[run] = (this.ticks[run] ?? 0) + 1;
      this.#grown.clear();
      void this.load();
    };
    setTimeout(() => (document.hidden ? addEventListener("visibilitychange", tell, { once: true }) : tell()), 1000);
  }
}

/** Settings of this reader. A page opened from a file may have nowhere to keep them. */
export const store = {
  get(key: string): string | null {
    try {
      return localStorage.getItem("rlkit-" + key);
    } catch {
      return null;
    }
  },
  set(key: string, value: string): void {
    try {
      localStorage.setItem("rlkit-" + key, value);
    } catch {
      // it lasts until the page is closed
    }
  },
};

export const page = new Page();

/** The answer to a question that may change: asked anew when it does or when its run grew, and kept until the new
 * one is there. `question` returns null while there is nothing to ask. */
export class Answer<T> {
  value = $state.raw<T | null>(null);
  error = $state<string | null>(null);
  busy = $state(false);
  #key = "";

  constructor(question: () => [route: string, query: Query] | null) {
    const key = $derived(JSON.stringify(question()));
    $effect(() => {
      const asked = JSON.parse(key) as [string, Query] | null;
      if (!asked) {
        this.value = null;
        return;
      }
      for (const run of String(asked[1].run ?? asked[1].runs ?? "").split(",")) void page.ticks[run];
      const stop = new AbortController();
      this.busy = key !== this.#key;
      this.#key = key;
      source.get(...asked, stop.signal).then(
        (value) => !stop.signal.aborted && this.#settle(value as T, null),
        (error: Error) => !stop.signal.aborted && this.#settle(null, error.message),
      );
      return () => stop.abort();
    });
  }
  #settle(value: T | null, error: string | null): void {
    this.value = value;
    this.error = error;
    this.busy = false;
  }
}
