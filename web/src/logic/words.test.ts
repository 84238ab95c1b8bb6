import { describe, expect, it } from "vitest";
import { bytes, duration, left, plural } from "./words";

describe("words", () => {
  it("counts", () => {
    expect(plural(1, "photo")).toBe("1 photo");
    expect(plural(1200, "box", "boxes")).toBe("1,200 boxes");
  });

  it("says how long", () => {
    expect(duration(0.2)).toBe("under a second");
    expect(duration(42.4)).toBe("42 seconds");
    expect(duration(300)).toBe("5 minutes");
    expect(left(null)).toBe("");
    expect(left(0.5)).toBe("almost done");
  });

  it("says how large", () => {
    expect(bytes(812)).toBe("812 B");
    expect(bytes(8_120)).toBe("8.1 kB");
    expect(bytes(81_200_000)).toBe("81 MB");
  });
});
