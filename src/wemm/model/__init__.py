"""What is computed: vision tower, downsampler, InternLM2, and the seam between them."""
