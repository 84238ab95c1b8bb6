import { describe, expect, it } from "vitest";
import type { Box, Detection, Results } from "../server/types";
import { countAt, histogram, isDoubtful, isShown, scoresOf } from "./counting";

const found = (score: number, state: Detection["state"] = "new", label = "cat"): Detection => ({ box: [0, 0, 1, 1] as Box, label, score, state });

const RESULTS: Results = {
  model: null,
  classes: ["cat", "dog"],
  thresholds: {},
  photos: { a: [found(0.9), found(0.5), found(0.2), found(0.1, "accepted")], b: [found(0.95, "rejected"), found(0.6, "new", "dog")] },
};

describe("counting", () => {
  it.each([0, 0.2, 0.21, 0.5, 0.51, 0.95, 1])("agrees with what is shown at %f", (threshold) => {
    const thresholds = { cat: threshold, dog: threshold };
    for (const label of RESULTS.classes) {
      const shown = Object.values(RESULTS.photos).flat().filter((one) => one.label === label && isShown(one, thresholds));
      expect(countAt(scoresOf(RESULTS).get(label)!, threshold)).toBe(shown.length);
    }
  });

  it("shows what was accepted at any threshold, and what was rejected at none", () => {
    expect(isShown(found(0.1, "accepted"), { cat: 0.9 })).toBe(true);
    expect(isShown(found(0.99, "rejected"), { cat: 0.1 })).toBe(false);
  });

  it("doubts what is just below the threshold only", () => {
    const doubted = [0.2, 0.31, 0.49, 0.5, 0.9].filter((score) => isDoubtful(found(score), { cat: 0.5 }));
    expect(doubted).toEqual([0.31, 0.49]);
    expect(isDoubtful(found(0.4, "rejected"), { cat: 0.5 })).toBe(false);
  });

  it("draws the fullest step at full height, a score of 1 in the last", () => {
    expect(histogram({ sorted: Float64Array.from([0.1, 0.15, 1]), accepted: 0 }, 4)).toEqual([1, 0, 0, 0.5]);
  });
});
