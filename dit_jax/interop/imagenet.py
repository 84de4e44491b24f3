"""The names of ImageNet's 1,000 classes, in the order in which published networks number them."""

from __future__ import annotations

import functools

from dit_jax.interop.diffusers import asset_path


@functools.cache
def class_names() -> tuple[str, ...]:
    """Name of each class: WordNet's words for it, joined by ", ", such as "tench, Tinca tinca"."""
    return tuple(asset_path("imagenet_classes.txt").read_text().splitlines())
