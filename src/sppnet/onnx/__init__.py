"""Models as ONNX files: `sppnet.onnx.export`."""
