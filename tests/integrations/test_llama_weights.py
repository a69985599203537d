"""A Llama of transformers and the graph of ``examples/llama.py`` give the same logits with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from corpus import deal
from llama import STRATEGIES, build
from llama_weights import EXPECTED, config_of, to_hetu, to_transformers

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attn_implementation": "sdpa",
}


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("strategy", range(len(STRATEGIES)))
def test_both_models_give_the_same_logits(strategy: int) -> None:
    theirs = llama(seed=1)
    config = config_of(theirs.config)
    ours = build(config, device="cpu")
    ours.graph.load_state_dict(ours.graph.state_dict() | {"parameters": to_hetu(theirs.state_dict())})
    rng = np.random.default_rng(0)
    pack = [rng.integers(0, 256, n) for n in (5, 9, 17)]
    feeds, symbols = ours.feeds(strategy, pack)
    found = ours.graph.run(ours.logits, feeds, int_symbol_dict=symbols, strategy=strategy)
    shards = [found] if isinstance(found, torch.Tensor) else found
    lists = deal(pack, STRATEGIES[strategy].shares)
    cu = [np.cumsum([0, *map(len, documents)], dtype=np.int32) for documents in lists]
    whole = ours.graph.layout(strategy, int_symbol_dict=symbols, cu_seqlens=cu).gather(shards)
    wanted = torch.cat([theirs(torch.from_numpy(document)[None]).logits[0] for document in pack]).detach()
    torch.testing.assert_close(torch.cat(whole) if len(cu) > 1 else whole, wanted, rtol=1e-4, atol=1e-4)


def test_weights_go_there_and_back() -> None:
    theirs, other = llama(seed=1), llama(seed=2)
    other.load_state_dict(to_transformers(to_hetu(theirs.state_dict()), config_of(theirs.config)))
    ids = torch.arange(12)[None]
    assert torch.equal(theirs(ids).logits, other(ids).logits)


OTHER = {
    "vocab_size": 300,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_of_something_else_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        config_of(transformers.LlamaConfig(**SIZES | {name: OTHER[name]}))


def test_rotary_embeddings_of_another_base_are_refused() -> None:
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    with pytest.raises(ValueError, match="rotary embeddings"):
        config_of(transformers.LlamaConfig(**SIZES, rope_parameters=rope))
