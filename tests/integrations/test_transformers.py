"""``attn_implementation="hetu"``: models give the same logits, gradients and tokens as with transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from support.compiling import with_constant_floats
from support.hf_models import FAMILIES, documents, make, results, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.masking_utils import causal_mask_function, create_causal_mask

import hetu
from hetu.integrations.transformers import attention, masks

PADS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 9],
    "both": [[0, 1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1, 1]],
    "between": [[0, 1, 1, 0, 1, 1, 0, 0, 1], [1] * 9],
    "all of a row": [[0] * 9, [1] * 9],
    "none": [[1] * 9, [1] * 9],
}


def padded(mask: list[list[int]]) -> dict[str, torch.Tensor]:
    attention_mask = torch.tensor(mask)
    return {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0)}


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Equal but for a part of the largest number."""
    assert not wanted.isnan().any()
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.detach().abs().max()))


def compare(
    family: str,
    ids: torch.Tensor,
    weights: torch.Tensor,
    dtype: torch.dtype = torch.float64,
    other: str = "sdpa",
    given: dict[str, Any] | None = None,
    change: Callable[[Any], Any] = lambda model: model,
    **inputs: Any,
) -> None:
    """A model with hetu's attention and one with another, on tokens of which some have a weight.

    Args:
        family: Which.
        ids: The tokens.
        weights: How much each counts; nothing is asked of the logits of the others.
        dtype: Of the model.
        other: The other attention.
        given: What is given to the model with hetu's attention only.
        change: Of the model with hetu's attention.
        inputs: What is given to both models.
    """
    weights = weights.to(dtype)
    found = results(change(make(family, "hetu", dtype)), weights, ids, **(given or {}), **inputs)
    wanted = results(make(family, other, dtype), weights, ids, **inputs)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    close(found[0][weights != 0], wanted[0][weights != 0], tolerance)
    close(found[1], wanted[1], tolerance)


def weighed(mask: torch.Tensor) -> torch.Tensor:
    """Another weight for each token that is no pad."""
    return mask * torch.linspace(0.5, 1.5, mask.numel()).view_as(mask)


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_dense(self, family: str) -> None:
        compare(family, tokens(2, 9), weighed(torch.ones(2, 9)))

    @pytest.mark.parametrize("pads", PADS)
    def test_padded(self, family: str, pads: str) -> None:
        inputs = padded(PADS[pads])
        compare(family, tokens(2, 9), weighed(inputs["attention_mask"]), **inputs)

    @pytest.mark.parametrize("lengths", [[3, 1, 5], [9], [1] * 9])
    def test_packed(self, family: str, lengths: list[int]) -> None:
        """By positions that begin anew, and by a collator's lengths."""
        packed = documents(lengths)
        positions = {"position_ids": packed.pop("position_ids"), "use_cache": False}
        compare(family, tokens(1, 9), weighed(torch.ones(1, 9)), **positions)
        compare(family, tokens(1, 9), weighed(torch.ones(1, 9)), given=packed, **positions)

    def test_in_float32_against_eager(self, family: str) -> None:
        inputs = padded(PADS["right"])
        compare(family, tokens(2, 9), weighed(inputs["attention_mask"]), torch.float32, "eager", **inputs)

    @pytest.mark.parametrize("cache", [None, "static"])
    def test_generates_the_same(self, family: str, cache: str | None) -> None:
        ids = tokens(2, 7)
        for mask in (torch.ones_like(ids), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])):
            found, wanted = (
                make(family, name).generate(
                    ids, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation=cache
                )
                for name in ("hetu", "sdpa")
            )
            assert torch.equal(found, wanted)


# Lengths


def test_several_documents_per_row() -> None:
    positions = torch.stack([documents([3, 6])["position_ids"][0], documents([4, 4, 1])["position_ids"][0]])
    compare("Llama", tokens(2, 9), weighed(torch.ones(2, 9)), position_ids=positions, use_cache=False)


