"""What a network costs: arithmetic, parameters, memory. All is read from the traced network; nothing is computed.

The DiT paper's "Gflops" are multiply-accumulates (MACs) of one forward pass, counted as `arithmetic` says; FLOPs are
twice that, and a training step costs three forward passes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.config import Config
from dit_jax.models.arithmetic import count_macs
from dit_jax.models.create import Model, build_model, init_params


@functools.lru_cache(maxsize=64)
def forward_macs(config: Config) -> int:
    """MACs of one forward pass on one latent, for a resolved config.

    Counted on the plain network, whatever kernels compute it: what a kernel computes twice is no part of it.
    """
    model = _in_a_loop(config).plain()
    return count_macs(_apply(model), _parameters(config), *_inputs(model, 1))


def of_size(config: Config, size: tuple[int, int]) -> Config:
    """The config of a run on latents of this height and width alone, which costs what theirs do."""
    data = dataclasses.replace(config.data, sizes=(), mixture=())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, input_size=size), data=data)


def of_largest(config: Config) -> Config:
    """The config of a run on the largest latents alone, of those of all sizes that it trains on."""
    sizes = (config.model.input_size, *config.data.sizes)
    return of_size(config, max(sizes, key=lambda size: size[0] * size[1]))


def train_flops_per_image(config: Config) -> int:
    """FLOPs of forward and backward on one latent: three forward passes of two FLOPs per MAC."""
    return 6 * forward_macs(config)


def parameter_count(config: Config) -> int:
    """Number of trained parameters (the frozen position table is not one)."""
    return sum(leaf.size for leaf in jax.tree.leaves(_parameters(config)))


@functools.lru_cache(maxsize=64)
def activation_bytes_per_image(config: Config) -> int:
    """Activations that the network's forward pass keeps for its backward pass, in bytes per image.

    Counted is what jax's derivative of the network hands from one to the other, as far as it grows with the batch:
    what `compute.remat` leaves of it, in the types in which it is kept. Not counted is what lives within the pass
    of one block, and what a compiler decides to keep, or to compute anew, by itself; 8-bit products count as others.
    Attention is as the config says, where "auto" and "cudnn" keep what every fused kernel does: queries, keys,
    values, output and the softmax's statistics, no array of tokens x tokens.
    """
    kernel = config.compute.attention
    fused = "tokens_last" if kernel in ("auto", "cudnn") else kernel
    model = _in_a_loop(config).computed(attention=fused, norm_kernel="xla", quantization="none")
    one, two = (_kept_bytes(model, _parameters(config), images) for images in (1, 2))
    return two - one  # parameters are in both


def state_bytes(config: Config) -> int:
    """Bytes of the training state in float32: parameters, Adam's two moments and one EMA."""
    return 16 * parameter_count(config)


def _kept_bytes(model: Model, params: Any, images: int) -> int:
    """Bytes of all that the backward pass is given, parameters included."""

    def backward(params: Any, *inputs: Any) -> Any:
        return jax.vjp(lambda params: _apply(model)(params, *inputs), params)[1]

    kept = jax.eval_shape(backward, params, *_inputs(model, images))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def _in_a_loop(config: Config) -> Model:
    """The network with its layers in a loop, so that one of them is traced for all."""
    return build_model(config).computed(unroll=False)


def _apply(model: Model) -> Any:
    return lambda params, *inputs: model.apply({"params": params}, *inputs)


@functools.lru_cache(maxsize=64)
def _parameters(config: Config) -> Any:
    """Shapes and types of the parameters, which no kernel changes."""
    model = _in_a_loop(config).plain()
    return jax.eval_shape(lambda key: init_params(model, config, key), jax.random.key(0))


def _inputs(model: Model, images: int) -> tuple[Any, ...]:
    """Shapes and types of so many latents, times and conditions."""
    latents = jax.ShapeDtypeStruct((images, *model.latent_size, model.in_channels), jnp.float32)
    return latents, jax.ShapeDtypeStruct((images,), jnp.int32), model.condition.shapes(images)
