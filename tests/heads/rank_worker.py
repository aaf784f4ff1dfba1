"""One process of a fine-tuning under torchrun: trains in float64, and writes every step's loss.

Usage: torchrun … rank_worker.py FOLDER OUT EPOCHS STATE KILL SETTINGS

KILL is the step before which rank 1 is killed (-1: never); STATE a file to resume from, if it is there,
and to save to after every step; SETTINGS of fine-tuning, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from featstore.process import stop_on_signal
from featstore.store import Store
from heads.training.course import TrainingError
from heads.training.ranks import joined
from tests.heads.finetuned import Cached, make_finetuning, numbers


def main(folder: Path, out: Path, epochs: int, state: Path, kill: int, settings: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    cached = Cached(folder, Store.open(folder / "store"))
    with joined("cpu") as (ranks, device):
        assert device == "cpu"
        own = {"batch_size": 2 // ranks.count, "backbone_lr": 1e-4, "augment_jitter": 0.2, **settings}
        training = make_finetuning(
            cached, "hierarchical", torch.float64, ranks=ranks, epochs=epochs, patience=None, **own
        )
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
            # As the command does: torchrun ends the others by SIGTERM, maybe before they notice.
            with stop_on_signal() as received:
                training.run(stop=received, after_step=after_step)
        except TrainingError as error:
            print(error, file=sys.stderr, flush=True)
            return 1
        if ranks.first:
            losses = [float(loss) for *_, loss, _ in training.take_steps()]
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in training.progress.history]
            weights = numbers(dict(training.kept())).tolist()
            found = {"losses": losses, "history": rows, "weights": weights}
            out.write_text(json.dumps(found))
        own_weights = numbers(training.model.state_dict()).tolist()
        alike = [weights == own_weights for weights in ranks.gather(own_weights)]
        assert all(alike), "the processes' models are not the same"
    return 0


if __name__ == "__main__":
    folder, out, epochs, state, kill, settings = sys.argv[1:]
    sys.exit(main(Path(folder), Path(out), int(epochs), Path(state), int(kill), json.loads(settings)))