def test_a_collators_lengths_say_more_than_positions() -> None:
    """Positions that go on through all documents, whose attention sdpa is told by a mask of four dimensions."""
    lengths = [3, 1, 5]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    parts = tokens(1, 9)[0].split(lengths)
    batch = dict(collator([{"input_ids": part.tolist()} for part in parts]))
    found = make("Llama")(**{**batch, "labels": None, "position_ids": torch.arange(9)[None]}, use_cache=False).logits
    document = torch.repeat_interleave(torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(9, 9, dtype=torch.bool).tril()
    close(found, make("Llama", "sdpa")(tokens(1, 9), attention_mask=mask[None, None]).logits, 1e-12)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("pads", [None, "left", "both", "between"])
def test_a_prompt_that_comes_in_pieces(pads: str | None, is_static: bool) -> None:
    """Each piece sees the keys of those before it in the cache."""
    ids, mask = tokens(2, 9), torch.tensor(PADS[pads] if pads else [[1] * 9] * 2)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    model, other = make("Llama"), make("Llama", "sdpa")
    cache = (
        transformers.StaticCache(config=model.config, max_cache_len=16) if is_static else transformers.DynamicCache()
    )
    given = {} if pads is None else {"attention_mask": mask}
    wanted = other(ids, position_ids=position, **given).logits
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        given = {} if pads is None else {"attention_mask": mask[:, :end]}
        out = model(
            ids[:, begin:end], position_ids=position[:, begin:end], past_key_values=cache, use_cache=True, **given
        )
        keep = mask[:, begin:end].bool()
        close(out.logits[keep], wanted[:, begin:end][keep], 1e-12)


@pytest.mark.parametrize("inputs", [padded(PADS["left"]), padded(PADS["between"])], ids=["left", "between"])
def test_a_mask_is_read_once_per_forward(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(masks, "read", lambda *given, _read=masks.read: calls.append(given) or _read(*given))
    model = make("Llama", num_hidden_layers=3)
    for _ in range(2):
        model(tokens(2, 9), **inputs)
    assert len(calls) == 2


def test_a_mask_that_a_model_hands_on_is_read_once_per_version(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Module()
    calls = []
    monkeypatch.setattr(masks, "read", lambda *given, _read=masks.read: calls.append(given) or _read(*given))
    q = torch.randn(2, 4, 9, 8)
    mask = torch.tensor(PADS["left"])
    first, _ = attention.attend(module, q, q, q, mask)
    assert torch.equal(first, attention.attend(module, q, q, q, mask)[0])
    assert len(calls) == 1
    mask[0, 3] = 0
    assert not torch.equal(first, attention.attend(module, q, q, q, mask)[0])
    assert len(calls) == 2


def test_pads_between_tokens_are_neither_seen_nor_computed() -> None:
    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]])
    out, _ = attention.attend(torch.nn.Module(), q, q, q, mask)
    kept = q[:, :, mask[0].bool()]
    wanted = torch.nn.functional.scaled_dot_product_attention(kept, kept, kept, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out[:, mask[0].bool()], wanted)
    assert not out[:, ~mask[0].bool()].any()


@pytest.mark.parametrize("kind", ["Bert", "Bart"])
def test_of_both_directions(kind: str) -> None:
    """An encoder, and one whose decoder attends to it as well."""
    attention.register()
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "Bart":
        sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}
        sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    found = []
    for implementation in ("hetu", "sdpa"):
        config = getattr(transformers, f"{kind}Config")(**sizes)
        config._attn_implementation = implementation
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}Model")(config).double().eval()
        inputs: dict[str, Any] = {"attention_mask": torch.tensor(PADS["right"])}
        if kind == "Bart":  # as many, so that nothing but the mask's kind tells that these are no places of one row
            inputs["decoder_input_ids"] = tokens(2, 9, seed=1)
        out = model(tokens(2, 9), **inputs).last_hidden_state
        found.append(out[inputs["attention_mask"].bool()] if kind == "Bert" else out)
    close(found[0], found[1], 1e-12)


# Heads


@pytest.mark.parametrize(("width", "width_v"), [(6, 6), (12, 12), (24, 16), (8, 12)])
def test_heads_of_any_width(width: int, width_v: int) -> None:
    q, k, v = (torch.randn(2, 4, 7, n, requires_grad=True, dtype=torch.float64) for n in (width, width, width_v))
    found, _ = attention.attend(torch.nn.Module(), q, k, v, None)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    dout = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_are_dropped_in_training_only() -> None:
    ids = tokens(2, 9)
    model = make("Llama", attention_dropout=0.5)
    assert torch.equal(model(ids).logits, make("Llama")(ids).logits)
    model.train()
    torch.manual_seed(3)
    first = model(ids).logits
    assert not torch.allclose(first, model(ids).logits)
    torch.manual_seed(3)
    assert torch.equal(first, model(ids).logits)
    attended = [attention.attend(model.eval(), *[torch.ones(1, 2, 9, 8)] * 3, None, dropout=0.5)[0] for _ in range(2)]
    assert torch.equal(*attended)


# Around the model


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_gradient_checkpointing(family: str, is_reentrant: bool) -> None:
    def checkpointed(model: Any) -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        return model.train()

    inputs = padded(PADS["left"]) | {"use_cache": False}
    compare(family, tokens(2, 9), weighed(inputs["attention_mask"]), change=checkpointed, **inputs)


COMPILED: dict[str, Callable[[int], tuple[torch.Tensor, dict[str, Any], dict[str, Any]]]] = {
    "dense": lambda n: (torch.ones(2, n), {}, {}),
    "padded": lambda n: (torch.ones(2, n).tril(n - 3), padded(torch.ones(2, n).tril(n - 3).long().tolist()), {}),
    "packed": lambda n: (torch.ones(1, n), {"position_ids": documents([2, n - 3, 1])["position_ids"]}, {}),
    "lengths": lambda n: (
        torch.ones(1, n),
        {"position_ids": documents([2, n - 3, 1])["position_ids"]},
        {name: x for name, x in documents([2, n - 3, 1]).items() if name != "position_ids"},
    ),
}


