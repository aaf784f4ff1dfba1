"""Attention that is asked by what it is to leave out, for all that is left out at once."""

from __future__ import annotations

import itertools

import torch

# Logits of the exact way at once, in numbers: what fits a core's cache.
_AT_ONCE = 2**20
# Up to such a change of logits the second order leaves less than 2e-7 of the sums.
_SMALL = 0.01


def conditioned_sums(
    queries: torch.Tensor,
    starts: torch.Tensor,
    units: torch.Tensor,
    attention: torch.Tensor,
    asked: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    fine: int,
) -> torch.Tensor:
    """Σ softmax(q_u · k_i) v_i over the patches i of a case outside of unit u, each u with its own query.

    Args:
        queries: (U, A) q_u, NaN where nothing is left.
        starts: (U + 1,) int64: unit u is the patches ``starts[u]`` to ``starts[u + 1]``.
        units: (B + 1,) int64: the units of each case.
        attention: (ΣP,) softmax(q · k_i) by the case's own q.
        asked: (B, A) that q.
        keys: (ΣP, A) k.
        values: (ΣP, F) v.
        offsets: (B + 1,) int64: the patches of each case.
        fine: How many of the F must be found to 2e-7 of the values. The others may be off by 5e-5: they
            are multiplied by something small.

    Returns:
        (U, F); NaN where nothing is left.
    """
    found = values.new_empty((len(queries), values.shape[1]))
    cases = zip(itertools.pairwise(units.tolist()), itertools.pairwise(offsets.tolist()), strict=True)
    for case, ((first, last), (start, end)) in enumerate(cases):
        q, k, v = queries[first:last], keys[start:end], values[start:end]
        begins = starts[first : last + 1] - start
        into = found[first:last]
        left = None
        # The series takes some 2 (F + 1) A² operations a patch, the exact way N (A + F).
        if last - first == end - start and 2 * (fine + 1) * k.shape[1] < end - start:
            left = _by_series(q - asked[case], attention[start:end], k, v, into, fine)
        rows = torch.arange(last - first, device=q.device) if left is None else left
        for block in torch.split(rows, max(1, _AT_ONCE // len(k))):
            into[block] = _exactly(q[block], begins[block], begins[block + 1], k, v)
    return found


def _exactly(
    queries: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """(R, F) sums of (R, A) queries over (N, A) keys but those from begin to end, (R,) each."""
    logits = queries @ keys.T
    if len(queries) and int((end - begin).max()) == 1:
        logits.scatter_(1, begin[:, None], -torch.inf)
    else:
        place = torch.arange(len(keys), device=keys.device)
        logits.masked_fill_((place >= begin[:, None]) & (place < end[:, None]), -torch.inf)
    return torch.softmax(logits, 1) @ values


def _by_series(
    change: torch.Tensor,
    attention: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    into: torch.Tensor,
    fine: int,
) -> torch.Tensor:
    """Sums without one patch each, of those patches without which the query hardly changes.

    With δ_ij = Δq_j · k_i, Σ_i a_i e^δ (1, v_i) = Σ a (1, v) + M₁ Δq_j + ½ Δq_jᵀ M₂ Δq_j + …, the moments
    M₁ = Σ a (1, v) kᵀ and, a matrix for each of the F + 1 numbers, M₂ = Σ a (1, v) k kᵀ of all patches;
    less what patch j itself adds. A quotient of the two is the same with any k₀ taken off all keys: with
    the mean key, δ is least. By Cauchy and Schwarz |δ_ij| ≤ |Δq_j| max |k_i|. Where M₂ is left out, as it
    is for all but the first numbers, δ²/2 is.

    Args:
        change: (N, A) Δq_j.
        attention: (N,) a.
        keys: (N, A) k.
        values: (N, F) v.
        into: (N, F), where the sums are written.
        fine: The first so many of the F are found with M₂.

    Returns:
        (L,) int64 the patches that this does not suit; their sums are to be found otherwise.
    """
    centred = keys - attention @ keys
    largest = torch.linalg.vector_norm(centred, dim=1).max()
    bound = torch.linalg.vector_norm(change, dim=1) * largest
    small = (bound <= _SMALL) & (attention <= 0.5)
    each = torch.cat((values.new_ones((len(values), 1)), values), 1)
    weighted = attention[:, None] * each
    total = weighted.sum(0) + change @ (centred.T @ weighted)
    scratch = torch.empty_like(keys)
    for number in range(1 + fine):
        second = torch.mul(centred, weighted[:, number, None], out=scratch).T @ centred
        torch.mm(change, second, out=scratch)
        total[:, number] += scratch.mul_(change).sum(1) / 2
    total -= torch.exp((change * centred).sum(1, keepdim=True)) * weighted
    torch.div(total[:, 1:], total[:, :1], out=into)
    return torch.nonzero(~small)[:, 0]
