/** Whether a key belongs to a field that takes text, and so to nobody else. */
export function isTyping(event: KeyboardEvent): boolean {
  const target = event.target as HTMLElement | null;
  if (!target) return false;
  if (target instanceof HTMLInputElement) return !["range", "checkbox", "radio", "button", "submit"].includes(target.type);
  return target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement || target.isContentEditable;
}

export const isPlain = (event: KeyboardEvent) => !event.ctrlKey && !event.metaKey && !event.altKey;

/** 0 to 8 for the keys 1 to 9, else -1. */
export function digitOf(event: KeyboardEvent): number {
  return isPlain(event) && /^[1-9]$/.test(event.key) ? Number(event.key) - 1 : -1;
}
