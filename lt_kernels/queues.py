"""Queues of keys for contrastive losses, and the momentum update of the encoder that makes them.

``ClassQueue`` keeps a share of the keys for every class, ``FeatureQueue`` the last ones of all (MoCo). Their buffers
are the losses' ``key``, ``key_label`` and ``key_id``. An enqueue is a few tensor operations: no loop over classes or
samples, and nothing that waits for a GPU. In distributed training, gather features, labels and ids first.

Buffers are written in place. A loss reads its keys again in backward: enqueue before the loss (as GML does) or after
its backward, or give it the queue's ``snapshot()``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import (
    ClassVector,
    as_dtype,
    as_int64,
    check_choice,
    check_classes,
    check_device,
    check_flag,
    check_floating,
    check_int,
    check_integers,
    check_number,
    check_shape,
    check_values,
    device_of,
)
from ._modules import InitializedModule
from .priors import ClassPrior

FILLS = ("empty", "random")


class QueueKeys(NamedTuple):
    """A copy of a queue's buffers at one moment, which later enqueues leave as it is."""

    features: Tensor  #: [M, D]
    labels: Tensor  #: [M], -1 where a slot is empty
    ids: Tensor | None  #: [M], -1 for none; None for a queue that has no ids


class ClassQueue(InitializedModule):
    """The latest features of every class, in slots that are contiguous by class.

    Suh, Seo, *Long-Tailed Recognition by Mutual Information Maximization between Latent Features and Ground-Truth
    Labels*, ICML 2023 (GML): class c has ``base`` slots and a share of the others by its prior,

        sizes_c = base + (size - C base) pi_c,    rounded by largest remainder so that they sum to ``size``

    and a new feature takes the place of the oldest of its own class. (The published code rounds the cumulative sum up:
    a class may have one slot more or less there.)

    Buffers, all in ``state_dict``: ``features`` [size, dim], ``labels`` and ``ids`` int64 [size], both -1 where a slot
    is empty; ``sizes``, ``starts`` and ``pointers`` int64 [C]: how many slots a class has, its first one, and the place
    after it that is written next.

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class. A class with none has
            ``base`` slots.
        size: M, at least C base.
        dim: D.
        base: published: 2 (CIFAR-100-LT), 3 (ImageNet-LT).
        fill: ``"empty"``, or ``"random"``: start with random unit vectors of every class, as the published code does.
        device: device of the buffers; by default that of ``class_counts``, and torch's default device for lists, arrays
            and mappings.
        dtype: of ``features``; default ``torch.get_default_dtype()``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.

    Example:
        >>> queue = ClassQueue([90, 9, 1], size=10, dim=4, base=1)
        >>> queue.sizes
        tensor([7, 2, 1])
        >>> queue.enqueue(torch.randn(4, 4), torch.tensor([2, 0, 0, 2]), torch.tensor([70, 71, 72, 73]))
        tensor([ 9,  0,  1, -1])
        >>> queue.labels
        tensor([ 0,  0, -1, -1, -1, -1, -1, -1, -1,  2])
    """

    features: Tensor
    labels: Tensor
    ids: Tensor
    sizes: Tensor
    starts: Tensor
    pointers: Tensor

    def __init__(
        self,
        class_counts: ClassVector,
        size: int,
        dim: int,
        base: int = 2,
        *,
        fill: Literal["empty", "random"] = "empty",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size, self.dim = check_int("size", size, 1), check_int("dim", dim, 1)
        self.base = check_int("base", base, 0)
        check_choice("fill", fill, FILLS)
        self.fill = fill
        prior = ClassPrior(class_counts, zero_counts="mask")
        self.num_classes = len(prior)
        self._dtype = as_dtype("dtype", dtype)
        self._keep_start("sizes", self._apportioned(prior))
        _register(self, device_of(device, class_counts))

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor, ids: Tensor | None = None) -> Tensor:
        """Store features in the places of the oldest of their classes.

        Several of a class take consecutive places, in order; those beyond the number of its slots are dropped (the
        first are kept, as published).

        Args:
            features: [N, D], floating; stored in the queue's dtype, without gradient.
            labels: [N], any integer dtype; -1 for rows to leave out, such as padding.
            ids: [N], any integer dtype: which sample each is, 0 or more, or -1 for none. Several slots may hold the
                same sample, of this call or of earlier ones.

        Returns:
            [N] int64: the slot of each feature, -1 where it was dropped; the ``own_key`` of
            [`GMLLoss`][lt_kernels.losses.GMLLoss].

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device; the message names it.
            IndexError: a label out of range, on the CPU or with checks on; on a GPU without checks its row is dropped.
        """
        rows = _check_features(features, self.features)
        label = _check_integers("labels", labels, rows, self.features)
        label = check_values(check_classes, "labels", label, self.num_classes, -1, words=(", or -1",))
        is_class = (label >= 0) & (label < self.num_classes)
        given = None if ids is None else _check_integers("ids", ids, rows, self.features)
        if given is not None:
            given = check_values(check_classes, "ids", given, 2**63 - 1, -1, words=(", or -1", "id"))
        if rows == 0:
            return label
        group = label.masked_fill(~is_class, self.num_classes)
        rank, counts = _rank_within(group, self.num_classes + 1)
        safe = label.masked_fill(~is_class, 0)
        sizes = self.sizes[safe]
        kept = is_class & (rank < sizes)
        slot = self.starts[safe] + (self.pointers[safe] + rank) % sizes.clamp_min(1)
        new_ids = torch.full_like(label, -1) if given is None else given.masked_fill(~kept, -1)
        # Dropped rows repeat the write of the first row that is kept, or write what slot 0 holds already: the sizes
        # of all tensors are known without reading the values of any.
        any_kept = kept.any()
        first = kept.to(torch.uint8).argmax()
        row = torch.where(kept, torch.arange(rows, device=label.device), first)
        slot_of_row = torch.where(any_kept, slot[row], 0)
        for held, new in ((self.features, features), (self.labels, label), (self.ids, new_ids)):
            held.index_copy_(0, slot_of_row, torch.where(any_kept, new.to(held.dtype)[row], held[:1]))
        written = torch.minimum(counts[:-1], self.sizes)
        self.pointers.copy_((self.pointers + written) % self.sizes.clamp_min(1))
        return slot.masked_fill(~kept, -1)

    def snapshot(self) -> QueueKeys:
        """Copy features, labels and ids: ``size`` (``dim`` elements and 16 bytes).

        For a loss whose backward comes after the next enqueue: autograd reads keys again, and stops with an error where
        they were written in between.
        """
        return QueueKeys(self.features.clone(), self.labels.clone(), self.ids.clone())

    @torch.no_grad()
    def update_counts(self, class_counts: ClassVector) -> None:
        """Apportion the slots anew, in place; a class that gets fewer keeps its newest features.

        Raises:
            TypeError, ValueError: as the constructor, or for another number of classes.
        """
        prior = ClassPrior(class_counts, zero_counts="mask")
        if len(prior) != self.num_classes:
            raise ValueError(f"class_counts: got {len(prior)} classes, expected {self.num_classes}")
        device = self.sizes.device
        apportioned = self._apportioned(prior)
        sizes = apportioned.to(device)
        starts = sizes.cumsum(0) - sizes
        owner = self._owners()
        filled = self.labels >= 0
        place = torch.arange(self.size, device=device) - self.starts[owner]
        age = (self.pointers[owner] - 1 - place) % self.sizes[owner]  # 0: the newest
        held = torch.zeros_like(sizes).scatter_add_(0, owner, filled.long())
        kept = torch.minimum(held, sizes)
        moves = filled & (age < kept[owner])
        target = torch.where(moves, starts[owner] + kept[owner] - 1 - age, self.size)
        source = torch.full((self.size + 1,), -1, device=device)
        source = source.scatter_(0, target, torch.arange(self.size, device=device))[:-1]
        stays = source >= 0
        source = source.clamp_min(0)
        self.features.copy_(torch.where(stays[:, None], self.features[source], 0))
        self.labels.copy_(self.labels[source].masked_fill(~stays, -1))
        self.ids.copy_(self.ids[source].masked_fill(~stays, -1))
        self._keep_start("sizes", apportioned)
        self.sizes.copy_(sizes)
        self.starts.copy_(starts)
        self.pointers.copy_(kept % sizes.clamp_min(1))

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, size={self.size}, dim={self.dim}, base={self.base}"

    def _initial(self) -> dict[str, Tensor]:
        sizes = self._kept_start("sizes", torch.int64)
        initial = {
            "features": torch.zeros(self.size, self.dim, dtype=self._dtype, device="cpu"),
            "labels": torch.full((self.size,), -1, device="cpu"),
            "ids": torch.full((self.size,), -1, device="cpu"),
            "sizes": sizes,
            "starts": sizes.cumsum(0) - sizes,
            "pointers": torch.zeros_like(sizes),
        }
        if self.fill == "random":
            initial["features"].copy_(F.normalize(torch.randn(self.size, self.dim, device="cpu"), dim=1))
            initial["labels"] = torch.arange(self.num_classes, device="cpu").repeat_interleave(sizes)
        return initial

    def _owners(self) -> Tensor:
        """Return the class that each slot belongs to, [M]."""
        slots = torch.arange(self.size, device=self.starts.device)
        return torch.searchsorted(self.starts + self.sizes, slots, right=True)

    def _apportioned(self, prior: ClassPrior) -> Tensor:
        """Return the number of slots of each class, int64 [C] on the CPU."""
        free = self.size - len(prior) * self.base
        if free < 0:
            least = len(prior) * self.base
            raise ValueError(f"size: got {self.size}, expected at least {least}, {self.base} for each class")
        counts = prior.class_counts.to("cpu", torch.float64)
        share = free * (counts / counts.sum())
        whole = share.floor().clamp_max(free).long()
        missing = free - int(whole.sum())
        largest = (share - whole).argsort(descending=True, stable=True)[:missing]
        whole[largest] += 1
        return self.base + whole


