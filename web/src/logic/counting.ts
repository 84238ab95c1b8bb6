import type { Detection, Results } from "../server/types";

export const THRESHOLD = 0.5;
const DOUBT = 0.6;

export const thresholdOf = (thresholds: Record<string, number>, label: string) => thresholds[label] ?? THRESHOLD;

export function isShown(found: Detection, thresholds: Record<string, number>): boolean {
  if (found.state === "accepted") return true;
  return found.state === "new" && found.score >= thresholdOf(thresholds, found.label);
}

/** Whether a detection is just below its threshold, so that an answer to it teaches most. */
export function isDoubtful(found: Detection, thresholds: Record<string, number>): boolean {
  const threshold = thresholdOf(thresholds, found.label);
  return found.state === "new" && found.score < threshold && found.score >= DOUBT * threshold;
}

/** The scores of one class, sorted, and what holds at any threshold: a slider's counts cost a binary search. */
export interface Scores {
  sorted: Float64Array;
  accepted: number;
}

export function scoresOf(results: Results): Map<string, Scores> {
  const gathered = new Map<string, { scores: number[]; accepted: number }>();
  for (const label of results.classes) gathered.set(label, { scores: [], accepted: 0 });
  for (const found of Object.values(results.photos).flat()) {
    const entry = gathered.get(found.label);
    if (entry && found.state === "new") entry.scores.push(found.score);
    if (entry && found.state === "accepted") entry.accepted += 1;
  }
  return new Map([...gathered].map(([label, { scores, accepted }]) => [label, { sorted: Float64Array.from(scores).sort(), accepted }]));
}

export function countAt(scores: Scores, threshold: number): number {
  return scores.accepted + scores.sorted.length - firstFrom(scores.sorted, threshold);
}

function firstFrom(sorted: Float64Array, value: number): number {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle]! < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** How many scores lie in each of `bins` equal steps from 0 to 1, as shares of the fullest step. */
export function histogram(scores: Scores, bins: number): number[] {
  const counts = new Array<number>(bins).fill(0);
  for (const score of scores.sorted) counts[Math.min(Math.floor(score * bins), bins - 1)]! += 1;
  const most = Math.max(...counts, 1);
  return counts.map((count) => count / most);
}
