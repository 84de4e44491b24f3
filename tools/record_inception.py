"""Record tests/data/inception.npz: what pytorch-fid's and torch-fidelity's own code makes of weights and pictures
from a seed, which the tests make anew.

    pip install pytorch-fid==0.3.0 torch-fidelity==0.4.0 torchvision     # in an environment of its own, with torch
    python tools/record_inception.py tests/data/inception.npz

The weights are random, the statistics of batch normalisation too. Their scale keeps values about 1 everywhere.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

SIZES = {"small": (40, 56), "large": (350, 313)}  # pictures that are enlarged, and that are not
PLACES = slice(None, None, 23)  # of a resized picture, along both axes


def pictures(name: str) -> np.ndarray:
    """Two pictures (2, h, w, 3) uint8."""
    return np.random.default_rng(len(name)).integers(0, 256, (2, *SIZES[name], 3), np.uint8)


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors of a state dict's names, float32; a function of the names and shapes alone."""
    rng, weights = np.random.default_rng(0), {}

    def uniform(low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
        return (low + (high - low) * rng.random(shape, np.float32)).astype(np.float32)

    for name in sorted(shapes):  # running_var comes before weight
        shape = shapes[name]
        if name.endswith("running_var"):
            weights[name] = np.exp(uniform(np.log(1e-3), 0, shape))
        elif name.endswith("bn.weight"):
            var = weights[name.replace("weight", "running_var")]
            weights[name] = uniform(0.7, 1.3, shape) * np.sqrt(var + np.float32(1e-3))
        elif len(shape) == 1:
            weights[name] = uniform(-0.2, 0.2, shape)
        else:
            reach = np.sqrt(6 / np.prod(shape[1:]))
            weights[name] = uniform(-reach, reach, shape)
    return weights


def sets(count: int, dim: int, seed: int) -> np.ndarray:
    """Features (count, dim) float32."""
    return (np.random.default_rng(seed).random((count, dim), np.float32) + 0.1 * seed).astype(np.float32)


def logits() -> np.ndarray:
    """(60, 12) float32."""
    return 6 * sets(60, 12, 3)


def _peers() -> Any:
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # compiled for another build of torch: of it, only classes in Python are used
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    import pytorch_fid.inception

    return torch, pytorch_fid.inception


def networks() -> dict[str, np.ndarray]:
    """Features of both networks with the same weights."""
    torch, peer = _peers()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Named(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: Any) -> Any:
            return super().load_state_dict(
                state | {k: v for k, v in self.state_dict().items() if "tracked" in k}
            )

    shapes = {name: value.shape for name, value in _state_of(torch, Named).items() if "tracked" not in name}
    weights = {name: torch.from_numpy(value) for name, value in random_weights(shapes).items()}
    peer.load_state_dict_from_url = lambda *_, **__: weights
    inception = peer._inception_v3

    def lenient(*args: Any, **kwargs: Any) -> Any:
        net = inception(*args, **kwargs)
        load = net.load_state_dict
        net.load_state_dict = lambda state: load(state, strict=False)
        return net

    peer._inception_v3 = lenient
    ours = peer.InceptionV3().eval()
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "weights.pth"
        torch.save(weights, file)
        theirs = Named("recorded", ["2048", "logits_unbiased"], str(file))
    found: dict[str, np.ndarray] = {}
    x = torch.from_numpy(pictures("small")).permute(0, 3, 1, 2)
    for name, net, conv in (
        ("pytorch-fid", lambda: ours(x / 255)[0].flatten(1), ours.blocks[2][6].branch1x1.conv),
        ("adm", lambda: theirs(x), theirs.Mixed_6d.branch1x1.conv),
    ):
        raw: list[Any] = []
        handle = conv.register_forward_hook(lambda *args, raw=raw: raw.append(args[-1]))
        with torch.inference_mode():
            out = net()
        handle.remove()
        found[f"{name}/spatial"] = raw[0][:, :7].permute(0, 2, 3, 1).flatten(1).numpy()
        pool, *rest = out if isinstance(out, tuple) else (out,)
        found |= {f"{name}/pool": pool.numpy()} | ({f"{name}/logits": rest[0].numpy()} if rest else {})
    return found


def _state_of(torch: Any, cls: Any) -> dict[str, Any]:
    """The state dict of a fresh network, which reads no weights."""
    load, torch.load = torch.load, lambda *_, **__: {}
    keep, cls.load_state_dict = cls.load_state_dict, lambda *_: None
    try:
        return cls("empty", ["2048"], "nothing").state_dict()
    finally:
        torch.load, cls.load_state_dict = load, keep


def resized() -> dict[str, np.ndarray]:
    """Some places of both pictures, resized as torch-fidelity does, 0..255."""
    import torch
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as resize,
    )

    found = {}
    for name in SIZES:
        x = torch.from_numpy(pictures(name)).permute(0, 3, 1, 2).float()
        y = resize(x, size=(299, 299), align_corners=False).permute(0, 2, 3, 1).numpy()
        found[f"resized/{name}"] = y[:, PLACES, PLACES]
    return found


def metrics() -> dict[str, np.ndarray]:
    """torch-fidelity's metrics of features from seeds."""
    import torch
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    samples, references = (torch.from_numpy(sets(count, 8, seed)) for count, seed in ((300, 1), (250, 2)))
    kid = kid_features_to_metric(samples, references, kid_subsets=20, kid_subset_size=100, verbose=False)
    isc = isc_features_to_metric(torch.from_numpy(logits()), splits=3, shuffle=False)
    prc = prc_features_to_metric(samples, references, save_cpu_ram=False, verbose=False)
    values = kid | isc | prc
    return {
        f"metrics/{name.split('_')[0]}/{name.split('_')[-1]}": np.float64(value)
        for name, value in values.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    np.savez_compressed(out, **networks(), **resized(), **metrics())
    print(f"{out}: {out.stat().st_size} bytes")
