"""From noise to data on any process: one loop (`loop`), one solver a file, all by name in `table`."""
