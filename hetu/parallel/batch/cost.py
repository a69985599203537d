"""What documents cost the pipelines that hold them: the only place that a planned batch is priced."""

from __future__ import annotations

from dataclasses import dataclass

from hetu.parallel.views.hardware import Hardware

PAIR_FLOPS = 4 + 10
"""FLOPs per pair, query head and number of a head: of the forward and of the backward."""

EDGE_ROWS = 350
"""How many rows more a piece of a cut document costs: its ends fill no block of a kernel, and its steps are merged.

Documents of 8,192 to 131,072 tokens in all, each cut in two, took 1.63, 1.24 and 1.05 times as long on an H200, forward
and backward, as all tokens at once (``benchmarks/parallel_work.py``, *mix* under ``sym``, 2026-11-23): 370, 361 and 322
rows per piece.
"""

WAITS = 3
"""How often a pipeline waits for a first byte: for keys and values in both directions, and for gradients."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents, those with most work first.

    Attributes:
        lengths: Tokens of each.
        attention: Seconds that the attention of each takes on one pipeline.
        work: Seconds that each takes on one pipeline.
    """

    lengths: list[int]
    attention: list[float]
    work: list[float]

    @property
    def lighter_half(self) -> float:
        """Seconds per token of the documents with least work per token that hold half of all tokens."""
        tokens, seconds, half = 0, 0.0, sum(self.lengths) / 2
        for length, work in zip(reversed(self.lengths), reversed(self.work), strict=True):
            tokens, seconds = tokens + length, seconds + work
            if tokens >= half:
                break
        return seconds / max(tokens, 1)


@dataclass(frozen=True, slots=True)
class BatchCost:
    """Seconds that one layer's forward and backward take, per unit of what a pipeline does.

    A pipeline computes the rest of the layer for its tokens, and attends. The keys and values of documents that others
    hold pieces of travel meanwhile; what of their time is longer than attending is waited for. A piece takes its part
    of its document's attention, and as much again as :data:`EDGE_ROWS` more rows would.

    Attributes:
        token: Of a token, without attention.
        pair: Of a query and a key that it sees.
        row: That the keys and values of a token, and their gradients, take over a link.
        latency: That a pipeline waits for first bytes, if it holds a piece of a document.
    """

    token: float
    pair: float
    row: float
    latency: float

    @classmethod
    def of(
        cls, hardware: Hardware, num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int, token_flops: float
    ) -> BatchCost:
        """The cost on some hardware.

        Args:
            hardware: What a device can do.
            num_heads: Query heads.
            num_kv_heads: Heads of keys and values.
            head_dim: Numbers of a head.
            itemsize: Bytes of one of them; gradients travel in float32, or in float64 if that is the type.
            token_flops: FLOPs per token of the rest of a layer, forward and backward.
        """
        numbers = 2 * num_kv_heads * head_dim
        return cls(
            token=token_flops / hardware.flops,
            pair=PAIR_FLOPS * num_heads * head_dim / hardware.flops,
            row=numbers * (2 * itemsize + max(itemsize, 4)) / hardware.link_bytes,
            latency=WAITS * hardware.latency,
        )

    def overhead(self, length: int, attention: float, parts: int) -> float:
        """What each of ``parts`` pipelines waits for, if it holds as much of a document as the others, and no other.

        Args:
            length: Tokens of the document.
            attention: Seconds that its attention takes on one pipeline.
            parts: Over how many pipelines it is cut.
        """
        if parts == 1:
            return 0.0
        edge = self.edge(length, attention)
        return self.latency + edge + max(0.0, self.row * length * (parts - 1) / parts - attention / parts - edge)

    def edge(self, length: int, attention: float) -> float:
        """Seconds that a piece of a cut document takes beyond its part of the document's attention."""
        return attention * EDGE_ROWS / max(length, 1)

    def seconds(self, tokens: float, attention: float, rows: float, is_cut: bool) -> float:
        """What a pipeline takes for all that it holds of a micro-batch.

        Args:
            tokens: That it holds.
            attention: Seconds that it attends.
            rows: Tokens whose keys and values come, or as many as go if these are more.
            is_cut: Whether it holds a piece of a document of which others hold pieces.
        """
        return self.token * tokens + max(attention, self.row * rows) + self.latency * is_cut

    def least_seconds(self, documents: Documents, pipelines: int, max_tokens: int) -> float:
        """What no plan is faster than: the mean of all work, or the document that takes longest at its best group."""
        mean = sum(documents.work) / pipelines
        if not documents.lengths:
            return mean
        length, attention, work = documents.lengths[0], documents.attention[0], documents.work[0]
        fewest = max(-(-length // max_tokens), 1)
        return max(
            mean,
            min(work / parts + self.overhead(length, attention, parts) for parts in range(fewest, pipelines + 1)),
        )
