"""How good a run's samples are at a step, as evaluate.py --workdir measures them."""

from __future__ import annotations

import argparse
from typing import Any

from dit_jax.config import Config
from dit_jax.generation import scoring
from dit_jax.processes import on_lead

BATCH = 250


def quality_of(config: Config, step: int, args: argparse.Namespace) -> dict[str, Any]:
    """Frechet distance to real pictures of samples without guidance, and what else is measured of them.

    All processes of a run call this.
    """
    asked = scoring.ScoreArgs(
        workdir=config.train.workdir, step=step, num_samples=args.samples, sampler=args.sampler,
        steps=args.sampling_steps, cfg_scale=[1.0], batch_size=BATCH, reference=args.reference, split=args.split,
        inception=args.inception,
    )  # fmt: skip
    results = scoring.main(asked)  # in process 0
    metrics = on_lead(lambda: results[0].metrics)
    return {"distance": metrics["fid"], "agreement": metrics.get("agreement"), "metrics": metrics}
