import type { Box, Labelled } from "../server/types";

export interface Point {
  x: number;
  y: number;
}

export interface Size {
  width: number;
  height: number;
}

/** The compass point of the corner or side that is dragged. */
export type Handle = "nw" | "n" | "ne" | "e" | "se" | "s" | "sw" | "w";

export const HANDLES: readonly Handle[] = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];

export const SMALLEST = 4;

export const width = (box: Box) => box[2] - box[0];

export const height = (box: Box) => box[3] - box[1];

export const area = (box: Box) => width(box) * height(box);

export function between(a: Point, b: Point): Box {
  return [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.max(a.x, b.x), Math.max(a.y, b.y)];
}

export function clip(box: Box, { width, height }: Size): Box {
  const inside = (value: number, most: number) => Math.min(Math.max(value, 0), most);
  return [inside(box[0], width), inside(box[1], height), inside(box[2], width), inside(box[3], height)];
}

/** Moves the box by (dx, dy) as far as the photo allows, its size kept. */
export function moved(box: Box, dx: number, dy: number, photo: Size): Box {
  const x = Math.min(Math.max(dx, -box[0]), photo.width - box[2]);
  const y = Math.min(Math.max(dy, -box[1]), photo.height - box[3]);
  return [box[0] + x, box[1] + y, box[2] + x, box[3] + y];
}

/** Moves one corner or side by (dx, dy); dragged past the other side, the box turns over. */
export function resized(box: Box, handle: Handle, dx: number, dy: number, photo: Size): Box {
  const [x1, y1, x2, y2] = box;
  const west = handle.includes("w") ? x1 + dx : x1;
  const east = handle.includes("e") ? x2 + dx : x2;
  const north = handle.includes("n") ? y1 + dy : y1;
  const south = handle.includes("s") ? y2 + dy : y2;
  return clip(between({ x: west, y: north }, { x: east, y: south }), photo);
}

const STEPS: Record<string, [number, number]> = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const FAST = 10;

type Arrow = Pick<KeyboardEvent, "key" | "shiftKey" | "altKey">;

/** What an arrow makes of a box: moved by a pixel, by ten with Shift, its lower right corner alone with Alt; null for other keys. */
export function nudged(box: Box, { key, shiftKey, altKey }: Arrow, photo: Size): Box | null {
  const step = STEPS[key];
  if (!step) return null;
  const [dx, dy] = step.map((pixels) => pixels * (shiftKey ? FAST : 1)) as [number, number];
  const next = rounded(altKey ? resized(box, "se", dx, dy, photo) : moved(box, dx, dy, photo));
  return isDrawn(next) ? next : box;
}

export const isDrawn = (box: Box) => width(box) >= SMALLEST && height(box) >= SMALLEST;

export function rounded(box: Box): Box {
  return box.map((value) => Math.round(value * 10) / 10) as Box;
}

function sharedArea(a: Box, b: Box): number {
  const shared: Box = [Math.max(a[0], b[0]), Math.max(a[1], b[1]), Math.min(a[2], b[2]), Math.min(a[3], b[3])];
  return width(shared) > 0 && height(shared) > 0 ? area(shared) : 0;
}

export function overlap(a: Box, b: Box): number {
  const shared = sharedArea(a, b);
  return shared && shared / (area(a) + area(b) - shared);
}

/** The share of a box that another covers. */
export const covered = (box: Box, by: Box) => sharedArea(box, by) / area(box);

export const same = (a: Box, b: Box) => a.every((value, place) => Math.abs(value - b[place]!) < 0.06);

export const sameLabelled = (a: Labelled, b: Labelled) => a.label === b.label && same(a.box, b.box);

const contains = (box: Box, { x, y }: Point) => x >= box[0] && x < box[2] && y >= box[1] && y < box[3];

/** The index of the smallest box under the point, -1 where there is none: a face wins over the body around it. */
export function smallestAt(boxes: readonly Box[], point: Point): number {
  let best = -1;
  boxes.forEach((box, index) => {
    if (contains(box, point) && (best < 0 || area(box) < area(boxes[best]!))) best = index;
  });
  return best;
}

export function placeOf(box: Box, handle: Handle): Point {
  const x = handle.includes("w") ? box[0] : handle.includes("e") ? box[2] : (box[0] + box[2]) / 2;
  const y = handle.includes("n") ? box[1] : handle.includes("s") ? box[3] : (box[1] + box[3]) / 2;
  return { x, y };
}

/** The nearest handle within `reach` of the point; corners come before sides, which a small box would hide. */
export function handleAt(box: Box, point: Point, reach: number): Handle | null {
  const distance = (handle: Handle) => {
    const place = placeOf(box, handle);
    return Math.hypot(place.x - point.x, place.y - point.y);
  };
  const near = HANDLES.filter((handle) => distance(handle) <= reach);
  near.sort((a, b) => b.length - a.length || distance(a) - distance(b));
  return near[0] ?? null;
}

/** The square with `share` of the box's size around it, inside the photo as far as it fits: what a crop shows. */
export function framed(box: Box, share: number, photo: Size): Box {
  const side = Math.max(width(box), height(box)) * (1 + share);
  const along = (from: number, to: number, room: number) => {
    const first = (from + to - side) / 2;
    return side < room ? Math.min(Math.max(first, 0), room - side) : (room - side) / 2;
  };
  const [x, y] = [along(box[0], box[2], photo.width), along(box[1], box[3], photo.height)];
  return [x, y, x + side, y + side];
}
