import { describe, expect, it } from "vitest";
import type { Box, LabelledBox, PhotoBoxes } from "../server/types";
import { merged } from "./merge";

const box = (x: number, label = "cat"): LabelledBox => ({ box: [x, 0, x + 10, 10] as Box, label, origin: "drawn" });

const boxes = (revision: number, ...items: LabelledBox[]): PhotoBoxes => ({ revision, boxes: items, rejected: [], reviewed: false });

const places = ({ boxes }: PhotoBoxes) => boxes.map(({ box }) => box[0]).sort((a, b) => a - b);

describe("merged", () => {
  it("keeps what both tabs drew", () => {
    const both = merged(boxes(1, box(0)), boxes(1, box(0), box(20)), boxes(2, box(0), box(40)));
    expect(places(both)).toEqual([0, 20, 40]);
    expect(both.revision).toBe(2);
  });

  it("leaves out what either tab removed", () => {
    expect(places(merged(boxes(1, box(0), box(20), box(40)), boxes(1, box(20), box(40)), boxes(2, box(0), box(20))))).toEqual([20]);
  });

  it("adds what both drew alike only once", () => {
    expect(places(merged(boxes(1), boxes(1, box(0)), boxes(2, box(0))))).toEqual([0]);
  });

  it("takes a change of class for another box", () => {
    const renamed = merged(boxes(1, box(0)), boxes(1, box(0, "dog")), boxes(2, box(0), box(20)));
    expect(renamed.boxes.map(({ label }) => label).sort()).toEqual(["cat", "dog"]);
  });

  it("takes over who looked the photo through", () => {
    const base = boxes(1);
    expect(merged(base, { ...base, reviewed: true }, boxes(2)).reviewed).toBe(true);
    expect(merged(base, base, { ...boxes(2), reviewed: true }).reviewed).toBe(true);
  });
});
