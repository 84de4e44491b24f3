"""The trainer: state, optimizer, step, sharding, loop."""
