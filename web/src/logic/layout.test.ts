import { describe, expect, it } from "vitest";
import { gridOf, neighbour, visible } from "./layout";

describe("layout", () => {
  it("fills the width with as many columns as fit", () => {
    const grid = gridOf(10, 640, 200, 20, 40);
    expect([grid.columns, grid.cell]).toEqual([3, 200]);
    expect(grid.total).toBe(4 * grid.row - 20);
  });

  it("has one column where none fits", () => {
    expect(gridOf(10, 100, 200, 20, 40).columns).toBe(1);
  });

  it("shows only the rows in sight, of ten thousand", () => {
    const grid = gridOf(10_000, 640, 200, 20, 40);
    const [first, last] = visible(grid, 10_000, 1000 * grid.row, 1000 * grid.row + 700, 2);
    expect(first).toBe(998 * 3);
    expect(last - first).toBeLessThan(30);
  });

  it("ends with the last one", () => {
    const grid = gridOf(10, 640, 200, 20, 40);
    expect(visible(grid, 10, 0, 5000)).toEqual([0, 10]);
    expect(visible(grid, 0, 0, 500)).toEqual([0, 0]);
  });

  it("goes where the arrows point, and stays at the edge", () => {
    expect(neighbour("ArrowDown", 1, 3, 10)).toBe(4);
    expect(neighbour("ArrowDown", 8, 3, 10)).toBe(8);
    expect(neighbour("ArrowLeft", 0, 3, 10)).toBe(0);
    expect(neighbour("End", 2, 3, 10)).toBe(9);
  });
});
