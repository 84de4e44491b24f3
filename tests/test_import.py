"""`import dit_jax` is quick and light."""

import subprocess
import sys

PROBE = """
import time, sys
import jax
start = time.process_time()
import dit_jax
from dit_jax import DiT, GaussianDiffusion, sample_ddim, sample_ddpm
print(time.process_time() - start)
print(",".join(m for m in ("torch", "tensorflow", "tensorflow_datasets", "diffusers", "matplotlib", "sklearn")
               if m in sys.modules))
"""


def test_import_is_quick_and_pulls_in_no_heavy_package():
    out = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout
    seconds, heavy = out.splitlines()
    assert heavy == ""
    assert float(seconds) < 2.0


def test_an_unknown_public_name_is_an_error():
    probe = "import dit_jax\ntry:\n    dit_jax.DIT\nexcept AttributeError as e:\n    print(e)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert "has no attribute 'DIT'" in out
