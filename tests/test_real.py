"""A third-party checkpoint that this project did not make, where WORKBENCH_REAL names a folder that holds it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from workbench import Subject

REAL = os.environ.get("WORKBENCH_REAL")
pytestmark = pytest.mark.skipif(not REAL, reason="WORKBENCH_REAL names no folder of real models")


@pytest.fixture(scope="module")
def stories260k() -> Subject:
    return Subject.load(Path(str(REAL)) / "models" / "stories260k")


def test_perplexity_on_its_stories_is_what_transformers_computes(stories260k: Subject) -> None:
    """5.45 on the first 200 stories, cut to the context, begin token included, mean over stories of nats per token.

    The stories hold broken quotation marks ("â€œ"), which cost much: with ASCII characters alone it is 4.66.
    """
    texts = json.loads((Path(str(REAL)) / "data" / "tinystories_300.json").read_text())[:200]
    ours = stories260k.nll(texts, cut=True)
    for index in range(0, 200, 20):
        ids = stories260k.tokenizer([texts[index]], return_tensors="pt", verbose=False)["input_ids"][:, :512]
        with torch.no_grad():
            loss = stories260k.model(input_ids=ids, labels=ids).loss
        assert float(ours[index]) == pytest.approx(float(loss), rel=1e-4)  # float32, padded against alone
    assert float(ours.mean().exp()) == pytest.approx(5.45, abs=0.02)
    plain = [text.encode("ascii", "ignore").decode() for text in texts]
    assert float(stories260k.nll(plain, cut=True).mean().exp()) == pytest.approx(4.66, abs=0.02)


def test_greedy_text_from_the_begin_token_is_the_published_one(stories260k: Subject) -> None:
    text = stories260k.generate([""], max_new_tokens=60).texts[0]
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
