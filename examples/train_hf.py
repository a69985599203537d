"""Trains a Llama of transformers on Python's standard library: FSDP2 over all ranks, attention over some of them.

Ranks form a mesh: ``--cp`` of them hold the tokens of one pack of documents together, and FSDP2 shards parameters over
all. The documents of a step are the same however many ranks there are, and so are its losses. A run goes on with
another number of ranks, or another ``--cp``, from its last checkpoint.

    torchrun --nproc-per-node 2 examples/train_hf.py                        # on a CPU, or a GPU per process
    torchrun --nproc-per-node 4 examples/train_hf.py --cp 2 --checkpoint runs/hf --stop 30
    torchrun --nproc-per-node 2 examples/train_hf.py --checkpoint runs/hf    # goes on
    torchrun --nproc-per-node 8 examples/train_hf.py --cp 4 --dtype bfloat16 --layers 24 --width 1536 --heads 12 \
        --kv-heads 4 --hidden 4096 --tokens 131072 --longest 65536 --steps 500 --recompute
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from corpus import VOCABULARY, cut, deal, fill, read_files
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from train_lm import warmup_and_cosine
from transformers import AutoModelForCausalLM, LlamaConfig

import hetu
import hetu.integrations.transformers as hetu_transformers

IGNORED = -100


def main() -> None:
    arguments = parse()
    device = join()
    world = dist.get_world_size()
    cp_size = arguments.cp or world
    if world % cp_size:
        raise SystemExit(f"--cp {cp_size} doesn't divide the {world} ranks")
    mesh = init_device_mesh(device.type, (world // cp_size, cp_size), mesh_dim_names=("dp", "cp"))
    console = Console(quiet=dist.get_rank() != 0)
    torch.manual_seed(arguments.seed)
    run = Run(*make_model(arguments, mesh, device))
    resume(run, arguments.checkpoint, console)
    packs = fill(cut(read_files(), min(arguments.longest, arguments.tokens)), arguments.tokens)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    console.print(f"{parameters:,} parameters, {mesh.shape[0]} x {cp_size} ranks on {device.type}", highlight=False)
    start, first = time.perf_counter(), len(run.losses)
    with progress(console) as bar:
        task = bar.add_task("", total=arguments.steps, completed=first, loss=math.nan, rate=0.0, memory=0.0)
        last = arguments.steps if arguments.stop is None else min(arguments.stop, arguments.steps)
        for step in range(first, last):
            began = time.perf_counter()
            loss = run_step(run, packs[step % len(packs)], mesh, device, arguments)
            run.losses.append(loss)
            rate = sum(map(len, packs[step % len(packs)])) / (time.perf_counter() - began)
            bar.update(task, advance=1, loss=loss, rate=rate, memory=memory_of(device))
            if arguments.checkpoint and ((step + 1) % arguments.save_every == 0 or step + 1 == last):
                dcp.save({"run": run}, checkpoint_id=arguments.checkpoint / f"step{step + 1}")
    report(console, run.losses, first, time.perf_counter() - start)
    if arguments.losses and dist.get_rank() == 0:
        arguments.losses.write_text(json.dumps(run.losses), encoding="utf-8")
    dist.destroy_process_group()


def join() -> torch.device:
    """Joins the other processes of torchrun, if there are any; gives this one's device."""
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def make_model(
    arguments: argparse.Namespace, mesh: DeviceMesh, device: torch.device
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model, whose parameters are sharded over all ranks, and its optimiser. Nothing here depends on lengths."""
    hetu_transformers.register()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.width,
        intermediate_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=arguments.longest,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hetu").to(device)
    model.train()
    if arguments.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options: dict[str, Any] = {"mesh": mesh["dp", "cp"]._flatten("fsdp")}
    if arguments.dtype == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model, torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95))


def run_step(
    run: Run, pack: list[np.ndarray], mesh: DeviceMesh, device: torch.device, arguments: argparse.Namespace
) -> float:
    """One update from a pack of documents, of which each group of ranks takes its share; gives the mean loss."""
    shares = deal(pack, (1,) * mesh.shape[0])
    if any(sum(map(len, share)) < mesh.shape[1] for share in shares):  # all ranks see it
        raise SystemExit(f"a pack of {len(pack)} documents is too small for a mesh of {mesh.shape}: raise --tokens")
    documents = shares[mesh.get_local_rank("dp")]
    cu_seqlens = torch.tensor([0, *map(len, documents)]).cumsum(0)
    cp = hetu.functional.ContextParallel(
        cu_seqlens, mesh["cp"], split=arguments.split, method=arguments.method, device=device
    )
    ids = torch.from_numpy(np.concatenate(documents)).to(device, torch.int64)
    labels = cp.dispatch(cp.next_tokens(ids, ignore_index=IGNORED))
    with hetu_transformers.context_parallel(cp):
        out = run.model(cp.dispatch(ids)[None], position_ids=cp.position_ids[None], use_cache=False)
    loss_sum = cross_entropy(out.logits[0].float(), labels, ignore_index=IGNORED, reduction="sum")
    loss = cp.token_mean(loss_sum, labels, ignore_index=IGNORED)  # over all ranks, as FSDP2 averages gradients
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for group in run.optimizer.param_groups:
        group["lr"] = arguments.lr * warmup_and_cosine(len(run.losses), arguments.steps)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return float(loss.detach())


class Run(Stateful):
    """All that a run needs to go on, whoever holds which part of it."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.losses = list(state["losses"])


def resume(run: Run, path: Path | None, console: Console) -> None:
    """Goes on from the newest checkpoint that is whole, if there is one; its metadata is written last."""
    found = [] if path is None else [int(file.parent.name[4:]) for file in path.glob("step*/.metadata")]
    if path is not None and found:
        dcp.load({"run": run}, checkpoint_id=path / f"step{max(found)}")
        console.print(f"resumed after {len(run.losses)} steps", highlight=False)


def memory_of(device: torch.device) -> float:
    """The most memory that this process has held, in GiB: of its GPU, or of the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def progress(console: Console) -> Progress:
    return Progress(
        MofNCompleteColumn(),
        BarColumn(30),
        TextColumn(
            "loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s  {task.fields[memory]:.2f} GiB per rank"
        ),
        TimeElapsedColumn(),
        console=console,
    )


def report(console: Console, losses: list[float], first: int, seconds: float) -> None:
    if len(losses) > first:
        tail = losses[-5:]
        done = f"{len(losses) - first} steps in {seconds:.0f} s"
        console.print(
            f"{done}: loss {losses[0]:.3f} at the first step, {np.mean(tail):.3f} over the last {len(tail)}",
            highlight=False,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--stop", type=int, help="stop after this step, to go on another time")
    parser.add_argument("--cp", type=int, help="ranks that hold the tokens of a pack together; by default all")
    parser.add_argument("--split", default="balanced", help="which tokens of a pack each of them holds")
    parser.add_argument("--method", default="auto", help="how they reach each other's keys and values")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step, of all ranks together")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a document; longer files are cut")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--recompute", action="store_true", help="compute each layer again in the backward")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="folder of checkpoints; a run goes on from the newest one")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--losses", type=Path, help="file for the losses, as a JSON list")
    return parser.parse_args()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
