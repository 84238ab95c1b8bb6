import type { Labelled, LabelledBox, PhotoBoxes } from "../server/types";
import { sameLabelled } from "./boxes";

const without = <Item extends Labelled>(items: readonly Item[], others: readonly Labelled[]) =>
  items.filter((item) => !others.some((other) => sameLabelled(item, other)));

/** What `mine` did to `base`, done to `theirs`: two tabs draw on one photo, and no box is lost. */
function mergedItems<Item extends Labelled>(base: readonly Item[], mine: readonly Item[], theirs: readonly Item[]): Item[] {
  const removed = without(base, mine);
  const added = without(without(mine, base), theirs);
  return [...without(theirs, removed), ...added];
}

export function merged(base: PhotoBoxes, mine: PhotoBoxes, theirs: PhotoBoxes): PhotoBoxes {
  return {
    revision: theirs.revision,
    boxes: mergedItems<LabelledBox>(base.boxes, mine.boxes, theirs.boxes),
    rejected: mergedItems<Labelled>(base.rejected, mine.rejected, theirs.rejected),
    reviewed: mine.reviewed === base.reviewed ? theirs.reviewed : mine.reviewed,
  };
}
