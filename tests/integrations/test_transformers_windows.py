"""Models of transformers with windows, chunks, softcaps and sinks give the same as with transformers' own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from support.compiling import with_constant_floats
from support.hf_models import WINDOWED, documents, exact_softmax, make, results, results_of_each, tokens
from support.longer import LONGER
from torch._dynamo.testing import CompileCounterWithBackend

import hetu
from hetu.functional import attn_varlen
from hetu.integrations.transformers import attention, masks

THERE = [family for family in WINDOWED if hasattr(transformers, f"{family}ForCausalLM")]

PADS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9],
    "both": [[0, 1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1, 1]],
}


def padded(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Equal but for a part of the largest number."""
    assert not wanted.isnan().any()
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.detach().abs().max()))


def compare(family: str, mask: torch.Tensor, dtype: torch.dtype = torch.float64, **inputs: Any) -> None:
    """Logits and gradients, of tokens that are no pads."""
    weights = (mask * torch.linspace(0.5, 1.5, mask.numel()).view_as(mask)).to(dtype)
    ids = tokens(*mask.shape)
    found = results(make(family, "hetu", dtype), weights, ids, **inputs)
    with exact_softmax():
        wanted = results(make(family, "eager", dtype), weights, ids, **inputs)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    close(found[0][weights != 0], wanted[0][weights != 0], tolerance)
    close(found[1], wanted[1], tolerance)


@pytest.mark.parametrize("family", THERE)
class TestFamilies:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dense(self, family: str, dtype: torch.dtype) -> None:
        compare(family, torch.ones(2, 11), dtype)

    @pytest.mark.parametrize("pads", PADS)
    def test_padded(self, family: str, pads: str) -> None:
        mask = torch.tensor(PADS[pads])
        compare(family, mask, **padded(mask))

    @pytest.mark.parametrize("lengths", [[3, 1, 7], [11], [1] * 11])
    def test_packed(self, family: str, lengths: list[int]) -> None:
        """By positions that begin anew, and by a collator's lengths: some tell a mask of the former nothing."""
        packed = documents(lengths)
        compare(family, torch.ones(1, 11), position_ids=packed["position_ids"], use_cache=False)
        if family == "Llama4":
            with pytest.raises(hetu.HetuError, match="attention_chunk_size=4 beside cu_seq_lens_q"):
                make(family)(tokens(1, 11), use_cache=False, **packed)
            return
        weights, ids = torch.linspace(0.5, 1.5, 11, dtype=torch.float64)[None], tokens(1, 11)
        found = results(make(family), weights, ids, use_cache=False, **packed)
        with exact_softmax():
            wanted = results_of_each(make(family, "eager"), weights, ids, lengths)
        close(found[0], wanted[0], 1e-6)  # norms in float32
        close(found[1], wanted[1], 1e-6)

    @pytest.mark.parametrize("cache", [None, "static"])
    def test_generates_the_same(self, family: str, cache: str | None) -> None:
        ids = tokens(2, 7)
        for mask in (torch.ones_like(ids), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])):
            given = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
            found = make(family).generate(ids, attention_mask=mask, **given)
            with exact_softmax():
                assert torch.equal(found, make(family, "eager").generate(ids, attention_mask=mask, **given))

    @pytest.mark.parametrize("kind", ["sliding", "whole", "static"])
    def test_a_prompt_that_comes_in_pieces(self, family: str, kind: str) -> None:
        """Each piece sees the keys of those before it in a cache, which holds a window of them or all."""
        model, mask = make(family), torch.tensor(PADS["left"])
        ids, position = tokens(2, 9), padded(mask)["position_ids"]
        caches = {
            "sliding": lambda: transformers.DynamicCache(config=model.config),
            "whole": transformers.DynamicCache,
            "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=16),
        }
        with exact_softmax():
            wanted = make(family, "eager")(ids, position_ids=position, attention_mask=mask).logits
        cache = caches[kind]()
        for begin, end in ((0, 5), (5, 6), (6, 9)):
            given = {"attention_mask": mask[:, :end], "position_ids": position[:, begin:end]}
            out = model(ids[:, begin:end], past_key_values=cache, use_cache=True, **given)
            keep = mask[:, begin:end].bool()
            close(out.logits[keep], wanted[:, begin:end][keep], 1e-6 if family == "Llama4" else 1e-12)


