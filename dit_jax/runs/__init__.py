"""What the folder of a run holds: checkpoints, weights, snapshots, the log, and its own description."""
