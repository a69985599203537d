"""Trains a Llama of transformers with transformers' own Trainer, a pack of documents per step, its tokens on all ranks.

    python examples/hf_trainer.py
    torchrun --nproc-per-node 2 examples/hf_trainer.py    # with the same losses

It needs accelerate, as every Trainer does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import VOCABULARY, cut, fill, read_files
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import hetu
import hetu.integrations.transformers as hetu_transformers

IGNORED = -100


class ContextParallelTrainer(Trainer):
    """A Trainer whose dataset has a pack of documents per item, and whose ranks hold the tokens of each together.

    Gradients are averaged over all ranks, as DistributedDataParallel does, and the loss is made for that.
    """

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The same packs on all ranks: Trainer's own would give each rank others."""
        return DataLoader(self.train_dataset, batch_size=None, collate_fn=lambda pack: {"documents": pack})

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The mean over the next tokens of all documents; ``labels`` would be shifted within a rank's rows."""
        documents = inputs["documents"]
        ids = torch.from_numpy(np.concatenate(documents)).to(self.args.device, torch.int64)
        cu_seqlens = torch.tensor([0, *map(len, documents)]).cumsum(0)
        cp = hetu.functional.ContextParallel(cu_seqlens, device=self.args.device)
        labels = cp.dispatch(cp.next_tokens(ids, ignore_index=IGNORED))
        with hetu_transformers.context_parallel(cp):
            out = model(input_ids=cp.dispatch(ids)[None], position_ids=cp.position_ids[None], use_cache=False)
        loss_sum = cross_entropy(out.logits[0].float(), labels, ignore_index=IGNORED, reduction="sum")
        loss = cp.token_mean(loss_sum, labels, ignore_index=IGNORED)
        return (loss, out) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step, of all ranks together")
    parser.add_argument("--output", type=Path, default=Path("runs/hf_trainer"), help="the Trainer's own files")
    parser.add_argument("--losses", type=Path, help="file for the losses, as a JSON list")
    arguments = parser.parse_args()
    hetu_transformers.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    options = TrainingArguments(
        output_dir=str(arguments.output),
        max_steps=arguments.steps,
        learning_rate=2e-3,
        use_cpu=not torch.cuda.is_available(),  # otherwise gradients aren't averaged where there is no GPU
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    trainer = ContextParallelTrainer(
        AutoModelForCausalLM.from_config(config, attn_implementation="hetu"),
        options,
        train_dataset=fill(cut(read_files(), min(512, arguments.tokens)), arguments.tokens),
    )
    trainer.train()
    if arguments.losses and trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        arguments.losses.write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main()
