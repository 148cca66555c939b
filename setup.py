"""The packages of the wheel: ssdd, dit, latent_cache, configs/ as ssdd/_configs, scripts/ as ssdd_pipeline."""

from setuptools import find_namespace_packages, setup

NAMES = ("ssdd", "dit", "latent_cache")

setup(
    packages=[
        *find_namespace_packages(include=[*NAMES, *(f"{name}.*" for name in NAMES)]),
        "ssdd._configs",
        "ssdd_pipeline",
    ],
    package_dir={"ssdd._configs": "configs", "ssdd_pipeline": "scripts"},
    package_data={"ssdd._configs": ["**/*.yaml"], "ssdd_pipeline": ["report_page.*"]},
)
