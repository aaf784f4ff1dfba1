"""What a fine-tuning has to say at its end."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from heads.evaluation.results import Evaluation
from heads.evaluation.runs import RunFolder


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tuning did.

    Attributes:
        run: The folder.
        evaluation: Of the fine-tuned model on the test cases; None if it was interrupted.
        interrupted: The signal that ended it early; None if it was not.
        steps: Steps done.
        export: The exported backbone, relative to the project; empty if it was interrupted.
        store: Where its embeddings are to be cached.
        fingerprint: Of these embeddings.
        changed: Patches that are no longer the files that were embedded.
    """

    run: RunFolder
    evaluation: Evaluation | None
    interrupted: int | None
    steps: int
    export: str = ""
    store: str = ""
    fingerprint: str = ""
    changed: int = 0

    def to_text(self) -> str:
        """The results and what to do next, or how to go on."""
        if self.evaluation is None:
            return (
                f"interrupted after {self.steps} steps\n"
                f"to go on: featstore finetune --resume {self.run.path}"
            )
        export, store = shlex.quote(self.export), shlex.quote(self.store)
        return (
            f"{self.evaluation.to_text()}\n"
            f"  the backbone is in {self.export} (fingerprint {self.fingerprint[:12]})\n"
            "to cache with it, in the project's folder:\n"
            f"  featstore extract --backbone {export} --store {store}\n"
            f"then: featstore train-head --store {store}, or featstore evaluate {self.run.path.name}"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        if self.evaluation is None:
            return {"run": str(self.run.path), "steps": self.steps, "interrupted": self.interrupted}
        own: dict[str, Any] = {
            "backbone": self.export,
            "store": self.store,
            "fingerprint": self.fingerprint,
        }
        own |= {"changed_files": self.changed}
        return {**self.evaluation.to_json(), **own, "interrupted": None}
