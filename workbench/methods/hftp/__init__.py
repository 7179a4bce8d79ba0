"""Frequency tagging: streams, spectra, the test, the result."""
