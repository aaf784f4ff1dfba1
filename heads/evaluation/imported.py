"""What an imported checkpoint is worth: one set of weights, of whose training nothing is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heads.evaluation.results import Evaluation


@dataclass(frozen=True)
class ImportedEvaluation(Evaluation):
    """An evaluation that has no epochs to tell of.

    Attributes:
        about: Where it comes from, as in ``run.json``.
    """

    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, done: Evaluation, about: Mapping[str, Any]) -> ImportedEvaluation:
        """The same numbers, told otherwise."""
        return cls(**vars(done), about=about)

    def to_text(self) -> str:
        """Where it comes from; loss, accuracy and AUC; where the rest is."""
        source = f"  imported from {self.about['checkpoint']}: {self.about['model']}"
        numbers = self.lines("best", self.part) + self.threshold_lines()
        return "\n".join([f"{self.run.path}", source, *numbers])

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types, all metrics included."""
        whole = super().to_json()
        for name in ("best_epoch", "best_val_loss", "epochs"):
            del whole[name]
        return whole | {"imported": dict(self.about)}
