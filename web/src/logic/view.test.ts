import { describe, expect, it } from "vitest";
import { fitted, panned, toCanvas, toPhoto, zoomed } from "./view";

const PHOTO = { width: 1000, height: 500 };
const CANVAS = { width: 500, height: 500 };

describe("view", () => {
  it("shows the whole photo in the middle", () => {
    expect(fitted(PHOTO, CANVAS)).toEqual({ scale: 0.5, x: 0, y: 125 });
  });

  it("keeps the point under the pointer where it is", () => {
    const before = fitted(PHOTO, CANVAS);
    const at = { x: 200, y: 240 };
    const after = zoomed(before, 4, at, PHOTO, CANVAS);
    expect(after.scale).toBe(2);
    const [was, is] = [toPhoto(before, at), toPhoto(after, at)];
    expect(is.x).toBeCloseTo(was.x);
    expect(is.y).toBeCloseTo(was.y);
  });

  it("never loses the photo out of the canvas", () => {
    const view = zoomed(fitted(PHOTO, CANVAS), 4, { x: 0, y: 0 }, PHOTO, CANVAS);
    expect(panned(view, 9999, -9999, PHOTO, CANVAS)).toEqual({ scale: 2, x: 0, y: -500 });
  });

  it("is never smaller than the whole photo", () => {
    const whole = fitted(PHOTO, CANVAS);
    expect(zoomed(whole, 0.1, { x: 30, y: 30 }, PHOTO, CANVAS)).toEqual(whole);
  });

  it("takes boxes to the canvas and points back", () => {
    const view = { scale: 2, x: 10, y: -20 };
    const [x1, y1] = toCanvas(view, [5, 30, 8, 40]);
    expect(toPhoto(view, { x: x1, y: y1 })).toEqual({ x: 5, y: 30 });
  });
});
