"""The packages of the wheel: ssdd, dit, latent_cache, ssdd_pipeline, and configs/ as ssdd/_configs."""

from setuptools import find_namespace_packages, setup

NAMES = ("ssdd", "dit", "latent_cache", "ssdd_pipeline")

setup(
    packages=[*find_namespace_packages(include=[*NAMES, *(f"{name}.*" for name in NAMES)]), "ssdd._configs"],
    package_dir={"ssdd._configs": "configs"},
    package_data={"ssdd._configs": ["**/*.yaml"], "ssdd_pipeline.report": ["page.*"]},
)
