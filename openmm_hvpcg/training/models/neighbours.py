"""Which pairs of beads are near each other: a list that is kept while the beads move, and rebuilt when it must be.

A list holds the pairs within the cutoff plus a skin, so that it stays complete until a bead has moved half the skin.
Pairs between cutoff and skin add exact zeros, and pairs are in one fixed order: what is computed from a list does not
depend on when it was made, to the last bit.
"""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

from typing import NamedTuple

import torch
from torch import Tensor, nn

#: Up to so many beads all pairs are kept: looking for the near ones would cost more.
ALL_PAIRS = 32
#: Up to so many beads all pairs are looked at to find the near ones; above, those in neighbouring cells.
DENSE_SEARCH = 256
#: Beads whose pairs make a block, or pairs that do where all are kept.
BLOCK_BEADS, BLOCK_PAIRS = 128, 4096
#: Beads whose copies make a group, which is computed from the first layer to the last before the next is begun: what
#: is kept of its pairs for the way back is still in the cache then.
GROUP_BEADS = 320


def is_near(difference: Tensor, reach_nm: float) -> Tensor:
    """Whether differences (..., 3) are shorter than the reach, or not numbers, which must not go unnoticed."""
    return torch.logical_not((difference * difference).sum(dim=-1) >= reach_nm * reach_nm)


def find_pairs_dense(positions: Tensor, reach_nm: float) -> Tensor:
    """Pairs (2, n) of beads within reach in copies (K, B, 3) nm, in order; a bead's index counts through the copies."""
    n_beads = positions.shape[1]
    pairs = torch.triu_indices(n_beads, n_beads, 1, device=positions.device)
    difference = positions.index_select(1, pairs[1]) - positions.index_select(1, pairs[0])
    near = torch.nonzero(is_near(difference, reach_nm))
    return pairs.index_select(1, near[:, 1]) + n_beads * near[:, 0]