# A dense batch is compiled of a Llama: with windows it is what a padded one is, but for its pads.
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("Gemma2", "padded"),
        ("Mistral", "packed"),
        *([("Gemma2", "dense"), ("Gemma2", "packed")] if LONGER > 1 else []),
    ],
)
def test_compiled_once_for_all_lengths(family: str, kind: str) -> None:
    """Two layers of Gemma2 differ in their windows; all of Mistral have the same."""
    if family not in THERE:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    sizes = {"num_hidden_layers": 1} if family == "Mistral" else {}
    model, other = make(family, **sizes), make(family, "eager", **sizes)
    compiled, counts = torch.compile(model, fullgraph=True, dynamic=True, backend=counter), []
    for length in (9, 12, 23):
        mask = torch.ones(1 if kind == "packed" else 2, length).tril(length - 3 if kind == "padded" else length)
        inputs: dict[str, Any] = padded(mask.long()) if kind == "padded" else {}
        if kind == "packed":
            inputs = {"position_ids": documents([2, length - 3, 1])["position_ids"]}
        weights, ids = mask.double(), tokens(*mask.shape)
        with with_constant_floats():
            found = results(compiled, weights, ids, use_cache=False, **inputs)
        with exact_softmax():
            wanted = results(other, weights, ids, use_cache=False, **inputs)
        close(found[0][weights != 0], wanted[0][weights != 0], 1e-12)
        close(found[1], wanted[1], 1e-12)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("pads", [None, *PADS])
@pytest.mark.skipif(not hasattr(transformers, "ModernBertModel"), reason="no such model")
def test_windows_of_both_directions(pads: str | None) -> None:
    """An encoder whose layers see three tokens to each side, or all."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    others = {"num_attention_heads": 4, "local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0}
    mask, found = torch.tensor(PADS[pads]) if pads else torch.ones(2, 9, dtype=torch.int64), []
    attention.register()
    for implementation in ("hetu", "sdpa"):
        config = transformers.ModernBertConfig(**sizes, **others, cls_token_id=1, sep_token_id=2, bos_token_id=1)
        config._attn_implementation = implementation
        torch.manual_seed(0)
        model = transformers.ModernBertModel(config).double().eval()
        found.append(model(tokens(2, 9), attention_mask=mask).last_hidden_state[mask.bool()])
    close(found[0], found[1], 1e-12)


# A layer's own arguments


def layer(**options: Any) -> torch.Tensor:
    q = torch.randn(1, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    return attention.attend(torch.nn.Module(), q, q, q, None, **options)[0][0]


def test_what_a_layer_asks_for_beside_a_mask_that_says_nothing_of_it() -> None:
    q = torch.randn(1, 4, 9, 8, generator=torch.Generator().manual_seed(0))[0].transpose(0, 1)
    cu, sinks = torch.tensor([0, 9]), torch.linspace(-1, 1, 4)
    found = layer(sliding_window=3, softcap=2.0, s_aux=sinks)
    assert torch.equal(found, attn_varlen(q, q, q, cu, cu, window_size=(2, 0), softcap=2.0, sinks=sinks))
    both = layer(sliding_window=3, is_causal=False)
    assert torch.equal(both, attn_varlen(q, q, q, cu, cu, window_size=(2, 2)))


def test_a_layers_own_window_to_both_sides_beside_pads_is_refused() -> None:
    q = torch.randn(1, 4, 9, 8)
    for options in ({"is_causal": True}, {"sliding_window": None}):
        given: dict[str, Any] = {"is_causal": False, "sliding_window": 3, **options}
        attention.attend(torch.nn.Module(), q, q, q, torch.tensor(PADS["left"])[:1], **given)
    with pytest.raises(hetu.HetuError, match="sliding_window=3 to both sides"):
        attention.attend(torch.nn.Module(), q, q, q, torch.tensor(PADS["left"])[:1], is_causal=False, sliding_window=3)


def test_a_window_that_hides_nothing_is_causal_attention() -> None:
    """Bit for bit: it is planned as such."""
    model, ids = make("Mistral", sliding_window=9), tokens(1, 9)
    other = make("Mistral", sliding_window=None)
    assert torch.equal(model(ids).logits, other(ids).logits)
    positions = {"position_ids": documents([3, 9, 4])["position_ids"], "use_cache": False}
    assert torch.equal(model(tokens(1, 16), **positions).logits, other(tokens(1, 16), **positions).logits)


def test_a_window_over_pads_between_tokens_is_refused() -> None:
    """The window counts these pads; one that is as long as the row hides nothing."""
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0, 1], [1] * 9])
    with pytest.raises(hetu.HetuError, match="a window over pads between tokens"):
        make("Mistral")(tokens(2, 9), attention_mask=mask)
    ids, given = tokens(2, 9)[:1], {"attention_mask": mask[:1]}
    with exact_softmax():
        wanted = make("Mistral", "eager", sliding_window=8)(ids, **given).logits
    close(make("Mistral", sliding_window=8)(ids, **given).logits[mask[:1] == 1], wanted[mask[:1] == 1], 1e-12)


def far_away(_: Any, __: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return (kv <= q) & ((kv > q - 4) | (kv == 0))


def longer(_: Any, __: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return (kv <= q) & (kv > q - 5)


@pytest.mark.parametrize("mask_function", [far_away, longer])
def test_a_window_of_another_kind_is_refused(mask_function: Any) -> None:
    mask = masks.make_mask(2, 9, 9, mask_function=mask_function, local_size=4, device="cpu")
    with pytest.raises(hetu.HetuError, match="a mask of the model's own"):
        mask.lengths()
