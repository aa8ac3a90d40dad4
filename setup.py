"""Where the sub-packages of `flexref` live: beside it in the repository, inside it once installed."""
from setuptools import find_packages, setup

HOMES = {
    "flexref": "flexref",
    "flexref.backends": "backends",
    "flexref.dispatch": "dispatch",
    "flexref.conformance": "conformance",
}
LINKED = [f"{home}{tail}" for home in ("backends", "dispatch", "conformance") for tail in ("", ".*")]

setup(
    package_dir=HOMES,
    packages=[
        f"{name}.{sub}".rstrip(".")
        for name, home in HOMES.items()
        for sub in ["", *find_packages(home, exclude=LINKED)]
    ],
)
