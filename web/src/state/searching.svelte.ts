import { SvelteSet } from "svelte/reactivity";
import type { Box, Region } from "../server/types";
import { labels } from "./labels.svelte";
import { session } from "./session.svelte";
import { Similar } from "./similar.svelte";

const FIRST = 10;

/** What was looked for on the search screen, and which of the regions are chosen: the best so many, give or take some. */
class Searching {
  readonly similar = new Similar(100);
  best = $state(0);
  private readonly turned = new SvelteSet<number>();

  readonly chosen = $derived(this.similar.regions.filter((_, index) => this.has(index)));

  async ask(photo: string, box: Box): Promise<void> {
    this.turned.clear();
    await this.similar.ask({ photo, box, label: null });
    this.best = Math.min(FIRST, this.similar.regions.length);
  }

  has(index: number): boolean {
    return index < this.best !== this.turned.has(index);
  }

  toggle(index: number): void {
    if (!this.turned.delete(index)) this.turned.add(index);
  }

  takeBest(count: number): void {
    this.best = count;
    this.turned.clear();
  }

  /** Makes boxes of the class of what was chosen, and of what was drawn; returns how many. */
  async make(label: string): Promise<number> {
    const query = this.similar.query;
    if (!query) return 0;
    await session.choose(label);
    const regions: Region[] = [{ ...query, score: 1 }, ...this.chosen];
    const boxOf = ({ box }: Region, place: number) => ({ box, label, origin: place ? ("accepted" as const) : ("drawn" as const) });
    await labels.act(regions.map((region, place) => ({ photo: region.photo, what: `${regions.length} boxes of ${label}`, added: [boxOf(region, place)] })));
    return regions.length;
  }
}

export const searching = new Searching();
