"""Quantised weights that fit the inputs they meet: a few samples through the model, layer by layer."""
