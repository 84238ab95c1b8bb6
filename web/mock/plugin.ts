import { readFileSync } from "node:fs";
import type { IncomingMessage, ServerResponse } from "node:http";
import { join } from "node:path";
import type { Plugin } from "vite";

/**
 * A server of made-up answers, for work on the page without Python: `npm run dev`. Not shipped.
 * `SPPNET_SERVER=http://127.0.0.1:8000 npm run dev` takes the real one instead.
 */

const PICTURE = readFileSync(join(import.meta.dirname, "../../src/sppnet/photos/cows.jpg"));
const SIZE = { width: 600, height: 333 };
const COUNT = Number(process.env.MOCK_PHOTOS ?? 40);

type Json = Record<string, any>;
type Handle = (match: string[], body: Json, url: URL, request: IncomingMessage) => unknown;

let seed = 7;
const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;

const photos: Json[] = Array.from({ length: COUNT }, (_, place) => makePhoto(`cow <b>${String(place + 1).padStart(2, "0")}</b>.jpg`, `p${place}`));
const boxes: Record<string, Json> = {};
let classes: string[] = [];
let results: Json = { model: null, classes: [], thresholds: {}, photos: {} };
const fits: Json[] = [];
let fit: Json | null = null;
const streams = new Set<ServerResponse>();

function makePhoto(name: string, id: string): Json {
  return { id, name, ...SIZE, state: "waiting", error: null, boxes: 0, reviewed: false, found: 0, doubt: null };
}

const boxesOf = (id: string) => (boxes[id] ??= { revision: 0, boxes: [], rejected: [], reviewed: false });

const tell = (data: Json) => streams.forEach((stream) => stream.write(`event: project\ndata: ${JSON.stringify(data)}\n\n`));

function randomBox(): number[] {
  const [x, y, w] = [random() * 450, random() * 220, 50 + random() * 90];
  return [x, y, Math.min(x + w, 600), Math.min(y + w * 0.9, 333)].map(Math.round);
}

function project(): Json {
  const all = Object.values(boxes).flatMap((entry) => entry.boxes);
  const counts = classes.map((name) => ({ name, boxes: all.filter((box: Json) => box.label === name).length, threshold: results.thresholds[name] ?? null }));
  const short = counts.find((count) => count.boxes < 5);
  const reason = !counts.length ? "found no boxes, expected about five of each class" : short ? `found ${short.boxes} boxes of ${short.name}, expected about five` : null;
  return {
    name: "cows", folder: "/photos/cows", project_folder: "/photos/cows/sppnet-project", annotations: "project", classes: counts, photos: photos.length,
    labelled: Object.values(boxes).filter((entry) => entry.boxes.length).length, encoded: photos.filter((photo) => photo.state === "encoded").length,
    boxes: all.length, can_fit: { ok: !reason, reason }, model: results.model, fit, demo: true, version: "0.1.0",
  };
}

function save(id: string, body: Json): unknown {
  const now = boxesOf(id);
  if (body.revision !== now.revision) return new Refused(409, { error: { message: "Another tab saved." }, current: now });
  boxes[id] = { ...body, revision: now.revision + 1 };
  for (const { label } of body.boxes) if (!classes.includes(label)) classes.push(label);
  Object.assign(photos.find((photo) => photo.id === id)!, { boxes: body.boxes.length, reviewed: body.reviewed });
  tell({ what: "boxes", photo: id });
  return boxes[id];
}

class Refused {
  constructor(readonly status: number, readonly body: Json) {}
}

function startFit(): unknown {
  const { can_fit } = project();
  if (!can_fit.ok) return new Refused(422, { error: { message: can_fit.reason } });
  fit = { id: `f${fits.length}`, state: "running", stage: "Reading maps", share: 0, seconds: 0, left: 5, error: null, quality: null };
  const timer = setInterval(() => {
    if (fit!.state !== "running") return clearInterval(timer);
    const share = fit!.share + 0.05;
    fit = { ...fit!, share, seconds: share * 5, left: 5 - share * 5, stage: share < 0.3 ? "Reading maps" : share < 0.7 ? "Fitting" : "Looking at all photos" };
    if (share >= 1) finish();
    tell({ what: "fit", fit });
  }, 250);
  return fit;
}

function finish(): void {
  const per = Object.fromEntries(classes.map((name) => [name, { objects: 10, ap: 0.8, precision: 0.9, recall: 0.8, threshold: 0.5 }]));
  const quality = { fit: fit!.id, made: new Date().toISOString(), photos: 12, objects: 10, words: classes.map((name) => `finds 8 of 10 ${name}, one false alarm in 12 photos`), mean_ap: 0.7 + 0.05 * fits.length, classes: per, changed: fits.length ? [`${classes[0]}: finds 8 of 10, found 7 before`] : [] };
  fits.push(quality);
  fit = { ...fit!, share: 1, state: "done", left: 0, quality };
  const detections = photos.map(({ id }) => [id, Array.from({ length: Math.floor(random() * 6) }, () => ({ box: randomBox(), label: classes[Math.floor(random() * classes.length)], score: 0.05 + random() * 0.95, state: "new" }))]);
  results = { model: { id: fit!.id, name: fit!.id, classes, made: quality.made }, classes, thresholds: Object.fromEntries(classes.map((name) => [name, 0.5])), photos: Object.fromEntries(detections) };
  for (const photo of photos) {
    photo.found = results.photos[photo.id].filter((found: Json) => found.score >= 0.5).length;
    photo.doubt = Math.max(0, ...results.photos[photo.id].map((found: Json) => 1 - Math.abs(found.score - 0.5)));
  }
  setTimeout(() => tell({ what: "results" }));
}

