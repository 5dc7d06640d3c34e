"""When it is computed: requests, scheduling, caches, sampling, text out."""
