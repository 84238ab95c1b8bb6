export function plural(count: number, one: string, many = `${one}s`): string {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

export function duration(seconds: number): string {
  if (seconds < 1) return "under a second";
  if (seconds < 90) return plural(Math.round(seconds), "second");
  return plural(Math.round(seconds / 60), "minute");
}

export function left(seconds: number | null): string {
  if (seconds === null || !Number.isFinite(seconds)) return "";
  return seconds < 1 ? "almost done" : `about ${duration(seconds)} left`;
}

export const percent = (share: number) => `${Math.round(share * 100)} %`;

export function bytes(count: number): string {
  const units = ["B", "kB", "MB", "GB"];
  const power = Math.min(Math.floor(Math.log10(Math.max(count, 1)) / 3), units.length - 1);
  return `${(count / 1000 ** power).toFixed(power && count / 1000 ** power < 10 ? 1 : 0)} ${units[power]}`;
}

export function clock(iso: string): string {
  const date = new Date(iso);
  return Number.isNaN(date.getTime()) ? iso : date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}
