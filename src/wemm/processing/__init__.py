"""Images and messages → token ids and pixels. Runs on the CPU and knows no model."""
