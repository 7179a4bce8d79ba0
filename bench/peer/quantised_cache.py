"""transformers' QuantizedCache with the backend of this environment, as bench/kv_cache.py runs it."""

from __future__ import annotations

from serve import serve

from bench._match import Side
from bench.kv_cache import side, wide_subject


def run(backend: str, tokens: int, context: int) -> Side:
    return side(wide_subject(context), backend, tokens)


if __name__ == "__main__":
    serve(run=run)
