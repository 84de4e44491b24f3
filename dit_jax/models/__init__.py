"""Networks only: (x, t, y) -> array. Knows nothing of noise schedules."""
