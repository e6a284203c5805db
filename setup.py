"""Package metadata lives in pyproject.toml; no compiled extension is built at install (ops build on first use)."""

from setuptools import find_packages, setup

PACKAGES = ("dnnlib", "torch_utils", "training", "eg3d_rlhf")

setup(
    packages=find_packages(include=[f"{name}{suffix}" for name in PACKAGES for suffix in ("", ".*")]),
    package_data={"torch_utils.ops": ["*.cpp", "*.cu", "*.h"]},
)
