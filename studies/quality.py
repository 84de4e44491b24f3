"""How good a run's samples are at a step: the digits by their referee, other pictures by FID."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.config import Config
from dit_jax.data.digits import NUM_CLASSES
from dit_jax.evaluation.digits import class_agreement, fit_referee, pixel_frechet
from dit_jax.generation.sampling import (
    SamplingOptions,
    device_mesh,
    generate_images,
    load_decoder,
    sampling_model,
)
from dit_jax.models.create import init_params
from dit_jax.runs.weights import load_weights
from dit_jax.runs.workdir import read_metadata

BATCH = 250


class Quality:
    """Measures one run after the other with one referee."""

    def __init__(self) -> None:
        self._referee = fit_referee()

    def of(self, config: Config, step: int, args: argparse.Namespace) -> dict[str, Any]:
        """Frechet distance to real pictures, and the share of samples that are read as asked for."""
        folder, model, mesh = pathlib.Path(config.train.workdir), sampling_model(config), device_mesh()
        whole = NamedSharding(mesh, PartitionSpec())
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
            jax.eval_shape(lambda key: init_params(model, config, key), jax.random.key(0)),
        )
        params, _ = load_weights(folder / "checkpoints", like, config, "ema", step)
        choice = SamplingOptions(sampler=args.sampler, steps=args.sampling_steps)
        labels = np.arange(args.samples) % NUM_CLASSES
        decoder = load_decoder(read_metadata("--out", folder), config.data.vae or None)
        alike = dataclasses.replace(config, train=type(config.train)())  # so that seeds share a program
        images = generate_images(model, params, alike, choice, labels, decoder, mesh, 0, BATCH)
        return {
            "distance": pixel_frechet(images),
            "agreement": class_agreement(self._referee, images, labels),
        }
