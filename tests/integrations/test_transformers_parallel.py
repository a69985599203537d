"""Models of transformers over several ranks give the logits and gradients of one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from support.context_parallel import Ranks
from support.hf_parallel import difference, make, refusal, tokens, two_threads
from support.longer import LONGER
from support.pool import Pool

import hetu
from hetu.integrations.transformers import context_parallel
from hetu.integrations.transformers.losses import guard_losses

DOCUMENTS = [3, 9, 1, 6]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Pool(2, backend=None) as pool:
        yield Ranks(pool)


@pytest.mark.parametrize("split", ["normal", "sym", "stripe", "balanced"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPT2"])
def test_every_split(ranks: Ranks, family: str, split: str) -> None:
    assert max(ranks.run(difference, family, DOCUMENTS, split)) < 1e-12


@pytest.mark.parametrize("family", ["Qwen2", "Phi3", "Olmo2", "SmolLM3", "Granite", "Gemma", "Glm4"])
def test_every_family(ranks: Ranks, family: str) -> None:
    """Gemma's norms multiply by their weights in float32, whose gradients are sums of that over the rows."""
    assert max(ranks.run(difference, family, DOCUMENTS)) < (1e-6 if family == "Gemma" else 1e-12)


@pytest.mark.parametrize("split", ["sym", "balanced"])
@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "Gemma3", "GptOss", "Cohere2"])
def test_windows_softcaps_and_sinks(ranks: Ranks, family: str, split: str) -> None:
    """Norms of some families are computed in float32, whose gradients are sums of that over the rows."""
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    assert max(ranks.run(difference, family, DOCUMENTS, split)) < 1e-6


def test_chunks_that_hide_keys_are_refused(ranks: Ranks) -> None:
    assert max(ranks.run(difference, "Llama4", [4, 3, 4])) < 1e-6
    for said in ranks.run(refusal, [0, 5, 12], {"family": "Llama4"}):
        assert "attention_chunk_size=4 that hides keys, under context_parallel" in said


@pytest.mark.parametrize("method", ["ring", "direct", "all_gather", "ulysses"])
def test_every_method(ranks: Ranks, method: str) -> None:
    assert max(ranks.run(difference, "Llama", DOCUMENTS, "sym", method)) < 1e-12


@pytest.mark.parametrize("lengths", [[11], [1, 1], [2]])
def test_few_tokens(ranks: Ranks, lengths: list[int]) -> None:
    """One document, whose positions begin anew nowhere, and one token per rank."""
    assert max(ranks.run(difference, "Llama", lengths, "normal")) < 1e-12


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_layers_are_computed_again_when_the_context_is_gone(ranks: Ranks, family: str, checkpointing: str) -> None:
    assert max(ranks.run(difference, family, DOCUMENTS, "sym", "auto", checkpointing)) < 1e-12


@pytest.mark.parametrize("checkpointing", [*([None] if LONGER > 1 else []), "non-reentrant"])
def test_compiled_once_for_all_lengths(ranks: Ranks, checkpointing: str | None) -> None:
    """Of more rows than the table of lengths has: torch.compile takes equal sizes for the same one."""
    assert max(ranks.run(difference, "Llama", [5, 16, 4], "sym", "auto", checkpointing, True)) < 1e-12


def test_the_context_is_a_threads_own(ranks: Ranks) -> None:
    assert ranks.run(two_threads) == [[False, False, False]] * 2


def test_a_rank_without_tokens_is_refused_on_all_ranks(ranks: Ranks) -> None:
    for said in ranks.run(refusal, [0, 1], {}):
        assert "rank 0 of the group holds no tokens" in said


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, "nothing"),
        ({"position_ids": None}, "position_ids are not those of this rank's rows"),
        ({"position_ids": torch.arange(6)[None]}, "position_ids are not those of this rank's rows"),
        ({"input_ids": torch.ones(1, 5, dtype=torch.int64)}, "the model is given 1 x 5 tokens, but this rank holds 6"),
        ({"input_ids": torch.ones(2, 6, dtype=torch.int64)}, "the model is given 2 x 6 tokens"),
        ({"attention_mask": torch.ones(1, 6, dtype=torch.int64)}, "an attention_mask is given"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "cu_seq_lens_q is given under context_parallel"),
        ({"labels": torch.ones(1, 6, dtype=torch.int64)}, "the model is given labels under context_parallel"),
    ],
)
def test_what_is_not_this_ranks_is_refused(ranks: Ranks, inputs: dict[str, Any], text: str) -> None:
    for said in ranks.run(refusal, [0, 5, 12], inputs):
        assert text in said


def test_something_else_than_a_context_parallel_is_refused() -> None:
    with pytest.raises(hetu.HetuError, match="expected cp to be a ContextParallel"), context_parallel(3):  # type: ignore[arg-type]
        pass


def test_labels_are_as_ever_outside_of_a_context() -> None:
    model, ids = make("Llama"), tokens(1, 6)
    before = model(ids, labels=ids).loss
    guard_losses(lambda: None)
    assert torch.equal(model(ids, labels=ids).loss, before)
