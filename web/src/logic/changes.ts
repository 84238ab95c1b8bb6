import type { Labelled, LabelledBox, PhotoBoxes } from "../server/types";
import { sameLabelled } from "./boxes";

/** One thing a person did to the boxes of a photo. Undoing it adds what it removed and removes what it added. */
export interface Change {
  photo: string;
  what: string;
  added?: LabelledBox[];
  removed?: LabelledBox[];
  rejected?: Labelled[];
  spared?: Labelled[];
  reviewed?: boolean;
}

const holds = (items: readonly Labelled[], item: Labelled) => items.some((other) => sameLabelled(item, other));

function changed<Item extends Labelled>(items: readonly Item[], removed: readonly Labelled[] = [], added: readonly Item[] = []): Item[] {
  const kept = items.filter((item) => !holds(removed, item));
  return [...kept, ...added.filter((item) => !holds(kept, item))];
}

export function applied(boxes: PhotoBoxes, change: Change): PhotoBoxes {
  return {
    revision: boxes.revision,
    boxes: changed(boxes.boxes, change.removed, change.added),
    rejected: changed(boxes.rejected, change.spared, change.rejected),
    reviewed: change.reviewed ?? boxes.reviewed,
  };
}

export function inverse(change: Change): Change {
  return {
    photo: change.photo,
    what: change.what,
    added: change.removed,
    removed: change.added,
    rejected: change.spared,
    spared: change.rejected,
    reviewed: change.reviewed === undefined ? undefined : !change.reviewed,
  };
}

/** Steps that were done and undone; each step is the changes that one press of a key or button made. */
export class History {
  private done: Change[][] = [];
  private undone: Change[][] = [];

  record(step: Change[]): void {
    this.done = [...this.done.slice(-199), step];
    this.undone = [];
  }

  undo(): Change[] {
    const step = this.done.pop();
    if (!step) return [];
    this.undone.push(step);
    return step.map(inverse).reverse();
  }

  redo(): Change[] {
    const step = this.undone.pop();
    if (!step) return [];
    this.done.push(step);
    return step;
  }

  get canUndo(): boolean {
    return this.done.length > 0;
  }

  get canRedo(): boolean {
    return this.undone.length > 0;
  }
}
