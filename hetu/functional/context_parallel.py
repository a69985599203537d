"""How the tokens of packed documents lie on the ranks of a process group, as a value that a PyTorch model is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hetu.arguments import array, choice, flag, head_counts, integer, integers, refuse
from hetu.arguments import device as checked_device
from hetu.backends.comm.groups import GroupWorld, world_of
from hetu.errors import BindingError, DTypeError, HetuError, ShapeError, StrategyError, caller
from hetu.functional.checks import check_tensor
from hetu.functional.masking import NO_CAP, checked_masking
from hetu.functional.sharding import Sharding, sharding_of, table_of
from hetu.ops.attention.common import cu_seqlens_fault
from hetu.parallel import AttnPlan, Heads, Layout, Mask
from hetu.parallel.layout.splits import SPLITS
from hetu.parallel.mask.mask import NO_WINDOW
from hetu.parallel.methods import METHODS
from hetu.planning.arrays import host_array

_OP = "ContextParallel"

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

IGNORED = -100
"""The label of a token that no loss counts, as in ``torch.nn.functional.cross_entropy``."""


class ContextParallel:
    """How the tokens of a batch of packed documents lie on the ranks of a group.

    Make one for each batch: lengths that were seen before cost next to nothing, and recompile nothing. All ranks of the
    group make it, with the same lengths; before the first rows travel they compare what they were given.

    Args:
        cu_seqlens: int32 or int64 ``(B + 1,)``, the cumulative lengths of the documents, from 0; or ``(R, B + 1)``,
            those of the pieces of the documents on each rank. The same on all ranks. On a device it is copied to the
            host once, which waits for it. Lengths of zero are fine.
        group: The ranks: a process group, a 1-D ``DeviceMesh``, or None for the default group (a world of one where
            ``torch.distributed`` is not initialised). This rank must be in it. hetu makes connections of its own
            between its members, and neither uses nor changes the group.
        split: Which rows each rank holds: ``"normal"``, ``"sym"``, ``"stripe"`` or ``"balanced"``.
        method: How ranks reach each other's keys and values: ``"ring"``, ``"direct"``, ``"all_gather"``, ``"ulysses"``,
            ``"hierarchical"`` over the hosts of ``hetu.config(hosts=...)``, or ``"auto"``.
        tokens: Rows of each rank, any numbers with the right sum; None for even ones.
        mask: What ``"balanced"`` weighs documents by, a ``hetu.Mask`` without symbols: a document is as much work as
            the mask lets its tokens see keys. None weighs by lengths, as fits causal and full attention. No other split
            looks at it, and the attention has a mask of its own.
        device: Where :attr:`position_ids` lie; None for the device of cu_seqlens, or, where that is the CPU, for the
            one that the group's rows lie on.

    Attributes:
        layout: Which token of which document lies on which rank; ``print(cp)`` shows it.
        position_ids: int64 ``(rows,)``, the position in its document of each of this rank's rows.
        rank: This process's number in the group.
        size: How many ranks there are.

    Raises:
        BindingError: If the values of cu_seqlens are no cumulative lengths.
        StrategyError: If the numbers of rows don't fit, or there is no such split or method.
        CommunicationError: If not all ranks come, naming those that didn't.
        HetuError: If this rank is not in the group.

    Example:
        >>> import torch, hetu
        >>> cp = hetu.functional.ContextParallel(torch.tensor([0, 3, 5]))
        >>> ids = torch.tensor([7, 8, 9, 4, 5])
        >>> cp.dispatch(ids).tolist(), cp.position_ids.tolist(), cp.next_tokens(ids).tolist()
        ([7, 8, 9, 4, 5], [0, 1, 2, 0, 1], [8, 9, -100, 5, -100])
    """

    def __init__(
        self,
        cu_seqlens: torch.Tensor,
        group: Any = None,
        split: str = "balanced",
        method: str = "auto",
        tokens: Any = None,
        *,
        mask: Mask | None = None,
        device: Any = None,
    ) -> None:
        world = world_of(_group_of(group))
        self.group_name, self.rank, self.size = world.name, world.rank, world.size
        with world.hanging_up():  # whatever one rank refuses, the others shall not wait for it
            self.split = choice(split, "split", tuple(SPLITS), op=_OP, error=StrategyError)
            self.method = choice(method, "method", ("auto", *METHODS), op=_OP, error=StrategyError)
            own = _host(cu_seqlens, world.size)
            self.table = table_of(_tokens(tokens, own, world.size), own, _weighing(mask))
            self.sharding: Sharding = sharding_of(self.table, self.split, self.group_name)
            where = _device(device, cu_seqlens, world)
        self.position_ids, self._whole = self.sharding.own_positions(where), self.sharding.whole

    @property
    def layout(self) -> Layout:
        return self.sharding.layout

    def dispatch(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's rows of what all ranks hold whole.

        Its gradient is :meth:`undispatch`: whole, on every rank, and nothing is summed.

        Args:
            x: Any dtype, with ``cu_seqlens[-1]`` entries along ``dim``, document after document; the same on all ranks.
            dim: Which dim holds the tokens.

        Returns:
            ``x`` with this rank's rows along ``dim``.

        Raises:
            ShapeError: If the number of entries is another.
        """
        dim = _dim(x, "x", dim, self.sharding.tokens, "cp.dispatch", "the documents have")
        mine: torch.Tensor = torch.ops.hetu.dispatch(x, self.position_ids, self.table, self.split, self.group_name, dim)
        return mine

    def undispatch(self, y: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The rows of all ranks, whole on every one of them; the inverse of :meth:`dispatch`, and its gradient.

        The gradient of what it gives must be the same on all ranks, as it is where each computes the same from it.

        Args:
            y: Any dtype, this rank's rows along ``dim``.
            dim: Which dim holds the tokens.

        Returns:
            ``y`` with ``cu_seqlens[-1]`` entries along ``dim``, document after document.

        Raises:
            ShapeError: If the number of rows is not this rank's.
            CommunicationError: If a rank doesn't come.
        """
        dim = _dim(y, "y", dim, self.sharding.rows, "cp.undispatch", f"rank {self.rank} holds")
        whole: torch.Tensor = torch.ops.hetu.undispatch(y, self._whole, self.table, self.split, self.group_name, dim)
        return whole

    def next_tokens(self, ids: torch.Tensor, dim: int = 0, ignore_index: int = IGNORED) -> torch.Tensor:
        """The token after each one in its document, ``ignore_index`` at its end: labels, whole, to be dispatched.

        Args:
            ids: The tokens, whole, with ``cu_seqlens[-1]`` entries along ``dim``.
            dim: Which dim holds the tokens.
            ignore_index: The label where a document ends.

        Returns:
            As ids.

        Raises:
            ShapeError: If the number of entries is another.
        """
        dim = _dim(ids, "ids", dim, self.sharding.tokens, "cp.next_tokens", "the documents have")
        ignore_index = _label(ignore_index, ids, "cp.next_tokens")
        ends = self.sharding.last_rows(ids.device)
        return ids.roll(-1, dim).index_fill_(dim, ends, ignore_index)

    def token_mean(
        self, loss_sum: torch.Tensor, labels: torch.Tensor, group: Any = None, ignore_index: int = IGNORED
    ) -> torch.Tensor:
        """The mean loss over all labels of all ranks, with a gradient that averaging over ranks makes right.

        FSDP2 and DDP average gradients over ranks, so a mean over a rank's own labels would give each label another
        weight where ranks hold different numbers of them. Here a rank's gradient is that of ``loss_sum * size / labels
        of all ranks``, whose average over the ranks is the gradient of the mean over all labels.

        Args:
            loss_sum: The sum of the losses of this rank's labels, a tensor with one element; ``reduction="sum"``.
            labels: This rank's labels, of any shape; those that are ``ignore_index`` don't count.
            group: The ranks that gradients are averaged over, a process group or a 1-D mesh; None for all ranks of
                ``torch.distributed``. All of them call it. Ranks that hold the same labels, as those of tensor
                parallelism do, may be among them.
            ignore_index: The label that doesn't count.

        Returns:
            The mean, the same number on all ranks; NaN if there are no labels at all, as ``cross_entropy`` gives.

        Raises:
            ShapeError: If loss_sum has more than one element.
            CommunicationError: If a rank doesn't come.
        """
        op = "cp.token_mean"
        check_tensor(loss_sum, "loss_sum", op)
        check_tensor(labels, "labels", op)
        ignore_index = _label(ignore_index, labels, op)
        if labels.device != loss_sum.device:
            what = f"loss_sum and labels are on {loss_sum.device} and {labels.device}, expected one device"
            raise HetuError(what, op=op, where=caller(), fix="move them to one device")
        if loss_sum.numel() != 1 or not loss_sum.is_floating_point():
            what = f"loss_sum has {loss_sum.numel()} elements of {loss_sum.dtype}, expected 1 of a floating point type"
            raise ShapeError(what, op=op, where=caller(), fix='give the sum: reduction="sum"')
        world = world_of(_group_of(group))
        with torch.no_grad():
            count = (labels != ignore_index).sum()
            totals = world.add_up(torch.stack([loss_sum.detach().reshape(()).double(), count.double()]))
            scale = (world.size / totals[1]).to(loss_sum.dtype)
            mean = (totals[0] / totals[1]).to(loss_sum.dtype)
        own = loss_sum * scale
        return own + (mean - own).detach()

    def plan(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        is_causal: bool = True,
        window_size: tuple[int, int] = NO_WINDOW,
        mask: Mask | None = None,
    ) -> AttnPlan:
        """The plan that ``parallel_attn`` follows for given heads and mask: to print, verify or cost.

        Args:
            num_heads: Heads of q.
            num_kv_heads: Heads of k and v.
            head_dim: Numbers of a head.
            dtype: Of q, k and v.
            is_causal: As of ``parallel_attn``.
            window_size: As of ``parallel_attn``.
            mask: As of ``parallel_attn``.
        """
        op = "cp.plan"
        num_q, num_kv = head_counts(num_heads, num_kv_heads, op=op, error=ShapeError)
        width = integer(head_dim, "head_dim", least=1, op=op, fix="give a size")
        if not isinstance(dtype, torch.dtype):
            refuse(dtype, "dtype", "a dtype of torch", op=op, error=DTypeError, fix="torch.bfloat16, say")
        is_causal = flag(is_causal, "is_causal", op=op)
        seen = checked_masking(op, window_size, NO_CAP, None, mask).mask_of(is_causal)
        return self.sharding.plan(self.method, Heads(num_q, num_kv, width, dtype.itemsize), seen)

    def __str__(self) -> str:
        return str(self.layout)

    def __repr__(self) -> str:
        tokens = f"{self.sharding.rows} of {self.sharding.tokens} tokens"
        return f"<ContextParallel of {self.size} ranks, {self.split}, {self.method}: {tokens} on rank {self.rank}>"


def _group_of(group: Any) -> Any:
    """The process group that a user means; None for a process alone."""
    is_there = dist.is_available() and dist.is_initialized()
    if group is None:
        return dist.group.WORLD if is_there else None
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            fix = f"give one dimension of it: mesh[{(group.mesh_dim_names or ('...',))[-1]!r}]"
            refuse(group, "group", "a mesh of one dimension", op=_OP, fix=fix)
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        what, fix = "this rank is not in the group", "make a ContextParallel on the ranks of the group only"
        raise HetuError(what, op=_OP, where=caller(), fix=fix)
    if not isinstance(group, dist.ProcessGroup):
        refuse(group, "group", "a process group or a 1-D DeviceMesh", op=_OP, fix="give mesh['cp'], say")
    return group


def _host(cu_seqlens: Any, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The cumulative lengths as an array of its own; checked."""
    given = array(cu_seqlens, "cu_seqlens", op=_OP)
    if str(given.dtype).removeprefix("torch.") not in ("int32", "int64"):
        fix = "convert them: cu_seqlens.to(torch.int32)"
        refuse(cu_seqlens, "cu_seqlens", "int32 or int64", op=_OP, error=DTypeError, fix=fix)
    if given.ndim not in (1, 2) or (given.ndim == 2 and len(given) != size) or not given.shape[-1]:
        wanted = f"shape (B + 1,), or ({size}, B + 1) for {size} ranks"
        refuse(cu_seqlens, "cu_seqlens", wanted, op=_OP, error=ShapeError, fix="give cumulative lengths, from 0")
    values = host_array(given).astype(np.int64)
    for row in values if values.ndim == 2 else [values]:
        if fault := cu_seqlens_fault("cu_seqlens", row):
            what, fix = fault
            raise BindingError(what, op=_OP, where=caller(), fix=fix)
    return values


def _tokens(given: Any, cu_seqlens: np.ndarray[Any, np.dtype[np.int64]], size: int) -> list[int]:
    """Rows of each rank."""
    if given is not None:
        tokens = integers(given, "tokens", op=_OP)
        if len(tokens) != size:
            fix = "give each rank of the group its rows, or leave tokens out"
            refuse(given, "tokens", f"a list of {size} numbers, one per rank", op=_OP, error=ShapeError, fix=fix)
        return list(tokens)
    if cu_seqlens.ndim == 2:
        return [int(end) for end in cu_seqlens[:, -1]]
    total = int(cu_seqlens[-1])
    return [total * (r + 1) // size - total * r // size for r in range(size)]


def _weighing(mask: Any) -> Mask | None:
    """What documents are weighed by, checked."""
    if mask is None:
        return None
    return checked_masking(_OP, NO_WINDOW, NO_CAP, None, mask).mask_of(is_causal=True)


def _device(given: Any, cu_seqlens: Any, world: Any) -> torch.device:
    if (named := checked_device(given, op=_OP)) is not None:
        if named.startswith("cuda") and (torch.device(named).index or 0) >= torch.cuda.device_count():
            fix = "leave device out, or name one of this machine"
            refuse(given, "device", f"one of {torch.cuda.device_count()} GPUs", op=_OP, fix=fix)
        return torch.device(named)
    if isinstance(cu_seqlens, torch.Tensor) and not cu_seqlens.is_cpu:
        return cu_seqlens.device
    return world.device if isinstance(world, GroupWorld) else torch.get_default_device()


def _label(given: Any, labels: torch.Tensor, op: str) -> int:
    """A number that labels may be."""
    bounds = torch.iinfo(labels.dtype if labels.dtype in _INTEGERS else torch.int64)
    return integer(given, "ignore_index", least=bounds.min, most=bounds.max, op=op, fix="give a label")


def _dim(x: torch.Tensor, name: str, dim: int, size: int, op: str, who: str) -> int:
    """The dim of the tokens as a number from 0, checked."""
    check_tensor(x, name, op)
    if not x.ndim:
        refuse(x, name, "a tensor with a dim of tokens", op=op, error=ShapeError, fix=f"{name}[None]")
    dim = integer(dim, "dim", least=-x.ndim, most=x.ndim - 1, op=op, error=ShapeError, fix="name the tokens' dim")
    if x.shape[dim] != size:
        what = f"{name} has {x.shape[dim]} entries along dim {dim} of {list(x.shape)}, but {who} {size}"
        fix = "give all tokens, one document after the other; make pads a document"
        raise ShapeError(what, op=op, where=caller(), fix=fix)
    return dim % x.ndim
