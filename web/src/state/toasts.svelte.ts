export interface Toast {
  id: number;
  words: string;
  bad: boolean;
}

const LASTS = 5000;

class Toasts {
  all = $state.raw<Toast[]>([]);
  private last = 0;

  say(words: string, bad = false): void {
    const toast = { id: ++this.last, words, bad };
    this.all = [...this.all.filter((other) => other.words !== words).slice(-2), toast];
    setTimeout(() => this.drop(toast.id), bad ? 2 * LASTS : LASTS);
  }

  drop(id: number): void {
    this.all = this.all.filter((toast) => toast.id !== id);
  }
}

export const toasts = new Toasts();

/** Says what went wrong, in the server's words where it has some. */
export function complain(error: unknown): void {
  toasts.say(error instanceof Error ? error.message : String(error), true);
}
