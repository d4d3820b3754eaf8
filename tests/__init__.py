"""A package, because torch-fidelity installs one called `tests` that would be found in its place."""
