"""Tiny models of transformers, with random weights, and batches for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

VOCABULARY = 64

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Qwen2": SIZES,
    "Qwen3": SIZES | {"head_dim": 16},
    "Qwen3Moe": SIZES | EXPERTS,
    "Phi3": SIZES,
    "Olmo2": SIZES,
    "SmolLM3": SIZES,
    "Granite": SIZES | {"attention_multiplier": 0.3},
    "Gemma": SIZES | {"head_dim": 16},
    "GPT2": GPT2,
    "Glm4": SIZES | {"head_dim": 8},
}
"""Every family without windows that is tested, and the sizes of its model."""

ONE_OF_EACH = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "sliding_window": 4}
LLAMA4 = {"attention_chunk_size": 4, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}

WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": SIZES | {"sliding_window": 4},
    "Gemma2": SIZES | ONE_OF_EACH | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Gemma3": SIZES | ONE_OF_EACH | {"query_pre_attn_scalar": 8},
    "GptOss": SIZES | ONE_OF_EACH | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Cohere2": SIZES | ONE_OF_EACH,
    "Llama4": SIZES
    | LLAMA4
    | {"intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
}
"""Every family with windows or chunks of 4 tokens, which hide keys."""

TEXT = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text"}
"""What the configurations of models are called that have other parts too."""


def make(family: str, implementation: str = "hetu", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model; the weights are the same whatever the implementation of its attention."""
    import transformers

    from hetu.integrations.transformers import register

    register()
    sizes = (FAMILIES | WINDOWED)[family]
    config = getattr(transformers, f"{TEXT.get(family, family)}Config")(**(sizes | changes))
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    config._attn_implementation, config._experts_implementation = implementation, "eager"
    model = getattr(transformers, family + kind)(config)
    for parameter in model.parameters():  # biases and norms begin as zeros and ones, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


@contextmanager
def exact_softmax() -> Iterator[None]:
    """Lets transformers' own attention compute float64 in float64, where it asks for float32."""
    plain = functional.softmax

    def softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None, **others: Any) -> torch.Tensor:
        return plain(x, dim, dtype=None if x.dtype == torch.float64 else dtype, **others)

    functional.softmax = softmax  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.softmax = plain


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 ``(batch, length)``; none of the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def documents(lengths: list[int]) -> dict[str, torch.Tensor]:
    """What ``DataCollatorWithFlattening`` gives of documents of these lengths."""
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
    }


def results(model: Any, weights: torch.Tensor, ids: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and the gradients of all parameters in one tensor.

    Args:
        model: The model.
        weights: ``(batch, length)``, how much each token's loss counts.
        ids: The tokens.
        inputs: What else the model is given.
    """
    model.zero_grad()
    logits = model(ids, **inputs).logits
    scale = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    (logits * scale * weights[..., None]).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return logits.detach(), torch.cat([grad.flatten() for grad in grads])


def results_of_each(
    model: Any, weights: torch.Tensor, ids: torch.Tensor, lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``results``, of documents that a model is given one by one: the only way for models that know no packs."""
    logits, grads = [], []
    for part, own in zip(ids.split(lengths, 1), weights.split(lengths, 1), strict=True):
        found = results(model, own, part, use_cache=False)
        logits.append(found[0])
        grads.append(found[1])
    return torch.cat(logits, 1), torch.stack(grads).sum(0)
