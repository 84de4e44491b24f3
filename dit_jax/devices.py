"""The peak rates of devices."""

from __future__ import annotations

# Dense bfloat16 peak per device, in FLOP/s, by a part of jax's device_kind in lower case (datasheets; the
# first match counts). A TPU v7x chip shows as two devices.
PEAK_FLOPS = (
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h200 nvl", 835e12),
    ("h100", 989e12),
    ("h200", 989e12),  # and GH200
    ("gb200", 2500e12),
    ("gb300", 2500e12),
    ("b200", 2250e12),
    ("b300", 2250e12),
    ("a100", 312e12),
    ("l40s", 362e12),
    ("tpu v4", 275e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5", 459e12),
    ("tpu v6", 918e12),
    ("tpu7x", 1153e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, by jax's `device.device_kind`; None where it is not known."""
    kind = device_kind.lower()
    return next((peak for part, peak in PEAK_FLOPS if part in kind), None)
