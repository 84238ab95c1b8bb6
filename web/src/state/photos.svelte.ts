import { SvelteMap } from "svelte/reactivity";
import * as api from "../server/api";
import type { Change, Photo } from "../server/types";
import { session } from "./session.svelte";
import { complain } from "./toasts.svelte";

const PAGE = 200;
const PAUSE = 700;

/** Every photo that the server told of, newest word of each. */
export const known = new SvelteMap<string, Photo>();
const asked = new Set<string>();

/** The photo of that id, undefined until the server has told of it. */
export function photoOf(id: string): Photo | undefined {
  const photo = known.get(id);
  if (!photo && !asked.has(id)) void learn(id);
  return photo;
}

export async function learn(id: string): Promise<void> {
  asked.add(id);
  try {
    known.set(id, await api.photo(id));
  } catch (error) {
    complain(error);
  }
}

/** The photos of one query, in its order: only the pages that someone looks at are loaded. */
export class PhotoList {
  total = $state(0);
  loaded = $state(false);
  query = $state.raw<api.PhotoQuery>({ order: "name", show: "all", text: "" });
  private ids = new SvelteMap<number, string>();
  private places = new SvelteMap<string, number>();
  private fresh = new Set<number>();
  private looked: [number, number] = [0, 1];
  private round = 0;
  private timer: ReturnType<typeof setTimeout> | undefined;

  constructor(query: Partial<api.PhotoQuery> = {}) {
    this.query = { ...this.query, ...query };
    void this.need(0, 1);
  }

  /** Keeps the list fresh until the returned function is called. */
  follow(): () => void {
    return session.on((change) => this.hear(change));
  }

  ask(query: Partial<api.PhotoQuery>): void {
    this.query = { ...this.query, ...query };
    this.round += 1;
    this.ids.clear();
    this.places.clear();
    this.fresh.clear();
    this.loaded = false;
    void this.need(0, 1);
  }

  at(index: number): Photo | undefined {
    const id = this.ids.get(index);
    return id === undefined ? undefined : known.get(id);
  }

  idAt(index: number): string | undefined {
    return this.ids.get(index);
  }

  /** The place of a photo, -1 while its page is not loaded. */
  indexOf(id: string | null): number {
    const place = id === null ? undefined : this.places.get(id);
    return place !== undefined && this.ids.get(place) === id ? place : -1;
  }

  /** Loads page after page until the photo's place is known. */
  async find(id: string): Promise<void> {
    const round = this.round;
    await this.need(0, 1);
    for (let first = 0; first < this.total && this.indexOf(id) < 0 && round === this.round; first += PAGE) {
      if (!this.fresh.has(first / PAGE)) await this.load(first / PAGE);
    }
  }

  /** Loads what is missing of the photos from `first` to `last` (exclusive). */
  async need(first: number, last: number): Promise<void> {
    this.looked = [first, last];
    const pages = [];
    for (let page = Math.floor(first / PAGE); page * PAGE < Math.max(last, 1); page += 1) pages.push(page);
    await Promise.all(pages.filter((page) => !this.fresh.has(page)).map((page) => this.load(page)));
  }

  refresh(): void {
    this.timer ??= setTimeout(() => {
      this.timer = undefined;
      this.fresh.clear();
      void this.need(...this.looked);
    }, PAUSE);
  }

  private async load(page: number): Promise<void> {
    const round = this.round;
    this.fresh.add(page);
    try {
      const { total, photos } = await api.photos(this.query, page * PAGE, PAGE);
      if (round === this.round) this.take(page, total, photos);
    } catch (error) {
      this.fresh.delete(page);
      if (session.connected) complain(error);
    }
  }

  private take(page: number, total: number, photos: Photo[]): void {
    for (let index = total; index < this.total; index += 1) this.ids.delete(index);
    this.total = total;
    this.loaded = true;
    photos.forEach((photo, place) => {
      known.set(photo.id, photo);
      this.ids.set(page * PAGE + place, photo.id);
      this.places.set(photo.id, page * PAGE + place);
    });
  }

  private hear(change: Change | null): void {
    if (change?.what === "classes" || (change?.what === "fit" && change.fit?.state === "running")) return;
    if (change?.what === "boxes" && change.photo && this.query.show === "all") void learn(change.photo);
    else this.refresh();
  }
}

/** All photos by name: what the film strips show. */
export const everything = new PhotoList();