@pytest.mark.parametrize(
    ("kind", "is_checkpointed"), [("dense", False), ("padded", False), ("packed", True), ("lengths", True)]
)
def test_compiled_once_for_all_lengths(kind: str, is_checkpointed: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, other = make("Llama", num_hidden_layers=1), make("Llama", "sdpa", num_hidden_layers=1)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for length in (9, 12, 23):
        weights, inputs, given = COMPILED[kind](length)
        weights, ids = weights.double(), tokens(*weights.shape)
        model.zero_grad()
        with nullcontext() if kind == "dense" else with_constant_floats():
            found = compiled(ids, use_cache=False, **inputs, **given).logits
        scale = torch.linspace(-1, 1, found.shape[-1], dtype=found.dtype)
        (found * scale * weights[..., None]).sum().backward()
        logits, grads = results(other, weights, ids, use_cache=False, **inputs)
        close(found.detach()[weights != 0], logits[weights != 0], 1e-12)
        close(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), grads, 1e-12)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
    if kind == "padded":
        with pytest.raises(hetu.HetuError, match="a pad between two tokens"), with_constant_floats():
            compiled(tokens(2, 9), use_cache=False, **padded(PADS["between"]))


# What is refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_bias", torch.zeros(1, 4, 9, 9)),
        ("head_mask", torch.ones(4)),
        ("output_attentions", True),
    ],
)
def test_what_a_layer_asks_for_is_refused_by_name(name: str, value: Any) -> None:
    q = torch.ones(1, 4, 9, 8)
    with pytest.raises(hetu.HetuError, match=name):
        attention.attend(torch.nn.Module(), q, q, q, None, **{name: value})


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(hetu.HetuError, match="attention_mask of 4 dimensions"):
        make("Llama")(tokens(2, 9), attention_mask=torch.ones(2, 1, 9, 9, dtype=dtype))


def prefix(_: Any, __: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return (kv <= q) | (kv < 3)


def far_away(_: Any, __: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return (kv <= q) & ((kv >= 4) | (q < 4) | (kv == 0))


def chunks(_: Any, __: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return (kv <= q) & (kv > q - 3)


@pytest.mark.parametrize("mask_function", [prefix, far_away, chunks])
def test_a_mask_function_of_another_kind_is_refused(mask_function: Any) -> None:
    mask = masks.make_mask(2, 9, 9, mask_function=mask_function, device="cpu")
    with pytest.raises(hetu.HetuError, match="a mask of the model's own"):
        mask.lengths()


def test_a_mask_function_on_top_of_the_causal_one_is_refused() -> None:
    model = make("Llama")
    embeds = torch.zeros(1, 9, 32)
    with pytest.raises(hetu.HetuError, match="or_mask_function"):
        create_causal_mask(model.config, embeds, None, None, or_mask_function=causal_mask_function)


def test_lengths_beside_pads_are_refused() -> None:
    cu = torch.tensor([0, 3, 9], dtype=torch.int32)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(hetu.HetuError, match="beside an attention_mask with pads"):
        make("Llama")(tokens(1, 9), attention_mask=mask, cu_seq_lens_q=cu, cu_seq_lens_k=cu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Padded, packed, and decoding with both caches."""
    found, wanted = (make("Llama", name, dtype, hidden_size=128).cuda() for name in ("hetu", "sdpa"))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    mask = torch.tensor(PADS["left"], device="cuda")
    packed = {"position_ids": documents([3, 1, 5])["position_ids"].cuda(), "use_cache": False}
    for ids, inputs in ((tokens(2, 9).cuda(), {"attention_mask": mask}), (tokens(1, 9).cuda(), packed)):
        keep = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        close(found(ids, **inputs).logits[keep], wanted(ids, **inputs).logits[keep], tolerance)
    for cache in (None, "static"):
        options = {"attention_mask": mask, "max_new_tokens": 8, "cache_implementation": cache}
        made = [model.float().generate(tokens(2, 9).cuda(), **options) for model in (found, wanted)]
        assert torch.equal(*made)


@pytest.mark.parametrize("has_starts", [False, True])
def test_opcheck_of_lengths(has_starts: bool) -> None:
    keep = torch.tensor([[False, True, True, True], [True, True, True, False]])
    starts = torch.zeros(2, 2, 4, dtype=torch.bool)
    starts[0, :, 0] = True
    sizes = (2, 4, 4, False, "something else")
    call = (None if has_starts else keep, starts if has_starts else None, torch.tensor(0), *sizes)
    torch.library.opcheck(torch.ops.hetu.lengths_of_mask.default, call)
