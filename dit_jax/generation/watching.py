"""How good a run's samples are while it trains: the same samples each time, measured as evaluate.py does."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dit_jax.conditions import Condition
from dit_jax.config import Config
from dit_jax.data.metadata import LatentMetadata
from dit_jax.evaluation.frechet import frechet_of
from dit_jax.generation.decoding import check_decoder, load_decoder
from dit_jax.generation.parts import Parts
from dit_jax.generation.sampling import watching
from dit_jax.generation.scoring import Ruler, features_of_parts, open_ruler
from dit_jax.generation.stream import Source, draw, on_own_devices
from dit_jax.models.create import Model
from dit_jax.models.lora import merged
from dit_jax.processes import together

FOLDER = "train-evaluation.parts"  # in a run's folder, while it is measured


def open_watch(config: Config, metadata: LatentMetadata) -> Ruler:
    """What a run is measured by; all processes call this before it starts.

    Raises ConfigError where it could not be: no reference, no weights for the features, no autoencoder.
    """
    check_decoder("--train.evaluate-every", config.train.evaluate_every, config, metadata)
    return open_ruler("--train.evaluate-reference", config.train.evaluate_reference or None, metadata)


def measure(
    *,
    config: Config,
    model: Model,
    params: Any,
    metadata: LatentMetadata,
    mesh: Mesh,
    ruler: Ruler,
    workdir: pathlib.Path,
    condition: Condition | None = None,
) -> dict[str, float]:
    """The Frechet distance of samples of these weights, `fid` in Inception's features and `frechet` in others, and
    where there is a referee, `agreement`: the share that it reads as their label. In process 0; nothing in others.

    condition: of `train.evaluate_count` samples (None: all of the network's kind in turn).
    Where a process fails all do, with errors of its kind.
    """
    t, params = config.train, merged(params, config.lora)
    condition = condition or model.condition.in_turn(t.evaluate_count)
    found: dict[str, float] = {}
    with together(), Parts("--train.workdir", workdir / FOLDER, {}, t.evaluate_count, anew=True) as parts:
        decoder = load_decoder(metadata, config.data.vae or None)
        options = watching(config, model)
        source = on_own_devices(Source(model, params, config, options, condition, decoder, mesh, t.seed))
        with together():
            draw(source, parts, ruler.extractor)
        if ruler.reference is not None:
            of = features_of_parts(parts)
            pool, name = of.statistics["pool"], "fid" if ruler.extractor.name == "inception" else "frechet"
            found[name] = frechet_of(pool.mean, pool.covariance, *ruler.reference.gaussians["pool"])
            if of.has("read") and "label" in condition:
                found["agreement"] = float(np.mean(of.rows("read") == condition["label"]))
            parts.remove()
    return found
