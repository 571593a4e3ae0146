"""TensorRT: strongly typed graphs and the engines that its builder makes of them."""
