"""Tokens per second of a training step of a Llama of transformers over several GPUs, three ways.

``hetu``: FSDP2 over all ranks, and each pack over all of them by context parallelism. ``torch``: FSDP2 and torch's
``context_parallel`` over cuDNN's attention, for one document, the only case that it knows. ``data parallel``: FSDP2,
and each document whole on one rank, without padding, by hetu's kernels. Parameters, documents and losses are the same;
a peer whose first loss is over 1 % from hetu's is left out. A step is forward, backward and AdamW; ranks meet before
each, and the slowest counts.

    torchrun --nproc-per-node 2 benchmarks/model.py [--sizes 0.7B 1.5B] [--tokens 16384 65536] [--packs one mix]
        [--peers hetu torch "data parallel"] [--steps 6] [--recompute] [--out DIR]

To try it out without GPUs: ``torchrun --nproc-per-node 2 benchmarks/model.py --tiny``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from attention_cases import document_lengths
from tables import ROOT
from timing import about, first_line
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

import hetu
import hetu.integrations.transformers as hetu_transformers

SIZES = {
    "0.7B": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 12},
    "1.5B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 30, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""Of the models; all have four key heads and 32,000 words."""

WORDS, KV_HEADS, IGNORED, MOST_APART = 32_000, 4, -100, 0.01


@dataclass(frozen=True)
class Line:
    """One line of the results: of a peer that was left out ``tokens_per_second`` is None, and ``note`` says why."""

    size: str
    tokens: int
    pack: str
    peer: str
    tokens_per_second: float | None
    milliseconds: float | None
    loss: float | None
    gigabytes: float | None
    note: str = ""


@dataclass(frozen=True)
class Task:
    """What every peer is given: the pack, its labels, and where to compute."""

    lengths: list[int]
    ids: torch.Tensor
    mesh: DeviceMesh
    device: torch.device

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @property
    def labels(self) -> torch.Tensor:
        """The next token of each token; none of a document's last one."""
        labels = self.ids.roll(-1)
        labels[self.cu_seqlens[1:].to(self.device) - 1] = IGNORED
        return labels


Loss = Callable[[torch.nn.Module], torch.Tensor]
"""The loss of a forward, scaled so that the mean over ranks, as FSDP2 takes it of gradients, is that of all tokens."""


def by_hetu(task: Task) -> tuple[str, Loss]:
    """The attention's name, and the loss over this rank's rows of the pack."""
    cp = hetu.functional.ContextParallel(task.cu_seqlens, task.mesh, split="balanced", device=task.device)
    ids, labels = cp.dispatch(task.ids)[None], cp.dispatch(task.labels)

    def loss(model: torch.nn.Module) -> torch.Tensor:
        with hetu_transformers.context_parallel(cp):
            out = model(ids, position_ids=cp.position_ids[None], use_cache=False)
        return cp.token_mean(summed(out.logits[0], labels), labels, ignore_index=IGNORED)

    return "hetu", loss


