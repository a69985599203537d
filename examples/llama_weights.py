"""The weights of a Llama of transformers for the graph of ``examples/llama.py``, and back.

A graph takes those of :func:`to_hetu` in its state, as ``state["parameters"]``, and a ``LlamaForCausalLM`` takes the
dict of :func:`to_transformers` as its state. Both models compute the same: rotary embeddings turn the same pairs of
columns, and q, k and v, and gate and up, only stand in one matrix here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from corpus import VOCABULARY
from llama import Config

State = Mapping[str, torch.Tensor]

SAME = {
    "input_layernorm": "norm1",
    "self_attn.o_proj": "attention.out",
    "post_attention_layernorm": "norm2",
    "mlp.down_proj": "mlp.down",
}
"""Parameters of a layer that differ by their names only: transformers' to ours."""

JOINED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Ours that hold several of transformers', one below the other."""

WHOLE = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}

EXPECTED = {
    "vocab_size": VOCABULARY,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""What a Llama's config must say for ``examples/llama.py`` to compute the same."""


def config_of(llama: Any) -> Config:
    """The sizes of a ``transformers.LlamaConfig``.

    Raises:
        ValueError: If the example's model would compute something else.
    """
    for name, value in EXPECTED.items():
        if getattr(llama, name) != value:
            raise ValueError(f"{name} is {getattr(llama, name)!r}, but examples/llama.py has {value!r}")
    rope = getattr(llama, "rope_parameters", None) or {"rope_theta": getattr(llama, "rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default" or rope["rope_theta"] != 10000.0:
        raise ValueError(f"rotary embeddings are {rope}, but examples/llama.py has plain ones of base 10000")
    return Config(
        layers=llama.num_hidden_layers,
        width=llama.hidden_size,
        heads=llama.num_attention_heads,
        kv_heads=llama.num_key_value_heads,
        head_dim=llama.head_dim,
        hidden=llama.intermediate_size,
    )


def to_hetu(state: State) -> dict[str, torch.Tensor]:
    """The parameters of the graph from the state of a ``LlamaForCausalLM``."""
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))
    made = {ours: state[f"{theirs}.weight"] for theirs, ours in WHOLE.items()}
    for i in range(layers):
        theirs, ours = f"model.layers.{i}", f"layer{i}"
        made |= {f"{ours}.{own}": state[f"{theirs}.{name}.weight"] for name, own in SAME.items()}
        made |= {
            f"{ours}.{own}": torch.cat([state[f"{theirs}.{name}.weight"] for name in names])
            for own, names in JOINED.items()
        }
    return made


def to_transformers(parameters: State, config: Config) -> dict[str, torch.Tensor]:
    """The state of a ``LlamaForCausalLM`` from the parameters of the graph."""
    made = {f"{theirs}.weight": parameters[ours] for theirs, ours in WHOLE.items()}
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {"attention.qkv": (q, kv, kv), "mlp.gate_up": (config.hidden, config.hidden)}
    for i in range(config.layers):
        theirs, ours = f"model.layers.{i}", f"layer{i}"
        made |= {f"{theirs}.{name}.weight": parameters[f"{ours}.{own}"] for name, own in SAME.items()}
        for own, names in JOINED.items():
            parts = parameters[f"{ours}.{own}"].split(rows[own])
            made |= {f"{theirs}.{name}.weight": part for name, part in zip(names, parts, strict=True)}
    return made
