"""The trainer: state, optimizer, step, sharding, checkpoint, logging, loop."""
