"""Post-training quantisation: ranges from real images, Q/DQ pairs into the graph, and what it costs, layer by layer."""
