import type { Box, Fit, Labelled, Model, Photo, PhotoBoxes, PhotoPage, Project, Quality, Regions, Results } from "./types";

const ROOT = "api/v1";

/** What the server refused, in its words; `status` 0 means that it did not answer at all. */
export class Refusal extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly body: unknown = null,
  ) {
    super(message);
  }
}

interface Request {
  method?: string;
  json?: unknown;
  body?: Blob;
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

async function ask<Answer>(path: string, request: Request = {}): Promise<Answer> {
  const response = await send(path, request);
  const text = await response.text();
  const body: unknown = isJson(response) ? JSON.parse(text) : text;
  if (!response.ok) throw new Refusal(wordsOf(body, response.status), response.status, body);
  return body as Answer;
}

async function send(path: string, { method = "GET", json, body, headers = {}, signal }: Request): Promise<Response> {
  const type: Record<string, string> = json === undefined ? {} : { "Content-Type": "application/json" };
  const content = json === undefined ? body : JSON.stringify(json);
  try {
    return await fetch(`${ROOT}/${path}`, { method, body: content, headers: { ...type, ...headers }, signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal("The server does not answer.", 0);
  }
}

function isJson(response: Response): boolean {
  return response.headers.get("content-type")?.includes("json") ?? false;
}

function wordsOf(body: unknown, status: number): string {
  const message = (body as { error?: { message?: unknown } } | null)?.error?.message;
  return typeof message === "string" ? message : `The server answered ${status}.`;
}

export type Order = "name" | "doubt";
export type Show = "all" | "labelled" | "unlabelled" | "found";

export interface PhotoQuery {
  order: Order;
  show: Show;
  text: string;
}

export const project = () => ask<Project>("project");

export const changeProject = (json: { annotations?: string; classes?: string[]; rename?: Record<string, string> }) =>
  ask<Project>("project", { method: "PATCH", json });

export const photos = (query: PhotoQuery, offset: number, limit: number) =>
  ask<PhotoPage>(`photos?${new URLSearchParams({ ...query, offset: `${offset}`, limit: `${limit}` })}`);

export const photo = (id: string) => ask<Photo>(`photos/${id}`);

export const addPhoto = (file: File) =>
  ask<Photo>("photos", {
    method: "POST",
    body: file,
    headers: { "Content-Type": file.type || "image/jpeg", "X-Name": encodeURIComponent(file.name) },
  });

export const boxes = (id: string) => ask<PhotoBoxes>(`photos/${id}/boxes`);

export const saveBoxes = (id: string, json: PhotoBoxes) => ask<PhotoBoxes>(`photos/${id}/boxes`, { method: "PUT", json });

export const review = (id: string, json: { accept: Labelled[]; reject: Labelled[] }) =>
  ask<PhotoBoxes>(`photos/${id}/review`, { method: "POST", json });

export const search = (photo: string, box: Box, limit: number, signal?: AbortSignal) =>
  ask<Regions>("search", { method: "POST", json: { photo, box, limit }, signal });

export const startFit = () => ask<Fit>("fits", { method: "POST", json: {} });

export const cancelFit = (id: string) => ask<unknown>(`fits/${id}`, { method: "DELETE" });

export const results = () => ask<Results>("results");

export const setThresholds = (json: Record<string, number>) => ask<unknown>("results/thresholds", { method: "PATCH", json });

export const quality = () => ask<{ fits: Quality[] }>("quality");

export const models = () => ask<Model[]>("models");

export const chooseModel = (id: string) => ask<unknown>(`models/${id}/use`, { method: "POST", json: {} });

export const imageOf = (id: string, side: number) => `${ROOT}/photos/${id}/image?side=${side}`;

export const thumbnailOf = (id: string) => `${ROOT}/photos/${id}/thumbnail`;

export const at = (path: string) => `${ROOT}/${path}`;

/** Calls `hear` for each event of that name until the returned function is called; `opened` on each (re)connection. */
export function listen<Data>(path: string, name: string, hear: (data: Data) => void, opened: (open: boolean) => void = () => {}) {
  const source = new EventSource(at(path));
  source.addEventListener(name, (event) => hear(JSON.parse((event as MessageEvent<string>).data) as Data));
  source.addEventListener("open", () => opened(true));
  source.addEventListener("error", () => opened(false));
  return () => source.close();
}
