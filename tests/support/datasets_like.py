"""Datasets that differ from one that there is in what they say of themselves."""

import dataclasses
import shutil

from dit_jax.data.metadata import METADATA_FILE, load_metadata


def copy_with(folder, other, **changes):
    """Copy the dataset to `other`, a folder that is not there yet, with these changes of its metadata."""
    shutil.copytree(folder, other)
    changed = dataclasses.replace(load_metadata(other), **changes)
    (other / METADATA_FILE).write_text(changed.to_json())
