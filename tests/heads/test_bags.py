from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore.bags import collate
from tests.heads.bags import make_bag, nested


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_a_batch_holds_its_bags_end_to_end(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    bags = [make_bag(rng, str(i), label=i % 2) for i in range(count)]
    batch = collate(bags)
    assert len(batch) == count
    ends = batch.case_patch_offsets.tolist()
    for i, bag in enumerate(bags):
        mine = slice(ends[i], ends[i + 1])
        assert np.array_equal(batch.features[mine].numpy(), bag.features)
        assert (batch.patch_to_case[mine] == i).all()
        stains = slice(int(batch.case_offsets[i]), int(batch.case_offsets[i + 1]))
        assert batch.stain_ids[stains].tolist() == bag.stain_ids.tolist()
        assert batch.stain_offsets.diff()[stains].tolist() == bag.stain_sizes.tolist()
    assert batch.slice_offsets.diff().tolist() == [n for bag in bags for n in bag.slice_sizes.tolist()]
    assert batch.labels is not None
    assert batch.labels.tolist() == [i % 2 for i in range(count)]


@given(st.integers(0, 2**32 - 1), st.data())
def test_taking_patches_keeps_their_slices_and_stains(seed: int, data: st.DataObject) -> None:
    bag = make_bag(np.random.default_rng(seed))
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(bag), max_size=len(bag))))
    if not chosen.any():
        chosen[0] = True
    part = bag.take(chosen)
    assert np.array_equal(part.features, bag.features[chosen])
    names = np.repeat(bag.slices, bag.slice_sizes)[chosen]
    assert np.repeat(part.slices, part.slice_sizes).tolist() == names.tolist()
    assert sum(part.stain_sizes) == len(part.slices)
    stain_of_slice = dict(zip(bag.slices, np.repeat(bag.stains, bag.stain_sizes), strict=True))
    found = np.repeat(part.stains, part.stain_sizes).tolist()
    assert found == [stain_of_slice[name] for name in part.slices]
    assert len(nested(part)) == len(part.stains) == len(part.stain_ids)


def test_what_is_no_batch() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="needs bags"):
        collate([])
    with pytest.raises(ValueError, match="1 of 2 bags have a label"):
        collate([make_bag(rng, label=1), make_bag(rng, label=None)])
    with pytest.raises(ValueError, match="0 True"):
        make_bag(rng).take(np.zeros(3, bool))
    assert collate([make_bag(rng, label=None)]).labels is None


def test_a_batch_moves_whole() -> None:
    batch = collate([make_bag(np.random.default_rng(0))]).to("meta")
    assert batch.features.device == batch.case_offsets.device == torch.device("meta")
