import * as api from "../server/api";
import { plural } from "../logic/words";
import { everything } from "./photos.svelte";
import { complain, toasts } from "./toasts.svelte";

const AT_ONCE = 3;
const PATIENCE = 8;

const isImage = ({ type, name }: File) => type.startsWith("image/") || /\.(jpe?g|png|webp|bmp|tiff?|heic|avif|gif)$/i.test(name);

const sleep = (milliseconds: number) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Photos on their way to the server, a few at a time. */
class Uploads {
  total = $state(0);
  done = $state(0);
  private queue: File[] = [];
  private failed = 0;
  private active = 0;

  add(files: File[]): void {
    const images = files.filter(isImage);
    if (images.length < files.length) toasts.say(`${plural(files.length - images.length, "file")} left out: not an image`, true);
    this.queue.push(...images);
    this.total += images.length;
    while (this.active < AT_ONCE && this.queue.length) void this.work();
  }

  private async work(): Promise<void> {
    this.active += 1;
    for (let file = this.queue.shift(); file; file = this.queue.shift()) {
      await this.send(file).catch((error: unknown) => this.lose(error));
      this.done += 1;
    }
    this.active -= 1;
    if (this.active === 0) this.finish();
  }

  /** Sends one photo; a server with its hands full is asked again. */
  private async send(file: File): Promise<void> {
    for (let tries = 1; ; tries += 1) {
      try {
        return void (await api.addPhoto(file));
      } catch (error) {
        if (!(error instanceof api.Refusal && error.status === 429) || tries === PATIENCE) throw error;
        await sleep(300 * tries);
      }
    }
  }

  private lose(error: unknown): void {
    this.failed += 1;
    complain(error);
  }

  private finish(): void {
    if (this.done > this.failed) toasts.say(`${plural(this.done - this.failed, "photo")} added`);
    this.total = this.done = this.failed = 0;
    everything.refresh();
  }
}

export const uploads = new Uploads();

/** The files that were dropped, those inside dropped folders, too. */
export async function filesOf(data: DataTransfer): Promise<File[]> {
  const entries = [...data.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  return (await Promise.all(entries.map(filesIn))).flat();
}

async function filesIn(entry: FileSystemEntry): Promise<File[]> {
  if (entry.isFile) return [await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject))];
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  const files: File[] = [];
  for (;;) {
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return files;
    files.push(...(await Promise.all(some.map(filesIn))).flat());
  }
}