def find_pairs_in_cells(positions: Tensor, reach_nm: float) -> Tensor:
    """What :func:`find_pairs_dense` returns, at a cost linear in the number of beads of a dense molecule.

    Beads are sorted into cubic cells as wide as the reach; only cells that are occupied are ever looked at.
    """
    x = torch.nan_to_num(positions, 0.0, 0.0, 0.0)
    cell = torch.floor((x - x.amin(dim=1, keepdim=True)) / reach_nm).to(torch.int64) + 1
    shape = cell.amax(dim=1).amax(dim=0) + 2
    wide, deep = int(shape[1]), int(shape[2])
    copy = torch.arange(positions.shape[0], device=x.device).unsqueeze(1)
    number = ((copy * int(shape[0]) + cell[:, :, 0]) * wide + cell[:, :, 1]) * deep + cell[:, :, 2]
    number, order = torch.sort(number.flatten(), stable=True)
    x = positions.reshape(-1, 3).index_select(0, order)
    rank = torch.arange(number.shape[0], device=x.device)
    found: list[Tensor] = []
    for dx in range(2):
        for dy in range(-1 if dx > 0 else 0, 2):
            # Three cells in a row are neighbours in memory; of the bead's own row, those behind the bead.
            shift = (dx * wide + dy) * deep
            own = dx == 0 and dy == 0
            start = rank + 1 if own else torch.searchsorted(number, number + (shift - 1))
            count = torch.searchsorted(number, number + (shift + 1), right=True) - start
            first = torch.repeat_interleave(rank, count)
            begin = torch.cumsum(count, 0) - count
            second = torch.arange(first.shape[0], device=x.device) + (start - begin).index_select(0, first)
            difference = x.index_select(0, second) - x.index_select(0, first)
            near = torch.nonzero(is_near(difference, reach_nm)).squeeze(1)
            found.append(torch.stack((first.index_select(0, near), second.index_select(0, near))))
    pairs = order.index_select(0, torch.cat(found, dim=1).flatten()).view(2, -1)
    low, high = torch.minimum(pairs[0], pairs[1]), torch.maximum(pairs[0], pairs[1])
    key, _ = torch.sort(low * number.shape[0] + high)
    return torch.stack((key // number.shape[0], key % number.shape[0]))


class Block(NamedTuple):
    """Some pairs, n of them, and how to sum over the pairs of each of the m beads that they belong to.

    Beads are counted from the first of the block's group.

    Attributes
    ----------
    pairs : (2 n,) the pairs' first beads, then their second ones
    partners : (2 n,) the other bead of each
    beads : (m,) which beads they are
    order, starts : (2 n,) and (m,), rows of ``pairs`` by bead and where each bead's begin
    pair_order, signs : (2 n,) pairs by bead, with -1 where the bead is the first of the pair, +1 where it is the second
    """

    pairs: Tensor
    partners: Tensor
    beads: Tensor
    order: Tensor
    starts: Tensor
    pair_order: Tensor
    signs: Tensor


def sum_by_bead(block: Block, rows: Tensor) -> Tensor:
    """Sums (m, C) of rows (2 n, C), one for each of ``block.pairs``."""
    return torch.embedding_bag(rows, block.order, block.starts)[0]


def sum_differences(block: Block, rows: Tensor) -> Tensor:
    """Sums (m, C) of rows (n, C), subtracted from each pair's first bead and added to its second."""
    return torch.embedding_bag(rows, block.pair_order, block.starts, False, 0, False, block.signs)[0]


def add_up(sums: list[Tensor], blocks: list[Block], n_beads: int, width: int) -> Tensor:
    """Sums (n_beads, width) over all blocks from the sums (m, width) of each.

    The shape is given, not read from a tensor: a frozen script (openmmtorch makes one) may read a wrong one.
    """
    if len(sums) == 1:
        return sums[0]
    total = torch.zeros(n_beads, width, dtype=sums[0].dtype, device=sums[0].device)
    for k, block in enumerate(blocks):
        total.index_add_(0, block.beads, sums[k])
    return total


class PairList(nn.Module):
    """Pairs of near beads of K copies of a molecule, in blocks of groups of whole copies that a cache holds.

    Parameters
    ----------
    cutoff_nm : every pair nearer than this is in the list
    skin_nm : how much farther the list reaches
    """

    pairs: Tensor
    partners: Tensor
    beads: Tensor
    order: Tensor
    starts: Tensor
    pair_order: Tensor
    signs: Tensor
    reference: Tensor
    pair_bounds: list[int]
    bead_bounds: list[int]
    block_bounds: list[int]
    group_bounds: list[int]

    def __init__(self, cutoff_nm: float, skin_nm: float) -> None:
        super().__init__()
        self.cutoff_nm = cutoff_nm
        self.skin_nm = skin_nm
        # TorchScript sees no constants of the module.
        self.all_pairs, self.dense_search = ALL_PAIRS, DENSE_SEARCH
        self.block_beads, self.block_pairs, self.group_beads = BLOCK_BEADS, BLOCK_PAIRS, GROUP_BEADS
        for name in ("pairs", "partners", "beads", "order", "starts", "pair_order"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64))
        self.register_buffer("signs", torch.zeros(0))
        self.register_buffer("reference", torch.zeros(0, 3, dtype=torch.float64))
        self.n_beads = 0
        # Where the pairs and beads of blocks, the blocks of groups, and the beads of groups begin.
        self.pair_bounds = [0]
        self.bead_bounds = [0]
        self.block_bounds = [0]
        self.group_bounds = [0]

    def forget(self) -> None:
        """Drop the list: the next one is made anew."""
        nothing = torch.zeros(0, dtype=torch.int64, device=self.signs.device)
        self.pairs, self.partners, self.beads = nothing, nothing, nothing
        self.order, self.starts, self.pair_order = nothing, nothing, nothing
        self.signs = self.signs.new_zeros(0)
        self.reference = self.reference.new_zeros(0, 3)
        self.n_beads = 0
        self.pair_bounds = [0]
        self.bead_bounds = [0]
        self.block_bounds = [0]
        self.group_bounds = [0]

    def update(self, positions: Tensor, n_beads: int) -> bool:
        """Make the list serve positions (K*B, 3) nm of molecules of ``n_beads``; whether it was made anew."""
        if self.n_beads == n_beads and self.reference.shape[0] == positions.shape[0]:
            if n_beads <= self.all_pairs:
                return False
            moved = torch.linalg.vector_norm(positions - self.reference, 2, [1]).max()
            # Not a number is not below the limit.
            if bool(moved < 0.5 * self.skin_nm):
                return False
        self.build(positions, n_beads)
        return True

    def build(self, positions: Tensor, n_beads: int) -> None:
        """Make the list anew."""
        copies = positions.view(-1, n_beads, 3)
        block_beads = self.block_beads
        if n_beads <= self.all_pairs:
            pairs = torch.triu_indices(n_beads, n_beads, 1, device=positions.device).unsqueeze(1)
            pairs = pairs + n_beads * torch.arange(copies.shape[0], device=positions.device).unsqueeze(1)
            pairs = pairs.reshape(2, -1)
            block_beads = n_beads * max(1, self.block_pairs // max(1, n_beads * (n_beads - 1) // 2))
        elif n_beads <= self.dense_search:
            pairs = find_pairs_dense(copies, self.cutoff_nm + self.skin_nm)
        else:
            pairs = find_pairs_in_cells(copies, self.cutoff_nm + self.skin_nm)
        self.divide(pairs, positions.shape[0], block_beads, n_beads * max(1, self.group_beads // n_beads))
        self.reference = positions.detach().clone()
        self.n_beads = n_beads

    def divide(self, pairs: Tensor, n_total: int, block_beads: int, group_beads: int) -> None:
        """Lay out pairs (2, n), in order, block by block: a block has the pairs whose first bead is of a fixed range.

        Ranges do not depend on the list, so neither does the order of any sum.
        """
        edges: list[int] = []
        group_bounds: list[int] = []
        block_bounds: list[int] = []
        for first in range(0, n_total, group_beads):
            group_bounds.append(first)
            block_bounds.append(len(edges))
            edges.extend(list(range(first, min(first + group_beads, n_total), block_beads)))
        group_bounds.append(n_total)
        block_bounds.append(len(edges))
        edges.append(n_total)
        bounds = torch.searchsorted(pairs[0].contiguous(), torch.tensor(edges, device=pairs.device)).cpu()
        pair_bounds, bead_bounds = [0], [0]
        ends: list[Tensor] = []
        partners: list[Tensor] = []
        beads: list[Tensor] = []
        orders: list[Tensor] = []
        starts: list[Tensor] = []
        for group in range(len(group_bounds) - 1):
            first, last = group_bounds[group], group_bounds[group + 1]
            is_whole = block_bounds[group + 1] - block_bounds[group] == 1
            for k in range(block_bounds[group], block_bounds[group + 1]):
                mine = pairs[:, int(bounds[k]) : int(bounds[k + 1])] - first
                owner, order = torch.sort(mine.flatten(), stable=True)
                own = torch.arange(last - first, device=pairs.device) if is_whole else torch.unique_consecutive(owner)
                ends.append(mine.flatten())
                partners.append(mine.flip(0).flatten())
                orders.append(order)
                beads.append(own)
                starts.append(torch.searchsorted(owner, own))
                pair_bounds.append(int(bounds[k + 1]))
                bead_bounds.append(bead_bounds[-1] + own.shape[0])
        self.pair_bounds, self.bead_bounds = pair_bounds, bead_bounds
        self.block_bounds, self.group_bounds = block_bounds, group_bounds
        self.pairs, self.partners, self.beads = torch.cat(ends), torch.cat(partners), torch.cat(beads)
        self.order, self.starts = torch.cat(orders), torch.cat(starts)
        pair_orders = [order % max(1, order.shape[0] // 2) for order in orders]
        self.pair_order = torch.cat(pair_orders)
        signs = [torch.where(order < order.shape[0] // 2, -1.0, 1.0) for order in orders]
        self.signs = torch.cat(signs).to(self.signs.dtype)

    def list_blocks(self, group: int) -> list[Block]:
        """The pairs of a group, block by block."""
        if len(self.pair_bounds) == 2:
            whole = Block(self.pairs, self.partners, self.beads, self.order, self.starts, self.pair_order, self.signs)
            return [whole]
        blocks: list[Block] = []
        for k in range(self.block_bounds[group], self.block_bounds[group + 1]):
            start, n = 2 * self.pair_bounds[k], 2 * (self.pair_bounds[k + 1] - self.pair_bounds[k])
            first, m = self.bead_bounds[k], self.bead_bounds[k + 1] - self.bead_bounds[k]
            blocks.append(
                Block(
                    self.pairs.narrow(0, start, n),
                    self.partners.narrow(0, start, n),
                    self.beads.narrow(0, first, m),
                    self.order.narrow(0, start, n),
                    self.starts.narrow(0, first, m),
                    self.pair_order.narrow(0, start, n),
                    self.signs.narrow(0, start, n),
                )
            )
        return blocks
