"""What the commands that compare samples can be told of the comparison; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CompareArgs:
    """What samples are compared with, and by which features."""

    reference: str | None = None
    """What samples are compared with by FID, sFID, Inception Score, precision, recall and KID: an .npz of the ADM
    evaluator (arr_0, mu, sigma, mu_s, sigma_s, or some of them), a folder of pictures or of prepare.py, digits,
    folder:PATH, npz:PATH or tfds:NAME (with --workdir default: the digits, of a run on them)."""
    split: str = "train"
    """Split of a reference that is a TFDS dataset or the digits."""
    features: Literal["inception", "digits"] | None = None
    """Features to compare (default: inception where its weights are named, else digits where the reference is)."""
    inception: str | None = None
    """File of the Inception weights, pt_inception-2015-12-05-6726825d.pth or the same as .safetensors (default:
    $DIT_JAX_INCEPTION)."""
    convention: Literal["adm", "pytorch-fid"] = "adm"
    """How pictures are resized for it: as the ADM evaluator and torch-fidelity do, or as pytorch-fid does."""
