"""Kernel templates, their launchers and the operators; the public names are in `patune`."""
