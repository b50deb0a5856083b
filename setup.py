"""Which files belong to the package. What it needs, its name and its extras are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # conf/ stays at the top of a checkout, where people edit it, and travels inside the package as rlkit/conf.
    packages=[
        *find_packages(include=["rlkit", "rlkit.*", "rewards", "rewards.*", "algorithms", "algorithms.*"]),
        "rlkit.conf",
    ],
    package_dir={"rlkit.conf": "conf"},
    package_data={
        "rlkit": [
            "config/*.yaml",
            "models/*.json",
            "view/*.html",
            "embedded/**/*.safetensors",
            "embedded/**/*.json",
            "embedded/**/*.jinja",
        ],
        "rlkit.conf": ["*.yaml", "*/*.yaml", "*/*/*.yaml"],
    },
)
