"""Latent datasets: sources, encoding to shards, reading and loading."""
