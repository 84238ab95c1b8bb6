"""Objects in images: windows pooled from maps, scored by what was fitted, moved, suppressed (section 4)."""
