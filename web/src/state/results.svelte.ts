import * as api from "../server/api";
import { countAt, isShown, scoresOf, thresholdOf } from "../logic/counting";
import type { Detection, Results } from "../server/types";
import { session } from "./session.svelte";
import { complain } from "./toasts.svelte";

const PAUSE = 400;

const NOTHING: Results = { model: null, classes: [], thresholds: {}, photos: {} };

/** What the model found on all photos, down to a low probability: thresholds filter it here, without the server. */
class Found {
  value = $state.raw<Results>(NOTHING);
  thresholds = $state.raw<Record<string, number>>({});
  loaded = $state(false);
  private timer: ReturnType<typeof setTimeout> | undefined;
  private saver: ReturnType<typeof setTimeout> | undefined;

  readonly scores = $derived(scoresOf(this.value));
  readonly counts = $derived(
    this.value.classes.map((label) => ({ label, count: countAt(this.scores.get(label)!, thresholdOf(this.thresholds, label)) })),
  );
  readonly total = $derived(this.counts.reduce((sum, { count }) => sum + count, 0));

  start(): void {
    void this.load();
    session.on((change) => {
      if (!change || change.what === "results" || change.what === "boxes" || change.fit?.state === "done") this.soon();
    });
  }

  /** What is shown of a photo at the present thresholds. */
  on(photo: string): Detection[] {
    return this.all(photo).filter((found) => isShown(found, this.thresholds));
  }

  all(photo: string): Detection[] {
    return this.value.photos[photo] ?? [];
  }

  /** Sets a threshold here at once; the server hears of it when the slider rests. */
  set(label: string, threshold: number): void {
    this.thresholds = { ...this.thresholds, [label]: threshold };
    clearTimeout(this.saver);
    this.saver = setTimeout(() => void this.save(), PAUSE);
  }

  private async save(): Promise<void> {
    await api.setThresholds({ ...this.thresholds }).catch(complain);
    this.saver = undefined;
  }

  private soon(): void {
    this.timer ??= setTimeout(() => {
      this.timer = undefined;
      void this.load();
    }, PAUSE);
  }

  private async load(): Promise<void> {
    try {
      this.value = await api.results();
      if (this.saver === undefined) this.thresholds = { ...this.value.thresholds };
    } catch (error) {
      if (session.connected && !session.locked) complain(error);
    }
    this.loaded = true;
  }
}

export const found = new Found();
