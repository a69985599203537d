"""Trains a byte-level Llama-style model on Python's standard library, under another parallel strategy at every step.

The graph is built once. Each step takes other documents, packed, and the next of four strategies: on one pipeline, on
two, on three of unequal lengths, on four in two context groups. The loss goes on as if there were one device.

    python examples/train_lm.py                                       # 60 steps on a CPU
    python examples/train_lm.py --checkpoint lm.safetensors           # saves there; --resume goes on from there
    python examples/train_lm.py --recompute                           # the same losses in less memory
    torchrun --nproc-per-node 4 examples/train_lm.py --zero 3         # each rank keeps a part of model and Adam
    python examples/train_lm.py --compile                             # what is not attention goes through Inductor
    python examples/train_lm.py --dtype bfloat16 --layers 4 --width 1024 --heads 16 --kv-heads 4 --head-dim 64 \
        --hidden 2816 --tokens 32768 --steps 500                      # on a GPU
    torchrun --nproc-per-node 4 examples/train_lm.py                  # in four processes, with the same losses
"""

from __future__ import annotations

import argparse
import math
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import cut, make_packs, read_files
from llama import STRATEGIES, Config, Model, build
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import hetu

ZERO = "what is cut over the ranks: 1 for Adam's state, 2 for gradients too, 3 for parameters too"


def main() -> None:
    arguments = parse()
    world = hetu.init_distributed()
    is_first = world.rank == 0  # the others compute the same losses, and keep quiet
    console = Console(quiet=not is_first)
    hetu.manual_seed(arguments.seed)
    if arguments.compile:
        hetu.config(compile=True)
    config = Config(**{name: getattr(arguments, name) for name in Config.__dataclass_fields__})
    model = build(config, arguments.dtype, arguments.device, arguments.recompute)
    optimizer = hetu.optim.AdamW(
        lr=arguments.lr,
        betas=(0.9, 0.95),
        max_grad_norm=1.0,
        zero_stage=arguments.zero,
        schedule=lambda torch_optimizer: torch.optim.lr_scheduler.LambdaLR(
            torch_optimizer, lambda step: warmup_and_cosine(step, arguments.steps)
        ),
    )
    train = optimizer.minimize(model.loss, name="train")
    order = [index for index, _ in enumerate(STRATEGIES)] if arguments.strategy is None else [arguments.strategy]
    packs = make_packs(
        cut(read_files(), arguments.longest), arguments.tokens, arguments.steps * arguments.micro_batches
    )
    losses = resume(model, arguments.checkpoint, console) if arguments.resume else []

    parameters = sum(
        math.prod(node.attrs["shape"]) for node in model.graph.nodes if node.definition.name == "parameter"
    )
    console.print(f"{parameters:,} parameters, {len(model.graph.nodes)} nodes, {arguments.dtype}", highlight=False)
    start, first = time.perf_counter(), len(losses)
    with progress(console) as bar:
        task = bar.add_task("", total=arguments.steps, completed=first, loss=math.nan, rate=0.0, strategy="")
        for step in range(first, arguments.steps):
            index = order[step % len(order)]
            batch = packs[step * arguments.micro_batches : (step + 1) * arguments.micro_batches]
            began = time.perf_counter()
            losses.append(run_step(model, train, index, batch))
            rate = sum(len(document) for pack in batch for document in pack) / (time.perf_counter() - began)
            bar.update(task, advance=1, loss=losses[-1], rate=rate, strategy=STRATEGIES[index].name)
            if arguments.checkpoint and (step + 1) % arguments.save_every == 0:
                save(model, losses, arguments.checkpoint, is_first)
    if arguments.checkpoint:
        save(model, losses, arguments.checkpoint, is_first)
    report(console, losses, first, time.perf_counter() - start)
    if is_first:
        drawn = plot(losses, [order[step % len(order)] for step in range(len(losses))], arguments.plot)
        text = f"loss curve in {arguments.plot}" if drawn else "no loss curve: install matplotlib"
        console.print(text, highlight=False)
    hetu.shutdown_distributed()


def run_step(model: Model, train: hetu.Tensor, index: int, batch: list[list[np.ndarray]]) -> float:
    """One update from a batch of packs, each a micro-batch; gives the loss."""
    made = [model.feeds(index, pack) for pack in batch]
    if len(made) == 1:
        feeds, symbols = made[0]
    else:
        feeds: dict[Any, Any] = {key: [one[key] for one, _ in made] for key in made[0][0]}
        symbols: dict[Any, Any] = {key: [one[key] for _, one in made] for key in made[0][1]}
    return float(model.graph.run(train, feeds, int_symbol_dict=symbols, strategy=index, num_micro_batches=len(batch)))


def warmup_and_cosine(step: int, steps: int) -> float:
    """A tenth of the steps up in a line, the rest down along a cosine to a tenth of the learning rate."""
    warmup = max(steps // 10, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0))


def save(model: Model, losses: list[float], path: Path, is_first: bool) -> None:
    """Writes all that the run needs to go on, and the losses so far: all ranks gather it, and the first one writes."""
    state = model.graph.state_dict()
    if is_first:
        hetu.save({**state, "losses": losses}, path)


def resume(model: Model, path: Path | None, console: Console) -> list[float]:
    """Goes on from a checkpoint; gives the losses up to there."""
    if path is None:
        raise SystemExit("--resume needs --checkpoint")
    state = hetu.load(path)
    model.graph.load_state_dict(state)
    console.print(f"resumed after {len(state['losses'])} steps", highlight=False)
    return list(state["losses"])


def progress(console: Console) -> Progress:
    return Progress(
        MofNCompleteColumn(),
        BarColumn(30),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s  {task.fields[strategy]}"),
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


def plot(losses: list[float], indices: list[int], path: Path) -> bool:
    """Draws the loss of each step, marked by its strategy; False where there is nothing to draw with."""
    if find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.75", linewidth=1, zorder=1)
    for index in sorted(set(indices)):
        mine = np.flatnonzero(np.array(indices) == index)
        axes.scatter(steps[mine], np.array(losses)[mine], s=18, zorder=2, label=STRATEGIES[index].name)
    axes.set(xlabel="step", ylabel="loss (nats a byte)", title="One graph, another parallel strategy at every step")
    axes.legend(title="strategy of the step")
    figure.savefig(path, dpi=150)
    return True


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens that a pack may hold")
    parser.add_argument("--micro-batches", type=int, default=1, help="packs of a step")
    parser.add_argument("--longest", type=int, default=1024, help="longer files are cut into documents of this length")
    parser.add_argument(
        "--strategy", type=int, choices=range(len(STRATEGIES)), help="one for all steps; else they take turns"
    )
    for name, value in Config().__dict__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--recompute", action="store_true", help="keep less for the backward: it computes layers again")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=0, help=ZERO)
    parser.add_argument("--compile", action="store_true", help="compile what is not attention: once, for all lengths")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; CUDA if there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="safetensors file to save to")
    parser.add_argument("--save-every", type=int, default=20, help="steps from one save to the next")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--plot", type=Path, default=Path("train_lm.png"), help="where the loss curve is drawn")
    return parser.parse_args()


if __name__ == "__main__":
    main()
