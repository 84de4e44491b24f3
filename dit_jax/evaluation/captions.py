"""Samples beside the captions asked for: the CLIP score, and the folders of pictures that benchmarks' scorers read.

Legend: N samples, P prompts, C channels of CLIP's space.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import asdict

import numpy as np
from PIL import Image
from tqdm import tqdm

from dit_jax import paths
from dit_jax.buckets import BucketError
from dit_jax.config import ConfigError
from dit_jax.config.saved import shown
from dit_jax.evaluation.metrics import FILE, append_line
from dit_jax.evaluation.samples import load_pictures, load_prompts, load_provenance
from dit_jax.files import whole_folder
from dit_jax.text.clip import Clip
from dit_jax.text.prompt_sets import read_prompts

BATCH = 32
SIDE_BY_SIDE = 2  # pictures of a row in DPG-Bench's files


def clip_score(images: np.ndarray, captions: list[str], clip: Clip) -> np.ndarray:
    """100 max(cos, 0) of each picture (N, H, W, 3) uint8 and its caption in CLIP's space (arXiv 2104.08718, without
    its factor of 2.5), (N,)."""
    scores = []
    with tqdm(total=len(images), unit="picture", desc="CLIP") as bar:
        for start in range(0, len(images), BATCH):
            pictures, texts = images[start : start + BATCH], captions[start : start + BATCH]
            cosines = np.sum(clip.of_pictures(pictures) * clip.of_captions(texts), axis=1)
            scores.append(100 * np.maximum(cosines, 0))
            bar.update(len(pictures))
    return np.concatenate(scores)


def report(npz: str, place: str) -> str:
    """The CLIP score of a file of samples, by the CLIP of this folder or hub id; also a line in the evaluations of
    their run. Raises ConfigError for what cannot be read, and samples without captions."""
    images, captions = load_pictures(npz)[0], load_prompts(npz)
    clip = Clip.opened(place)
    scores, provenance = clip_score(_in_color(images), captions, clip), load_provenance(npz)
    found = {"clip_score": float(scores.mean()), "clip_score_std": float(scores.std())}
    facts = {"metrics": found, "features": place, "weights_hash": clip.fingerprint, "count": len(images)}
    if provenance.run is not None and paths.is_folder(provenance.run):
        append_line(paths.to_path(provenance.run) / FILE, json.dumps(facts | asdict(provenance)))
    return (
        f"CLIP score {found['clip_score']:.2f} (standard deviation {found['clip_score_std']:.2f}) of {len(images):,} "
        f"pictures with their captions, by {place} ({clip.fingerprint[:12]})"
    )


def write_layout(npz: str, prompts: str, out: str) -> str:
    """Write samples as the scorer of a benchmark reads them; what was written, in a line.

    prompts: the benchmark's own file, from which they were drawn in turn. Of GenEval's records (.jsonl) a folder for
    each prompt, 00000 and so on, with metadata.jsonl and samples/0000.png; of DPG-Bench's folder a PNG for each
    prompt, of four pictures in two rows, or of one. Raises ConfigError where the samples are not of these prompts.
    """
    images, drawn = _in_color(load_pictures(npz)[0]), load_prompts(npz)
    of = read_prompts("--prompts", prompts)
    count = len(of.captions)
    if not of.records and not of.names:
        raise ConfigError(
            f"--prompts is {prompts}; expected GenEval's records (.jsonl) or DPG-Bench's folder"
        )
    if len(images) % count:
        raise ConfigError(
            f"--npz {npz} has {len(images)} samples; expected as many for each of {count} prompts"
        )
    wrong = next((i for i, caption in enumerate(drawn) if caption != of.captions[i % count]), None)
    if wrong is not None:
        asked = of.captions[wrong % count]
        raise ConfigError(
            f"--npz {npz}: sample {wrong} shows {shown(drawn[wrong])}; expected {shown(asked)}, as sample.py "
            f"--prompts {prompts} draws it"
        )
    each = len(images) // count
    if of.names and each not in (1, SIDE_BY_SIDE**2):
        raise ConfigError(f"--npz {npz} has {each} samples for each prompt; expected 1 or {SIDE_BY_SIDE**2}")
    target = paths.from_user(out)
    if paths.is_there(target):
        raise ConfigError(f"--layout is {out}, which exists; expected a new folder")
    try:
        with whole_folder(target) as folder:
            for number in tqdm(range(count), unit="prompt", desc="writing"):
                pictures = images[number::count]
                if of.records:
                    _write_geneval(folder / f"{number:05d}", of.records[number], pictures)
                else:
                    _write_rows(folder / f"{of.names[number]}.png", pictures)
    except BucketError:
        raise
    except OSError as error:
        raise ConfigError(
            f"--layout is {out}, which cannot be written ({error.strerror or error}); expected a place with room"
        ) from None
    return f"{len(images)} pictures of {count} prompts: {out}"


def _write_geneval(folder: pathlib.Path, record: str, pictures: np.ndarray) -> None:
    (folder / "samples").mkdir(parents=True)
    (folder / "metadata.jsonl").write_text(record)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / "samples" / f"{i:04d}.png")


def _write_rows(file: pathlib.Path, pictures: np.ndarray) -> None:
    across = SIDE_BY_SIDE if len(pictures) > 1 else 1
    rows = [np.concatenate(list(row), axis=1) for row in np.split(pictures, len(pictures) // across)]
    Image.fromarray(np.concatenate(rows)).save(file)


def _in_color(images: np.ndarray) -> np.ndarray:
    return np.broadcast_to(images, (*images.shape[:3], 3)) if images.shape[-1] == 1 else images
