"""The ops between image and boxes of an FPN detector, as PyTorch references with final names."""
