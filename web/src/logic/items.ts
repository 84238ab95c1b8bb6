import type { Box } from "../server/types";

/** Something on the canvas: a box that is settled, one that the model found, or a region like the one drawn. */
export interface Item {
  kind: "box" | "found" | "hit";
  box: Box;
  label: string;
  score?: number;
  /** Whether its score is below the threshold. */
  doubtful?: boolean;
  colour: string;
}

/** Tells items apart; an item that was moved or named anew is another. */
export const keyOf = ({ kind, box, label }: Pick<Item, "kind" | "box" | "label">) => `${kind} ${label} ${box.map((value) => value.toFixed(1)).join(" ")}`;
