"""benchmarks/checkpoint.py on a small state: what it saves is checked and read back, and every time is there."""

import checkpoint as benchmark

from dit_jax.runs import checkpoint


def test_every_part_is_timed(tmp_path):
    hashed = checkpoint.file_checksums
    found = benchmark.measure(benchmark.Options(gigabytes=0.001, rounds=1), tmp_path / "checkpoints")
    assert found["seconds"].keys() == {"start", "write_without_checksums", "write", "check", "restore"}
    assert all(seconds > 0 for seconds in found["seconds"].values()) and found["bytes"] > 5e5
    assert checkpoint.file_checksums is hashed
