import type { Box } from "../server/types";
import type { Point, Size } from "./boxes";

/** How the photo lies in the canvas: pixels of the canvas = pixels of the photo * scale + offset. */
export interface View {
  scale: number;
  x: number;
  y: number;
}

const LARGEST = 16;

export function fitted(photo: Size, canvas: Size, margin = 0): View {
  const scale = Math.min((canvas.width - 2 * margin) / photo.width, (canvas.height - 2 * margin) / photo.height);
  const safe = scale > 0 && Number.isFinite(scale) ? scale : 1;
  return { scale: safe, x: (canvas.width - photo.width * safe) / 2, y: (canvas.height - photo.height * safe) / 2 };
}

/** Zooms about a point of the canvas, which stays where it is; never smaller than the whole photo. */
export function zoomed(view: View, factor: number, at: Point, photo: Size, canvas: Size, margin = 0): View {
  const least = fitted(photo, canvas, margin).scale;
  const scale = Math.min(Math.max(view.scale * factor, least), Math.max(LARGEST, least));
  const grown = scale / view.scale;
  return kept({ scale, x: at.x - (at.x - view.x) * grown, y: at.y - (at.y - view.y) * grown }, photo, canvas, margin);
}

export function panned(view: View, dx: number, dy: number, photo: Size, canvas: Size, margin = 0): View {
  return kept({ ...view, x: view.x + dx, y: view.y + dy }, photo, canvas, margin);
}

/** The view whose photo is centred along a side where it fits, and covers the canvas along one where it does not. */
function kept(view: View, photo: Size, canvas: Size, margin: number): View {
  const along = (offset: number, length: number, room: number) =>
    length <= room - 2 * margin ? (room - length) / 2 : Math.min(Math.max(offset, room - margin - length), margin);
  return {
    scale: view.scale,
    x: along(view.x, photo.width * view.scale, canvas.width),
    y: along(view.y, photo.height * view.scale, canvas.height),
  };
}

export const toPhoto = (view: View, { x, y }: Point): Point => ({ x: (x - view.x) / view.scale, y: (y - view.y) / view.scale });

export function toCanvas(view: View, [x1, y1, x2, y2]: Box): Box {
  const { scale, x, y } = view;
  return [x1 * scale + x, y1 * scale + y, x2 * scale + x, y2 * scale + y];
}
