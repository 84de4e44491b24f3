"""What pyproject.toml cannot say: the recipes of configs/ are in the package, as dit_jax.recipes."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["dit_jax*"]), "dit_jax.recipes"],
    package_dir={"dit_jax.recipes": "configs"},
)
