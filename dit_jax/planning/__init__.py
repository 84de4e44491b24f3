"""What is known before anything runs: arithmetic, memory, the compiler's estimates, the plan."""
