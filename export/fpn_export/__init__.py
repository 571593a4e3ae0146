"""Offline work: the PyTorch FPN detectors, checkpoint import and ONNX export."""
