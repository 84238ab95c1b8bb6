import { SvelteMap } from "svelte/reactivity";
import * as api from "../server/api";
import { covered, overlap } from "../logic/boxes";
import type { Box, Region } from "../server/types";
import { labels } from "./labels.svelte";
import { photoOf } from "./photos.svelte";
import { session } from "./session.svelte";
import { complain } from "./toasts.svelte";

export interface Query {
  photo: string;
  box: Box;
  label: string | null;
}

const PAUSE = 800;

const keyOf = ({ photo, box }: Region) => `${photo} ${box.join(" ")}`;

/** The regions that look like one box, best first, and what was decided of each. */
export class Similar {
  query = $state.raw<Query | null>(null);
  regions = $state.raw<Region[]>([]);
  seconds = $state<number | null>(null);
  busy = $state(false);
  private readonly decisions = new SvelteMap<string, "yes" | "no">();
  private running: AbortController | null = null;
  private waiting: ReturnType<typeof setTimeout> | undefined;

  constructor(private readonly limit: number) {
    session.on((change) => change?.what === "photos" && this.again());
  }

  /** Regions that nobody decided on yet, nor drew a box around. */
  readonly open = $derived(this.regions.filter((region) => !this.decisions.has(keyOf(region)) && !isLabelled(region)));
  readonly confirmed = $derived(this.regions.filter((region) => this.decisions.get(keyOf(region)) === "yes").length);

  async ask(query: Query): Promise<void> {
    this.running?.abort();
    const running = (this.running = new AbortController());
    if (query.photo !== this.query?.photo || query.box !== this.query.box) this.decisions.clear();
    this.query = query;
    this.busy = true;
    try {
      const { regions, seconds } = await api.search(query.photo, query.box, this.limit, running.signal);
      this.regions = [...new Map(regions.map((region) => [keyOf(region), region])).values()];
      this.seconds = seconds;
    } catch (error) {
      if (!running.signal.aborted) complain(error);
    } finally {
      if (this.running === running) this.busy = false;
    }
  }

  /** Asks the same again, a little later: more photos have been read. */
  private again(): void {
    if (!this.query || this.waiting) return;
    this.waiting = setTimeout(() => {
      this.waiting = undefined;
      if (this.query) void this.ask(this.query);
    }, PAUSE);
  }

  clear(): void {
    this.running?.abort();
    this.query = null;
    this.regions = [];
    this.decisions.clear();
  }

  forget(photo: string, box: Box): void {
    this.decisions.set(keyOf({ photo, box, score: 0 }), "no");
  }

  decide(region: Region, yes: boolean): void {
    const label = this.query?.label ?? session.current;
    if (!label) return;
    this.decisions.set(keyOf(region), yes ? "yes" : "no");
    const { photo, box } = region;
    const what = yes ? `${label} in ${photoOf(photo)?.name ?? "a photo"}` : `not ${label}`;
    const change = yes ? { added: [{ box, label, origin: "accepted" as const }] } : { rejected: [{ box, label }] };
    void labels.act([{ photo, what, ...change }]);
  }
}

/** Whether a region is what a box holds already, or a part of that. */
function isLabelled({ photo, box }: Region): boolean {
  return labels.of(photo)?.boxes.some((other) => overlap(other.box, box) >= 0.5 || covered(box, other.box) >= 0.85) ?? false;
}

/** What looks like the box that was drawn or asked about last, on the screen where one labels. */
export const similar = new Similar(60);
