"""What the folder of a run holds: checkpoints, weights, snapshots, the log, what it says of its config and dataset."""
