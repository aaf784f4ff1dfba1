"""One process of a fine-tuning under torchrun: trains in float64, and writes every step's loss.

Usage: torchrun … rank_worker.py FOLDER OUT EPOCHS STATE KILL, with the step before which rank 1 is
killed (-1: never), and a state file to resume from, if it is there, and to save after every step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from featstore.store import Store
from heads.training.course import TrainingError
from heads.training.ranks import joined
from tests.heads.finetuned import Cached, make_finetuning, numbers


def main(folder: Path, out: Path, epochs: int, state: Path, kill: int) -> int:
    torch.set_num_threads(1)
    cached = Cached(folder, Store.open(folder / "store"))
    with joined("cpu") as (ranks, device):
        assert device == "cpu"
        training = make_finetuning(
            cached, "hierarchical", torch.float64, ranks=ranks, epochs=epochs, patience=None,
            batch_size=2 // ranks.count, backbone_lr=1e-4, augment_jitter=0.2,
        )  # fmt: skip
        if state.is_file():
            training.load_state(torch.load(state, weights_only=True))

        def after_step(t: object) -> None:
            content = training.state()
            if ranks.first:
                torch.save(content, state.with_suffix(".new"))
                state.with_suffix(".new").replace(state)
            if ranks.rank == 1 and training.steps_done == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            training.run(after_step=after_step)
        except TrainingError as error:
            print(error, file=sys.stderr, flush=True)
            return 1
        if ranks.first:
            losses = [float(loss) for *_, loss, _ in training.take_steps()]
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in training.progress.history]
            weights = numbers(dict(training.kept())).tolist()
            out.write_text(json.dumps({"losses": losses, "history": rows, "weights": weights}))
    return 0


if __name__ == "__main__":
    sys.exit(
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
    )