class FeatureQueue(InitializedModule):
    """The last features of all classes: the queue of momentum contrast.

    He, Fan, Wu, Xie, Girshick, *Momentum Contrast for Unsupervised Visual Representation Learning*, CVPR 2020; with
    labels, as PaCo has it. New features take the places of the oldest.

    Buffers, all in ``state_dict``: ``features`` [size, dim], ``labels`` int64 [size], -1 where a slot is empty, and
    ``pointer`` int64, 0-dim: the slot that is written next.

    Args:
        size: M; any number of features can be enqueued at once.
        dim: D.
        device: of the buffers.
        dtype: of ``features``; default ``torch.get_default_dtype()``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.

    Example:
        >>> queue = FeatureQueue(size=4, dim=8)
        >>> queue.enqueue(torch.randn(3, 8), torch.tensor([5, 6, 7]))
        tensor([0, 1, 2])
        >>> queue.enqueue(torch.randn(2, 8), torch.tensor([8, 9]))
        tensor([3, 0])
        >>> queue.labels
        tensor([9, 6, 7, 8])
    """

    features: Tensor
    labels: Tensor
    pointer: Tensor

    def __init__(
        self, size: int, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.size, self.dim = check_int("size", size, 1), check_int("dim", dim, 1)
        self._dtype = as_dtype("dtype", dtype)
        _register(self, device_of(device, None))

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor) -> Tensor:
        """Store features in the places of the oldest ones.

        Args:
            features: [N, D], floating; stored in the queue's dtype, without gradient. The last M stay.
            labels: [N], any integer dtype: 0 or more; -1 for rows of no class, whose slots count as empty.

        Returns:
            [N] int64: the slot of each feature, -1 where it was pushed out by a later one of the same call.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device; the message names it.
            IndexError: a label below -1 or beyond int32, on the CPU or with checks on.
        """
        rows = _check_features(features, self.features)
        label = _check_integers("labels", labels, rows, self.features)
        label = check_values(check_classes, "labels", label, 2**31, -1, words=(", or -1",))
        places = torch.arange(rows + 1, device=label.device)  # the last one is the next call's first
        if torch.compiler.is_compiling():  # nothing is written before the labels have been checked
            places = places + (label - label).sum()
        places = (places + self.pointer) % self.size
        slot = places[:rows]
        last = max(rows - self.size, 0)
        if torch.compiler.is_compiling() or last > 0:  # where the number of rows is a symbol, one graph is for all
            pushed_out = torch.arange(rows, device=label.device) < last
            features, label, written = features[last:], label[last:], slot[last:]
            slot = slot.masked_fill(pushed_out, -1)
        else:
            written = slot
        self.features.index_copy_(0, written, features.to(self.features.dtype))
        self.labels.index_copy_(0, written, label)
        self.pointer.copy_(places[rows])
        return slot

    def snapshot(self) -> QueueKeys:
        """Copy features and labels: ``size`` (``dim`` elements and 8 bytes).

        For a loss whose backward comes after the next enqueue: autograd reads keys again, and stops with an error where
        they were written in between.

        Example:
            >>> import lt_kernels.functional as LF
            >>> queue, labels = FeatureQueue(size=4, dim=8), torch.tensor([0, 1, 0])
            >>> slots = queue.enqueue(torch.randn(3, 8), labels)
            >>> query, keys = torch.randn(3, 8, requires_grad=True), queue.snapshot()
            >>> loss = LF.supervised_contrastive(query, keys.features, labels, keys.labels, temperature=0.1)
            >>> slots = queue.enqueue(query.detach(), labels)
            >>> loss.backward()
        """
        return QueueKeys(self.features.clone(), self.labels.clone(), None)

    def _initial(self) -> dict[str, Tensor]:
        return {
            "features": torch.zeros(self.size, self.dim, dtype=self._dtype, device="cpu"),
            "labels": torch.full((self.size,), -1, device="cpu"),
            "pointer": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}"


