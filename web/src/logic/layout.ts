/** Equal cells in rows: which of them a window onto the grid shows, and how high all of them are. */
export interface Grid {
  columns: number;
  cell: number;
  row: number;
  total: number;
}

export function gridOf(count: number, width: number, least: number, gap: number, extra: number): Grid {
  const columns = Math.max(1, Math.floor((width + gap) / (least + gap)));
  const cell = (width - gap * (columns - 1)) / columns;
  const row = Math.round(cell * 0.75) + extra + gap;
  return { columns, cell, row, total: Math.max(0, Math.ceil(count / columns) * row - gap) };
}

/** The first and the last (exclusive) cell of the rows within `top` to `bottom`, and `spare` rows around them. */
export function visible(grid: Grid, count: number, top: number, bottom: number, spare = 2): [number, number] {
  const first = Math.max(0, Math.floor(top / grid.row) - spare) * grid.columns;
  const last = (Math.ceil(bottom / grid.row) + spare) * grid.columns;
  return [Math.min(first, count), Math.max(0, Math.min(last, count))];
}

/** Where an arrow key leads in a grid; the same place where it would leave it. */
export function neighbour(key: string, index: number, columns: number, count: number): number {
  const steps: Record<string, number> = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  if (key === "Home") return 0;
  if (key === "End") return count - 1;
  const next = index + (steps[key] ?? 0);
  return next < 0 || next >= count ? index : next;
}
