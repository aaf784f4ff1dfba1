"""Bags without a cache: a batch's embeddings are computed by the backbone as it is now."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import nn

from featstore.bags import Bag, BagBatch, collate
from featstore.patch_pixels import PatchPixels
from featstore.store import Store
from heads.training.live import LiveBackbone, sight_of


class LiveBags:
    """Labelled bags whose plain patches go through a backbone whenever a batch is asked for.

    To a head, to `heads.evaluation.predict` and to `heads.evaluation.results` it is what
    `featstore.resident.CaseBags` is, without a gradient.

    Args:
        store: Which patches there are; its embeddings are not read.
        labels: Class index of every case that is wanted.
        live: The backbone; used in eval mode.
        pixels: The patches' files.

    Attributes:
        outlines: By case.
        device: Of the batches.
        views: Cached views a patch: none but the plain one.
    """

    views = 1

    def __init__(
        self, store: Store, labels: Mapping[str, int], live: LiveBackbone, pixels: PatchPixels
    ) -> None:
        self.store, self.live, self.pixels = store, live, pixels
        self.device = live.device
        self.outlines = {case: replace(store.outline(case), label=label) for case, label in labels.items()}

    def by(self, module: nn.Module) -> LiveBags:
        """The same patches, seen by another module of the backbone's kind."""
        found = copy.copy(self)
        found.live = self.live.of(module)
        return found

    @torch.no_grad()
    def batch(self, bags: Sequence[Bag]) -> BagBatch:
        """Lay bags end to end, with the embeddings of their plain patches."""
        live, sight = self.live, sight_of(self.live, self.pixels, bags)
        live.module.eval()
        with closing(self.pixels.read(sight.requests())) as pixels:
            return batch_of(bags, live.embed(sight, pixels))


def batch_of(bags: Sequence[Bag], features: torch.Tensor) -> BagBatch:
    """Bags laid end to end, with (ΣP, D) features on the device that the batch is wanted on."""
    batch = collate(bags)
    if features.device.type != "cpu":
        batch = batch.pin_memory().to(features.device)
    return replace(batch, features=features)
