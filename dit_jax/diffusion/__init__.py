"""Processes and samplers only: takes denoise_fn(x, t) -> array; knows nothing of networks."""
