import { SvelteSet } from "svelte/reactivity";
import * as api from "../server/api";
import { colourAt } from "../logic/colours";
import type { Change, Fit, Project } from "../server/types";
import { complain, toasts } from "./toasts.svelte";

const PAUSE = 150;

const isOver = (fit: Fit | null) => !fit || ["done", "failed", "cancelled"].includes(fit.state);

/** The project as the server tells it, kept fresh by its events, and what the other stores hear of these. */
class Session {
  project = $state.raw<Project | null>(null);
  fit = $state.raw<Fit | null>(null);
  connected = $state(true);
  locked = $state(false);
  /** Which class the next box gets; null before there is one. */
  label = $state<string | null>(null);
  private readonly hearers = new SvelteSet<(change: Change | null) => void>();
  private timer: ReturnType<typeof setTimeout> | undefined;

  readonly classes = $derived(this.project?.classes ?? []);
  readonly fitting = $derived(!isOver(this.fit));
  readonly current = $derived(this.classes.find(({ name }) => name === this.label)?.name ?? this.classes[0]?.name ?? null);

  async start(): Promise<void> {
    await this.refresh();
    this.fit ??= this.project?.fit ?? null;
    for (const note of this.project?.notes ?? []) toasts.say(note);
    let first = true;
    api.listen<Change>("events", "project", this.hear, (open) => {
      this.connected = open;
      if (open && !first) this.again();
      first = false;
    });
  }

  /** Calls `hear` on each change of the project, with null where anything may have changed. */
  on(hear: (change: Change | null) => void): () => void {
    this.hearers.add(hear);
    return () => this.hearers.delete(hear);
  }

  async refresh(): Promise<void> {
    try {
      this.project = await api.project();
      this.locked = false;
      this.connected = true;
    } catch (error) {
      if (error instanceof api.Refusal && error.status === 401) this.locked = true;
      else this.connected = false;
    }
  }

  soon(): void {
    this.timer ??= setTimeout(() => {
      this.timer = undefined;
      void this.refresh();
    }, PAUSE);
  }

  async startFit(): Promise<void> {
    try {
      this.fit = await api.startFit();
    } catch (error) {
      complain(error);
    }
  }

  async cancelFit(): Promise<void> {
    if (this.fit) await api.cancelFit(this.fit.id).catch(complain);
  }

  /** Makes sure that there is a class of that name and takes it for the next box. */
  async choose(name: string): Promise<void> {
    const names = this.classes.map((known) => known.name);
    this.label = name;
    if (names.includes(name)) return;
    await this.change({ classes: [...names, name] });
  }

  async change(what: Parameters<typeof api.changeProject>[0]): Promise<void> {
    try {
      this.project = await api.changeProject(what);
    } catch (error) {
      complain(error);
    }
  }

  colourOf(label: string): string {
    const place = this.classes.findIndex(({ name }) => name === label);
    return colourAt(place < 0 ? this.classes.length : place);
  }

  private readonly hear = (change: Change): void => {
    if (change.what === "fit" && change.fit) this.hearFit(change.fit);
    if (change.what !== "fit" || isOver(this.fit)) this.soon();
    for (const hear of this.hearers) hear(change);
  };

  private hearFit(fit: Fit): void {
    const was = this.fit;
    this.fit = fit;
    if (was?.id === fit.id && was.state === fit.state) return;
    if (fit.state === "failed") toasts.say(fit.error ?? "The fit failed.", true);
  }

  private again(): void {
    void this.refresh().then(() => (this.fit = this.project?.fit ?? this.fit));
    for (const hear of this.hearers) hear(null);
  }
}

export const session = new Session();
