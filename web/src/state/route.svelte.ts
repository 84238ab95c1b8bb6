export const SCREENS = ["photos", "label", "fit", "results", "quality", "search", "export"] as const;

export type Screen = (typeof SCREENS)[number];

interface Place {
  screen: Screen;
  photo: string | null;
}

function read(hash: string): Place {
  const [, screen = "", photo = ""] = hash.split("/");
  const known = SCREENS.find((name) => name === screen);
  return { screen: known ?? "photos", photo: photo ? decodeURIComponent(photo) : null };
}

class Route {
  place = $state.raw<Place>(read(location.hash));

  constructor() {
    addEventListener("hashchange", () => (this.place = read(location.hash)));
  }

  get screen(): Screen {
    return this.place.screen;
  }

  get photo(): string | null {
    return this.place.photo;
  }
}

export const route = new Route();

export const link = (screen: Screen, photo?: string) => `#/${screen}${photo ? `/${encodeURIComponent(photo)}` : ""}`;

export function go(screen: Screen, photo?: string): void {
  location.hash = link(screen, photo);
}

/** As `go`, but leaves no step behind for the browser's way back: for going from photo to photo. */
export function turn(screen: Screen, photo: string): void {
  history.replaceState(null, "", link(screen, photo));
  route.place = { screen, photo };
}
