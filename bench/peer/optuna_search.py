"""NSGA-II of optuna, as bench/bit_search.py runs it."""

from __future__ import annotations

from serve import serve

from bench._match import Side
from bench.bit_search import published


def search(layers: int, trials: int) -> Side:
    return lambda: published(layers, trials)


if __name__ == "__main__":
    serve(search=search)
