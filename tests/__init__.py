"""The tests. A package, because torch-fidelity installs a package `tests` that would be found in our place."""
