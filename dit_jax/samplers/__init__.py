"""Samplers of continuous processes: each is the whole loop, to be jitted, one solver a file."""
