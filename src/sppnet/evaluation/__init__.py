"""How good answers are: detections, classes, and the paper's protocols."""
