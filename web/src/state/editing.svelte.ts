import { overlap, sameLabelled } from "../logic/boxes";
import type { Change } from "../logic/changes";
import { isDoubtful, isShown, thresholdOf } from "../logic/counting";
import { keyOf, type Item } from "../logic/items";
import type { Box, LabelledBox, Photo } from "../server/types";
import { labels } from "./labels.svelte";
import { found } from "./results.svelte";
import { session } from "./session.svelte";
import { similar } from "./similar.svelte";

/** Everything to see on a photo, what is picked out of it, and what can be done to that. */
export class Editing {
  chosen = $state<string | null>(null);
  /** A box that was drawn before there was a class for it. */
  pending = $state.raw<Box | null>(null);

  constructor(private readonly photo: () => Photo | undefined) {}

  readonly boxes = $derived.by(() => labels.of(this.photo()?.id ?? "")?.boxes ?? []);
  readonly items = $derived.by(() => this.gathered());
  readonly item = $derived(this.items.find((item) => keyOf(item) === this.chosen) ?? null);

  private gathered(): Item[] {
    const id = this.photo()?.id ?? "";
    const isDone = (box: Box, label?: string) => this.boxes.some((other) => (!label || other.label === label) && overlap(other.box, box) >= 0.5);
    const settled = this.boxes.map((box): Item => ({ kind: "box", box: box.box, label: box.label, colour: session.colourOf(box.label) }));
    const open = found
      .all(id)
      .filter((one) => one.state === "new" && (isShown(one, found.thresholds) || isDoubtful(one, found.thresholds)) && !isDone(one.box, one.label))
      .map(({ box, label, score }): Item => {
        const doubtful = score < thresholdOf(found.thresholds, label);
        return { kind: "found", box, label, score, doubtful, colour: session.colourOf(label) };
      });
    const label = similar.query?.label ?? "similar";
    const hits = similar.open
      .filter((region) => region.photo === id)
      .map(({ box, score }): Item => ({ kind: "hit", box, label, score, colour: session.colourOf(label) }));
    return [...new Map([...settled, ...hits, ...open].map((item) => [keyOf(item), item])).values()];
  }

  choose(key: string | null): void {
    this.chosen = key;
  }

  /** Picks the next item, or the one before; what waits for an answer comes before what is settled. */
  step(by: number): void {
    const order = [...this.items].sort((a, b) => Number(a.kind === "box") - Number(b.kind === "box"));
    if (!order.length) return;
    const place = order.findIndex((item) => keyOf(item) === this.chosen);
    const next = place < 0 ? (by > 0 ? 0 : order.length - 1) : (place + by + order.length) % order.length;
    this.chosen = keyOf(order[next]!);
  }

  /** Adds the box; before there is a class, keeps it until `name` is called. */
  async draw(box: Box): Promise<void> {
    const label = session.current;
    if (!label) this.pending = box;
    else await this.add({ box, label, origin: "drawn" });
  }

  async name(label: string): Promise<void> {
    const box = this.pending;
    this.pending = null;
    await labels.during(async () => {
      await session.choose(label);
      if (box) await this.add({ box, label, origin: "drawn" });
    });
  }

  private async add(box: LabelledBox): Promise<void> {
    const id = this.photo()!.id;
    await this.do({ what: box.label, added: [box] });
    this.chosen = keyOf({ kind: "box", ...box });
    void similar.ask({ photo: id, box: box.box, label: box.label });
  }

  /** Moves an item or gives it another class: what the model found, corrected, is a box like any other. */
  async change(item: Item, box: Box, label = item.label): Promise<void> {
    const was = this.boxOf(item);
    const made: LabelledBox = { box, label, origin: item.kind === "box" ? (was?.origin ?? "drawn") : "corrected" };
    const isFar = item.kind === "found" && (overlap(item.box, box) < 0.5 || item.label !== label);
    const rejected = isFar ? [{ box: item.box, label: item.label }] : undefined;
    await this.do({ what: label, added: [made], removed: was ? [was] : undefined, rejected });
    this.chosen = keyOf({ kind: "box", box, label });
  }

  /** Yes: what was found or looks alike becomes a box. */
  async accept(item: Item): Promise<void> {
    if (item.kind === "box") return;
    const label = item.kind === "hit" ? (similar.query?.label ?? session.current ?? item.label) : item.label;
    await this.leave(item, () => this.do({ what: label, added: [{ box: item.box, label, origin: "accepted" }] }));
  }

  /** No: a box goes, and what was found or looks alike never comes back. */
  async remove(item: Item): Promise<void> {
    const was = this.boxOf(item);
    const { box, label } = item;
    await this.leave(item, () => this.do(was ? { what: `${label} removed`, removed: [was] } : { what: `not ${label}`, rejected: [{ box, label }] }));
    if (item.kind === "hit") similar.forget(this.photo()!.id, box);
  }

  /** Everything above the threshold is right: it becomes boxes, and the photo counts as looked through. */
  async approve(): Promise<void> {
    const open = this.items.filter(({ kind, doubtful }) => kind === "found" && !doubtful);
    const added = open.map(({ box, label }): LabelledBox => ({ box, label, origin: "accepted" }));
    await this.do({ what: "photo looked through", added, reviewed: true });
  }

  private boxOf({ kind, box, label }: Item): LabelledBox | undefined {
    return kind === "box" ? this.boxes.find((other) => sameLabelled(other, { box, label })) : undefined;
  }

  /** Does something to an item, and picks the next one that waits for an answer. */
  private async leave(item: Item, act: () => Promise<void>): Promise<void> {
    const waiting = this.items.filter(({ kind }) => kind === item.kind);
    const place = waiting.findIndex((other) => keyOf(other) === keyOf(item));
    const next = item.kind === "box" ? undefined : (waiting[place + 1] ?? waiting[place - 1]);
    await act();
    this.chosen = next ? keyOf(next) : null;
  }

  private async do(change: Omit<Change, "photo">): Promise<void> {
    await labels.act([{ photo: this.photo()!.id, ...change }]);
  }
}
