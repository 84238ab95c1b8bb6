import { describe, expect, it } from "vitest";
import type { Box } from "../server/types";
import { between, clip, covered, framed, handleAt, isDrawn, moved, nudged, overlap, resized, smallestAt } from "./boxes";

const PHOTO = { width: 100, height: 80 };

describe("boxes", () => {
  it("is drawn from any corner", () => {
    expect(between({ x: 9, y: 2 }, { x: 3, y: 7 })).toEqual([3, 2, 9, 7]);
  });

  it("stays within the photo, its size kept when moved", () => {
    expect(moved([10, 10, 30, 40], -50, 100, PHOTO)).toEqual([0, 50, 20, 80]);
    expect(clip([-5, 70, 120, 95], PHOTO)).toEqual([0, 70, 100, 80]);
  });

  it("turns over when a corner is dragged past the other", () => {
    expect(resized([10, 10, 30, 40], "se", -25, 0, PHOTO)).toEqual([5, 10, 10, 40]);
    expect(resized([10, 10, 30, 40], "n", 7, -4, PHOTO)).toEqual([10, 6, 30, 40]);
  });

  it("follows the arrows, and never vanishes", () => {
    const arrow = (key: string, more = {}) => ({ key, shiftKey: false, altKey: false, ...more });
    expect(nudged([10, 10, 30, 40], arrow("ArrowLeft"), PHOTO)).toEqual([9, 10, 29, 40]);
    expect(nudged([10, 10, 30, 40], arrow("ArrowDown", { shiftKey: true }), PHOTO)).toEqual([10, 20, 30, 50]);
    expect(nudged([10, 10, 30, 40], arrow("ArrowRight", { altKey: true }), PHOTO)).toEqual([10, 10, 31, 40]);
    expect(nudged([10, 10, 14, 40], arrow("ArrowLeft", { altKey: true }), PHOTO)).toEqual([10, 10, 14, 40]);
    expect(nudged([10, 10, 30, 40], arrow("b"), PHOTO)).toBe(null);
  });

  it("overlaps as shared over joined area", () => {
    expect(overlap([0, 0, 10, 10], [5, 0, 15, 10])).toBeCloseTo(1 / 3);
    expect(overlap([0, 0, 10, 10], [10, 0, 20, 10])).toBe(0);
  });

  it("is covered as far as the other reaches", () => {
    expect(covered([0, 0, 10, 10], [5, 0, 50, 50])).toBe(0.5);
    expect(covered([20, 20, 30, 30], [0, 0, 50, 50])).toBe(1);
    expect(covered([0, 0, 10, 10], [10, 0, 20, 10])).toBe(0);
  });

  it("picks the smallest box under the point", () => {
    const boxes: Box[] = [
      [0, 0, 50, 50],
      [10, 10, 20, 20],
      [60, 60, 70, 70],
    ];
    expect(smallestAt(boxes, { x: 15, y: 15 })).toBe(1);
    expect(smallestAt(boxes, { x: 40, y: 40 })).toBe(0);
    expect(smallestAt(boxes, { x: 90, y: 5 })).toBe(-1);
  });

  it("finds corners before sides", () => {
    expect(handleAt([10, 10, 14, 40], { x: 13, y: 10 }, 3)).toBe("ne");
    expect(handleAt([10, 10, 60, 40], { x: 35, y: 11 }, 3)).toBe("n");
    expect(handleAt([10, 10, 60, 40], { x: 35, y: 25 }, 3)).toBeNull();
  });

  it("takes no click for a box", () => {
    expect(isDrawn([10, 10, 12, 40])).toBe(false);
    expect(isDrawn([10, 10, 15, 40])).toBe(true);
  });

  it("frames a box at the edge without leaving the photo", () => {
    expect(framed([0, 0, 20, 10], 0.5, PHOTO)).toEqual([0, 0, 30, 30]);
    expect(framed([0, 0, 100, 80], 0, PHOTO)).toEqual([0, -10, 100, 90]);
  });
});
