import { SvelteMap, SvelteSet } from "svelte/reactivity";
import * as api from "../server/api";
import { applied, History, type Change } from "../logic/changes";
import { merged } from "../logic/merge";
import type { Change as ProjectChange, PhotoBoxes } from "../server/types";
import { known } from "./photos.svelte";
import { session } from "./session.svelte";
import { complain, toasts } from "./toasts.svelte";

const LONGEST_PAUSE = 5000;
const KEPT = "sppnet-unsaved";

const sleep = (milliseconds: number) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** The boxes of the photos that were opened: changed here at once, saved at once, never lost by a conflict or a dead server. */
class Labels {
  private readonly mine = new SvelteMap<string, PhotoBoxes>();
  private readonly base = new Map<string, PhotoBoxes>();
  private readonly loading = new Map<string, Promise<void>>();
  private readonly saving = new Set<string>();
  private readonly history = new History();
  readonly unsaved = new SvelteSet<string>();
  /** How many things are being done that will have boxes to save. */
  private working = $state(0);
  trouble = $state<string | null>(null);
  canUndo = $state(false);
  canRedo = $state(false);

  get busy(): boolean {
    return this.working > 0 || this.unsaved.size > 0;
  }

  async during(act: () => Promise<void>): Promise<void> {
    this.working += 1;
    await act().finally(() => (this.working -= 1));
  }

  start(): void {
    session.on((change) => this.hear(change));
    addEventListener("beforeunload", (event) => this.unsaved.size && event.preventDefault());
    for (const [id, { base, mine }] of restored()) void this.resume(id, base, mine);
  }

  of(id: string): PhotoBoxes | undefined {
    return this.mine.get(id);
  }

  async load(id: string): Promise<void> {
    if (this.mine.has(id)) return;
    const running = this.loading.get(id) ?? this.fetch(id).finally(() => this.loading.delete(id));
    this.loading.set(id, running);
    await running;
  }

  /** Does a step, which one undo takes back. */
  async act(step: Change[]): Promise<void> {
    if (step.length === 0) return;
    try {
      await this.during(() => this.apply(step));
      this.history.record(step);
      this.tell();
    } catch (error) {
      complain(error);
    }
  }

  async undo(): Promise<string | null> {
    return this.replay(this.history.undo(), "Undone");
  }

  async redo(): Promise<string | null> {
    return this.replay(this.history.redo(), "Done again");
  }

  private async replay(step: Change[], words: string): Promise<string | null> {
    this.tell();
    const [first] = step;
    if (!first) return null;
    await this.apply(step).catch(complain);
    toasts.say(`${words}: ${first.what}`);
    return first.photo;
  }

  private async apply(step: Change[]): Promise<void> {
    await Promise.all(step.map(({ photo }) => this.load(photo)));
    for (const change of step) this.mine.set(change.photo, applied(this.mine.get(change.photo)!, change));
    for (const { photo } of step) void this.save(photo);
  }

  private tell(): void {
    this.canUndo = this.history.canUndo;
    this.canRedo = this.history.canRedo;
  }

  private async fetch(id: string): Promise<void> {
    const boxes = await api.boxes(id);
    this.base.set(id, boxes);
    this.mine.set(id, boxes);
  }

  private async save(id: string): Promise<void> {
    this.unsaved.add(id);
    this.keep();
    if (this.saving.has(id)) return;
    this.saving.add(id);
    for (let pause = 500; this.unsaved.has(id); pause = Math.min(2 * pause, LONGEST_PAUSE)) {
      if (!(await this.send(id))) await sleep(pause);
    }
    this.saving.delete(id);
    this.keep();
  }

  /** Sends the boxes once; false where the server could not take them now, and may later. */
  private async send(id: string): Promise<boolean> {
    const sent = this.mine.get(id)!;
    try {
      this.took(id, sent, await api.saveBoxes(id, sent));
      this.trouble = null;
      return true;
    } catch (error) {
      return this.refused(id, error);
    }
  }

  private took(id: string, sent: PhotoBoxes, got: PhotoBoxes): void {
    const mine = this.mine.get(id)!;
    this.base.set(id, got);
    this.mine.set(id, mine === sent ? got : merged(sent, mine, got));
    if (mine === sent) this.unsaved.delete(id);
    if (got.warning) toasts.say(got.warning, true);
    const photo = known.get(id);
    if (photo) known.set(id, { ...photo, boxes: got.boxes.length, reviewed: got.reviewed });
  }

  private refused(id: string, error: unknown): boolean {
    const status = error instanceof api.Refusal ? error.status : -1;
    const current = (error as { body?: { current?: PhotoBoxes } }).body?.current;
    if (status === 409 && current) {
      this.mine.set(id, merged(this.base.get(id)!, this.mine.get(id)!, current));
      this.base.set(id, current);
      return true;
    }
    if (status === 0 || status === 429 || status >= 500) {
      this.trouble = (error as Error).message;
      return false;
    }
    this.mine.set(id, this.base.get(id)!);
    this.unsaved.delete(id);
    complain(error);
    return true;
  }

  private hear(change: ProjectChange | null): void {
    if (change && change.what !== "boxes" && change.what !== "classes") return;
    const stale = change?.photo ? [change.photo] : [...this.mine.keys()];
    for (const id of stale) if (this.mine.has(id) && !this.unsaved.has(id)) void this.reload(id);
  }

  private async reload(id: string): Promise<void> {
    const boxes = await api.boxes(id).catch(() => null);
    if (!boxes || this.unsaved.has(id) || boxes.revision <= (this.base.get(id)?.revision ?? -1)) return;
    this.base.set(id, boxes);
    this.mine.set(id, boxes);
  }

  private async resume(id: string, base: PhotoBoxes, mine: PhotoBoxes): Promise<void> {
    await this.load(id).catch(() => undefined);
    const now = this.mine.get(id);
    if (!now) return;
    this.mine.set(id, merged(base, mine, now));
    void this.save(id);
  }

  /** Keeps what is not saved where a reload of the page finds it. */
  private keep(): void {
    const unsaved = [...this.unsaved].map((id) => [id, { base: this.base.get(id), mine: this.mine.get(id) }]);
    if (unsaved.length) sessionStorage.setItem(KEPT, JSON.stringify(unsaved));
    else sessionStorage.removeItem(KEPT);
  }
}

function restored(): [string, { base: PhotoBoxes; mine: PhotoBoxes }][] {
  return JSON.parse(sessionStorage.getItem(KEPT) ?? "[]") as [string, { base: PhotoBoxes; mine: PhotoBoxes }][];
}

export const labels = new Labels();