def by_torch(task: Task) -> tuple[str, Loss]:
    """The same by torch's ``context_parallel``."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if len(task.lengths) > 1:
        raise ValueError("it knows no packed documents")
    positions = torch.arange(len(task.ids), device=task.device)
    counted = int((task.labels != IGNORED).sum())
    backend = SDPBackend.CUDNN_ATTENTION if task.device.type == "cuda" else SDPBackend.FLASH_ATTENTION

    def loss(model: torch.nn.Module) -> torch.Tensor:
        buffers = [x[None].clone() for x in (task.ids, positions, task.labels)]
        with ExitStack() as stack:
            stack.enter_context(context_parallel(task.mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1]))
            stack.enter_context(sdpa_kernel(backend))
            ids, position_ids, labels = (x.clone() for x in buffers)
            out = model(ids, position_ids=position_ids, use_cache=False)
            total = summed(out.logits[0], labels[0]) * (task.mesh.size() / counted)
            total.backward()  # within it: the backward attends over all ranks as well
        return total.detach()

    AttentionInterface.register("causal sdpa", causal_sdpa)
    return "causal sdpa", loss


def causal_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Torch's attention without a mask: transformers takes the positions of a rank's rows for a pack's.

    Key heads are repeated, because torch's ``context_parallel`` fails on fewer ones.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    attend = torch.nn.functional.scaled_dot_product_attention  # looked up here: the context replaces it
    return attend(query, key, value, is_causal=True, scale=scaling).transpose(1, 2).contiguous(), None


def by_documents(task: Task) -> tuple[str, Loss]:
    """Each document whole on one rank: the longest ones first, each to the rank that has fewest pairs."""
    own = dealt(task.lengths, task.mesh.size())[task.mesh.get_local_rank()]
    if not all(dealt(task.lengths, task.mesh.size())):
        raise ValueError("there are fewer documents than ranks")
    begins = task.cu_seqlens.tolist()
    rows = torch.cat([torch.arange(begins[d], begins[d + 1]) for d in own]).to(task.device)
    positions = torch.cat([torch.arange(task.lengths[d]) for d in own]).to(task.device)
    cu_seqlens = torch.tensor([0, *(task.lengths[d] for d in own)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest, ids, labels = max(task.lengths[d] for d in own), task.ids[rows][None], task.labels[rows]
    counted = int((task.labels != IGNORED).sum())

    def loss(model: torch.nn.Module) -> torch.Tensor:
        out = model(
            ids,
            position_ids=positions[None],
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        )
        return summed(out.logits[0], labels) * (task.mesh.size() / counted)

    return "hetu", loss


PEERS: dict[str, Callable[[Task], tuple[str, Loss]]] = {
    "hetu": by_hetu,
    "torch": by_torch,
    "data parallel": by_documents,
}


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def dealt(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """The documents of each rank.

    Example:
        >>> dealt([4, 1, 3], 2)
        [[0], [2, 1]]
    """
    own: list[list[int]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        rank = min(range(ranks), key=work.__getitem__)
        own[rank].append(document)
        work[rank] += lengths[document] ** 2
    return own


def made(size: str, attention: str, task: Task, recompute: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model, sharded over all ranks, and its optimiser: the same parameters whatever the attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[size], vocab_size=WORDS, num_key_value_heads=KV_HEADS, max_position_embeddings=len(task.ids)
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(task.device)
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options: dict[str, Any] = {"mesh": task.mesh}
    if task.device.type == "cuda":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=task.device.type == "cuda")


def measure(size: str, task: Task, peer: str, steps: int, recompute: bool) -> tuple[list[float], float, float]:
    """Seconds of each step, the first loss over all tokens, and GB held at most, of the slowest and largest rank."""
    attention, loss_of = PEERS[peer](task)
    model, optimizer = made(size, attention, task, recompute)
    is_cuda = task.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for _ in range(steps + 2):  # two to warm up
        if is_cuda:
            torch.cuda.synchronize()
        dist.barrier()
        start = perf_counter()
        loss = loss_of(model)
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if is_cuda:
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
        losses.append(loss.detach())
    held = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else 0.0
    said = torch.tensor([*times[2:], held], dtype=torch.float64, device=task.device)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    dist.all_reduce(losses[0])
    *slowest, most = said.tolist()
    return slowest, float(losses[0]) / task.mesh.size(), most


def lines(arguments: argparse.Namespace, mesh: DeviceMesh, device: torch.device) -> Iterator[Line]:
    """All lines, as they are measured."""
    for size, tokens, pack in product(arguments.sizes, arguments.tokens, arguments.packs):
        ids = torch.randint(WORDS, (tokens,), generator=torch.Generator().manual_seed(1)).to(device)
        task, right = Task(document_lengths(pack, tokens), ids, mesh, device), None
        for peer in arguments.peers:
            line = partial(Line, size, tokens, pack, peer)
            try:
                times, loss, held = measure(size, task, peer, arguments.steps, arguments.recompute)
            except Exception as failure:  # of whatever kind; it is the same on all ranks
                yield line(None, None, None, None, first_line(failure))
                continue
            right = loss if right is None else right
            if abs(loss - right) > MOST_APART * abs(right):
                yield line(None, None, loss, held, f"its loss is {loss:.4f}, not {right:.4f}")
                continue
            yield line(tokens / median(times), median(times) * 1e3, loss, held)


def join() -> torch.device:
    """Joins the processes of torchrun."""
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo")
    return device


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.7B", "1.5B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16_384, 65_536])
    parser.add_argument("--packs", nargs="+", choices=("one", "mix"), default=["one", "mix"])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed")
    parser.add_argument("--recompute", action="store_true", help="compute layers again in the backward")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="a small model and few tokens, on gloo in float32")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.sizes, arguments.tokens, arguments.steps = ["tiny"], [256], 1
    return arguments


def main() -> None:
    arguments = parse()
    if "RANK" not in os.environ:
        sys.exit("start this with torchrun --nproc-per-node 2")
    device = join()
    if device.type != "cuda" and not arguments.tiny:
        sys.exit("this needs CUDA devices; --tiny tries the script out")
    hetu_transformers.register()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("ranks",))
    found: list[Line] = []
    told = about("benchmarks/model.py", device.type, sys.argv[1:]) | {"ranks": str(dist.get_world_size())}
    for line in lines(arguments, mesh, device):
        found.append(line)
        if dist.get_rank():
            continue
        rate = "left out: " + line.note if line.tokens_per_second is None else f"{line.tokens_per_second:,.0f} tokens/s"
        print(f"{line.size} {line.tokens:>7} {line.pack:<4} {line.peer:<14} {rate}", flush=True)
        kept = {**told, "lines": [asdict(one) for one in found]}  # after every line, so that nothing is lost
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = f"model_{'tiny' if arguments.tiny else told['device'].split()[-1].lower()}.json"
        (arguments.out / name).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