@torch.no_grad()
def momentum_update(target: nn.Module, source: nn.Module, momentum: float, *, buffers: bool = True) -> None:
    """Move the parameters of ``target`` towards those of ``source``: target = momentum target + (1 - momentum) source.

    Args:
        target: the momentum encoder (of keys); changed in place.
        source: the encoder that is trained; with the same names and shapes.
        momentum: in [0, 1]; published: 0.999.
        buffers: whether floating-point buffers (such as the statistics of batch norm) are averaged in the same way and
            others copied. MoCo's encoders keep their own: False.

    Raises:
        TypeError, ValueError: no modules, modules of another structure, a momentum out of range.

    Example:
        >>> encoder, of_keys = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> momentum_update(of_keys, encoder, momentum=0.0)
        >>> torch.equal(of_keys.weight, encoder.weight)
        True
    """
    for name, module in (("target", target), ("source", source)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: got {type(module).__name__}, expected an nn.Module")
    momentum = check_number("momentum", momentum, 0.0, 1.0)
    check_flag("buffers", buffers)
    ours: dict[str, Tensor] = dict(target.named_parameters())
    theirs: dict[str, Tensor] = dict(source.named_parameters())
    if buffers:
        ours |= dict(target.named_buffers())
        theirs |= dict(source.named_buffers())
    shapes, others = ({name: tensor.shape for name, tensor in held.items()} for held in (ours, theirs))
    if shapes != others:
        odd = sorted(name for name in {*shapes, *others} if shapes.get(name) != others.get(name))
        raise ValueError(f"source: got a module that differs in {', '.join(odd[:3])}, expected the structure of target")
    averaged = [name for name, tensor in ours.items() if tensor.is_floating_point() or tensor.is_complex()]
    if averaged:
        new = [theirs[name].detach().to(ours[name]) for name in averaged]
        torch._foreach_lerp_([ours[name] for name in averaged], new, 1 - momentum)
    for name in set(ours) - set(averaged):
        ours[name].copy_(theirs[name])


# --- what queues share -----------------------------------------------------------------------------------------------


def _rank_within(group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Count the earlier elements of ``group`` [N] with the same value, and the elements with each value, [groups]."""
    order = group.argsort(stable=True)
    counts = torch.zeros(groups, dtype=torch.int64, device=group.device)
    counts = counts.scatter_add_(0, group, torch.ones_like(group))
    first = counts.cumsum(0) - counts
    places = torch.arange(len(group), device=group.device)
    return torch.empty_like(group).scatter_(0, order, places - first[group[order]]), counts


def _register(queue: InitializedModule, device: torch.device) -> None:
    for name, value in queue._initial().items():
        queue.register_buffer(name, value.to(device))


def _check_features(features: Any, held: Tensor) -> int:
    width = held.shape[1]
    check_floating("features", features, f"a Tensor [N, {width}]", "a floating-point dtype")
    if features.dim() != 2 or features.shape[1] != width:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected [N, {width}]")
    check_device("features", features, held, " as the queue")
    return features.shape[0]


def _check_integers(name: str, value: Any, rows: int, held: Tensor) -> Tensor:
    check_integers(name, value, f"a Tensor [{rows}] of integers")
    check_shape(name, value, (rows,), ", one for each feature", expected=f"[{rows}]")
    check_device(name, value, held, " as the queue")
    return as_int64(name, value)
