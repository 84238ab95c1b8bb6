import { describe, expect, it } from "vitest";
import type { Box, PhotoBoxes } from "../server/types";
import { applied, History, inverse, type Change } from "./changes";

const EMPTY: PhotoBoxes = { revision: 3, boxes: [], rejected: [], reviewed: false };
const one = { box: [0, 0, 10, 10] as Box, label: "cat", origin: "drawn" as const };
const other = { box: [20, 0, 30, 10] as Box, label: "cat", origin: "drawn" as const };

describe("changes", () => {
  it("are undone whatever was done in between", () => {
    const add: Change = { photo: "a", what: "cat", added: [one] };
    const two = applied(applied(EMPTY, add), { photo: "a", what: "cat", added: [other] });
    expect(applied(two, inverse(add)).boxes).toEqual([other]);
  });

  it("move a box, and back", () => {
    const start = applied(EMPTY, { photo: "a", what: "cat", added: [one] });
    const move: Change = { photo: "a", what: "cat", removed: [one], added: [other] };
    const after = applied(start, move);
    expect(after.boxes).toEqual([other]);
    expect(applied(after, inverse(move)).boxes).toEqual([one]);
  });

  it("reject, and look through, and back", () => {
    const change: Change = { photo: "a", what: "no", rejected: [{ box: one.box, label: "cat" }], reviewed: true };
    const after = applied(EMPTY, change);
    expect([after.rejected.length, after.reviewed]).toEqual([1, true]);
    expect(applied(after, inverse(change))).toEqual(EMPTY);
  });

  it("add nothing twice", () => {
    const add: Change = { photo: "a", what: "cat", added: [one] };
    expect(applied(applied(EMPTY, add), add).boxes).toHaveLength(1);
  });
});

describe("History", () => {
  it("undoes a step of many changes at once, last first, and does it again", () => {
    const history = new History();
    const step: Change[] = [
      { photo: "a", what: "x", added: [one] },
      { photo: "b", what: "x", added: [other] },
    ];
    history.record(step);
    expect(history.undo().map(({ photo }) => photo)).toEqual(["b", "a"]);
    expect(history.canUndo).toBe(false);
    expect(history.redo()).toEqual(step);
  });

  it("forgets what was undone once something else is done", () => {
    const history = new History();
    history.record([{ photo: "a", what: "x", added: [one] }]);
    history.undo();
    history.record([{ photo: "b", what: "x", added: [one] }]);
    expect(history.redo()).toEqual([]);
  });
});
