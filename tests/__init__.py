"""A package, so that ranks find this folder and not the `tests` that torch-fidelity installs."""