function listPhotos(query: URLSearchParams): Json {
  const text = (query.get("text") ?? "").toLowerCase();
  const show = query.get("show");
  const kept = photos.filter((photo) => photo.name.toLowerCase().includes(text) && (show === "labelled" ? photo.boxes : show === "unlabelled" ? !photo.boxes : show === "found" ? photo.found : true));
  if (query.get("order") === "doubt") kept.sort((a, b) => +a.reviewed - +b.reviewed || (b.doubt ?? -1) - (a.doubt ?? -1));
  const offset = Number(query.get("offset"));
  return { total: kept.length, photos: kept.slice(offset, offset + Number(query.get("limit") ?? 200)) };
}

const one = (id: string) => photos.find((photo) => photo.id === id) ?? new Refused(404, { error: { message: "found no such photo" } });

const ROUTES: [string, RegExp, Handle][] = [
  ["GET", /^\/project$/, project],
  ["PATCH", /^\/project$/, (_, body) => {
    classes = body.classes ?? classes;
    for (const [old, name] of Object.entries(body.rename ?? {}) as [string, string][]) {
      classes = classes.map((label) => (label === old ? name : label));
      for (const entry of Object.values(boxes)) for (const box of entry.boxes) if (box.label === old) box.label = name;
    }
    tell({ what: "classes" });
    return project();
  }],
  ["GET", /^\/photos$/, (_, __, url) => listPhotos(url.searchParams)],
  ["POST", /^\/photos$/, (_, __, ___, request) => {
    const photo = makePhoto(decodeURIComponent(String(request.headers["x-name"])), `p${photos.length}`);
    photos.push(photo);
    tell({ what: "photos", photos: photos.length });
    return photo;
  }],
  ["GET", /^\/photos\/(\w+)$/, ([, id]) => one(id!)],
  ["GET", /^\/photos\/(\w+)\/boxes$/, ([, id]) => boxesOf(id!)],
  ["PUT", /^\/photos\/(\w+)\/boxes$/, ([, id], body) => save(id!, body)],
  ["POST", /^\/search$/, () => ({ seconds: 0.043, regions: photos.slice(0, 30).map(({ id }, place) => ({ photo: id, box: randomBox(), score: 0.95 - place * 0.02 })) })],
  ["POST", /^\/fits$/, startFit],
  ["DELETE", /^\/fits\/(\w+)$/, () => {
    fit = { ...fit!, state: "cancelled" };
    tell({ what: "fit", fit });
    return fit;
  }],
  ["GET", /^\/results$/, () => results],
  ["PATCH", /^\/results\/thresholds$/, (_, body) => Object.assign(results.thresholds, body)],
  ["GET", /^\/quality$/, () => ({ fits })],
  ["GET", /^\/models$/, () => fits.map(({ fit, made, mean_ap }) => ({ id: fit, made, classes, mean_ap, bytes: 812345 }))],
];

function answer(request: IncomingMessage, response: ServerResponse, url: URL, body: Json): void {
  const path = url.pathname.replace("/api/v1", "");
  if (/\/(image|thumbnail)$/.test(path)) return void response.writeHead(200, { "Content-Type": "image/jpeg", "Cache-Control": "max-age=60" }).end(PICTURE);
  if (path === "/events") {
    streams.add(response);
    response.on("close", () => streams.delete(response));
    return void response.writeHead(200, { "Content-Type": "text/event-stream" }).write(":\n\n");
  }
  for (const [method, pattern, handle] of ROUTES) {
    const match = method === request.method && pattern.exec(path);
    if (!match) continue;
    const made = handle(match, body, url, request);
    const refused = made instanceof Refused;
    return void response.writeHead(refused ? made.status : 200, { "Content-Type": "application/json" }).end(JSON.stringify(refused ? made.body : made));
  }
  response.writeHead(404, { "Content-Type": "application/json" }).end('{"error": {"message": "found no such route"}}');
}

export function mockServer(): Plugin {
  return {
    name: "mock-server",
    configureServer(server) {
      setInterval(() => {
        const waiting = photos.find((photo) => photo.state === "waiting");
        if (waiting) Object.assign(waiting, { state: "encoded" });
        if (waiting) tell({ what: "photos", photos: photos.length, encoded: project().encoded });
      }, 150).unref();
      server.middlewares.use((request, response, next) => {
        const url = new URL(request.url ?? "/", "http://localhost");
        if (!url.pathname.startsWith("/api/v1")) return next();
        const parts: Buffer[] = [];
        request.on("data", (part: Buffer) => parts.push(part));
        request.on("end", () => {
          const json = request.headers["content-type"] === "application/json" && parts.length;
          answer(request, response, url, json ? (JSON.parse(Buffer.concat(parts).toString()) as Json) : {});
        });
      });
    },
  };
}
