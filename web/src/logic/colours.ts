/** Colours that stay apart on photos, in light and dark, and to colour-blind eyes as far as nine can; after Okabe and Ito. */
const COLOURS = ["#ff9f1c", "#3fb8ff", "#2fd18f", "#ff5d8f", "#ffe14d", "#b18cff", "#ff7043", "#4de3e0", "#c4e84a"];

export const colourAt = (place: number) => COLOURS[((place % COLOURS.length) + COLOURS.length) % COLOURS.length]!;
