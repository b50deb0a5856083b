// What the page shows is in its address: #/samples?run=a&step=12. A link reopens exactly this view.
import { MediaQuery } from "svelte/reactivity";
import type { Run, Runs } from "./api";
import { embedded, http, unpacked, type Query, type Source } from "./source";

const report = document.getElementById("report")?.textContent?.trim();
export const source: Source = report ? embedded(await unpacked(report)) : http;
const dark = new MediaQuery("prefers-color-scheme: dark");

function read(): { screen: string; params: URLSearchParams } {
  const [screen, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { screen: screen || "overview", params: new URLSearchParams(query) };
}

/** The theme that this reader chose, and chooses now; a page opened from a file may have nowhere to keep it. */
export function theme(chosen?: string): string {
  try {
    if (chosen) localStorage.setItem("rlkit-theme", chosen);
    return localStorage.getItem("rlkit-theme") ?? "auto";
  } catch {
    return chosen ?? "auto";
  }
}

class Page {
  route = $state.raw(read());
  runs = $state.raw<Runs | null>(null);
  error = $state<string | null>(null);
  connected = $state(true);
  /** `auto`, `light` or `dark` */
  theme = $state(theme());
  help = $state(false);
  /** Counts what happened to a run, so that whoever shows it asks anew. */
  ticks = $state<Record<string, number>>({});

  constructor() {
    addEventListener("hashchange", () => (this.route = read()));
  }

  get dark(): boolean {
    return this.theme === "auto" ? dark.current : this.theme === "dark";
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

  link(screen: string, params: Query = {}): string {
    const query = new URLSearchParams();
    for (const [key, value] of Object.entries({ run: this.run, with: this.get("with"), ...params }))
      if (value !== null && value !== undefined && value !== "") query.set(key, String(value));
    return `#/${screen}?${query}`;
  }
  go(screen: string, params: Query = {}): void {
    location.hash = this.link(screen, params);
  }
  /** Changes this view without a new entry in the browser's history. */
  set(params: Query): void {
    history.replaceState(null, "", this.link(this.route.screen, { ...Object.fromEntries(this.route.params), ...params }));
    this.route = read();
  }

  async load(): Promise<void> {
    const state = (run: Run) => JSON.stringify({ ...run, state_text: "" });
    const known = new Map(this.runs?.runs.map((run) => [run.id, state(run)]));
    try {
      this.runs = await source.get<Runs>("runs", {});
      this.error = null;
      const changed = this.runs.runs.filter((run) => this.#grown.delete(run.id) || known.get(run.id) !== state(run));
      for (const { id } of changed) this.ticks[id] = (this.ticks[id] ?? 0) + Number(known.has(id));
      if (changed.length && !source.embedded) this.changed(); // and may go on
    } catch (error) {
      this.error = (error as Error).message;
    }
  }
  #grown = new Set<string>();
  #waiting = false;
  /** A run grew, or any may have. What came within a second, or while nobody looked, is one change. */
  changed(run?: string): void {
    if (run) this.#grown.add(run);
    if (this.#waiting) return;
    this.#waiting = true;
    const look = () => {
      this.#waiting = false;
      void this.load();
    };
    setTimeout(() => (document.hidden ? addEventListener("visibilitychange", look, { once: true }) : look()), 1000);
  }
}

export const page = new Page();

type Question = [route: string, query: Query];

/** The answers to questions that may change: asked anew when they do or when their run grew, and kept until the new
 * ones are there. */
export class Answers<T> {
  #all = $state.raw<(T | Error)[]>([]);
  values = $derived(this.#all.filter((answer): answer is T & {} => !(answer instanceof Error)));
  errors = $derived(this.#all.filter((answer) => answer instanceof Error).map(({ message }) => message));

  constructor(questions: () => Question[]) {
    const key = $derived(JSON.stringify(questions()));
    $effect(() => {
      const asked = JSON.parse(key) as Question[];
      for (const [, { run, runs }] of asked) for (const id of String(run ?? runs).split(",")) void page.ticks[id];
      const stop = new AbortController();
      const answers = asked.map((question) => source.get<T>(...question, stop.signal).catch((error: Error) => error));
      void Promise.all(answers).then((all) => !stop.signal.aborted && (this.#all = all));
      return () => stop.abort();
    });
  }
}

/** The answer to one question; `question` returns null while there is nothing to ask. */
export class Answer<T> extends Answers<T> {
  constructor(question: () => Question | null) {
    super(() => [question()].filter((asked) => asked !== null));
  }
  get value(): T | null {
    return this.values[0] ?? null;
  }
  get error(): string | null {
    return this.errors[0] ?? null;
  }
}
