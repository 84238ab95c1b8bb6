"""Networks and detectors as ONNX files."""
