/** The server's values, as docs/serve.md and /api/v1/openapi.json describe them. */

/** [x1, y1, x2, y2] in pixels of the upright photo, half-open. */
export type Box = [number, number, number, number];

export type Origin = "drawn" | "accepted" | "corrected";

export interface Labelled {
  box: Box;
  label: string;
}

export interface LabelledBox extends Labelled {
  origin: Origin;
}

export interface PhotoBoxes {
  revision: number;
  boxes: LabelledBox[];
  rejected: Labelled[];
  reviewed: boolean;
  /** What went wrong although the boxes are kept: the XML file could not be written, for instance. */
  warning?: string | null;
}

export interface Photo {
  id: string;
  name: string;
  width: number;
  height: number;
  state: "waiting" | "encoded" | "failed";
  error: string | null;
  boxes: number;
  reviewed: boolean;
  found: number;
  doubt: number | null;
}

export interface PhotoPage {
  total: number;
  photos: Photo[];
}

export interface ClassCount {
  name: string;
  boxes: number;
  threshold: number | null;
}

export interface ClassQuality {
  objects: number;
  ap: number | null;
  precision: number | null;
  recall: number | null;
  threshold: number | null;
}

export interface Quality {
  fit: string;
  made: string;
  photos: number;
  objects: number;
  words: string[];
  mean_ap: number | null;
  classes: Record<string, ClassQuality>;
  changed: string[];
}

export interface Fit {
  id: string;
  state: "waiting" | "running" | "done" | "failed" | "cancelled";
  stage: string;
  share: number;
  seconds: number;
  left: number | null;
  error: string | null;
  quality: Quality | null;
}

export interface Model {
  id: string;
  name?: string;
  classes: string[];
  made: string;
  mean_ap?: number | null;
  bytes?: number;
}

export interface Project {
  name: string;
  folder: string;
  project_folder: string;
  annotations: "project" | "beside";
  classes: ClassCount[];
  photos: number;
  labelled: number;
  encoded: number;
  boxes: number;
  can_fit: { ok: boolean; reason: string | null };
  model: Model | null;
  fit: Fit | null;
  demo: boolean;
  version: string;
  notes?: string[];
}

export interface Region {
  photo: string;
  box: Box;
  score: number;
}

export interface Regions {
  regions: Region[];
  seconds: number;
}

export interface Detection extends Labelled {
  score: number;
  state: "new" | "accepted" | "rejected";
}

export interface Results {
  model: Model | string | null;
  classes: string[];
  thresholds: Record<string, number>;
  photos: Record<string, Detection[]>;
}

export interface Change {
  what: "photos" | "boxes" | "classes" | "fit" | "results";
  photo?: string;
  encoded?: number;
  photos?: number;
  fit?: Fit;
}
