"""Training of the β-VAE, and of plain empirical risk minimisation on the same encoder: steps of batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.backbones import normalize
from featstore.backbones.vae import ONES, ZEROS
from featstore.errors import ConfigError
from featstore.extraction.forward import is_out_of_memory
from heads.models.vae import BetaVae
from heads.training.course import TrainingError, seeded
from heads.training.optimizer import autocast, choose_amp
from heads.training.vae_config import VaeConfig, annealing_of
from heads.training.vae_data import Batch, Ints, VaeData
from heads.training.vae_loss import VaeTerms, erm_terms, vae_terms

Method = Literal["vae", "erm"]
TERMS = ("recon_loss", "KLD_loss", "CE", "total_loss", "accuracy")  # as `VaeTerms.stacked`


@dataclass
class VaeProgress:
    """How far a training is.

    Attributes:
        step: Steps done.
        best_step: After which the validation images fared best; 0 before the first validation.
        best_accuracy: Then, the mean over environments.
        best_cross_entropy: Then; it decides between equal accuracies.
        seconds: Spent training, validation and pictures aside.
        history: One row for every line of the log.
    """

    step: int = 0
    best_step: int = 0
    best_accuracy: float = -1.0
    best_cross_entropy: float = math.inf
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Judged:
    """Images as the model sees them in evaluation: by the means of their codes.

    Attributes:
        probabilities: (N, C) float64.
        terms: The mean losses, named as in `TERMS`; the total has w = 1.
    """

    probabilities: NDArray[np.float64]
    terms: dict[str, float]


class VaeTraining:
    """Trains on some images and watches others.

    What a step draws (images, flips, noise, dropout) depends on the seed and its number alone, so that a
    training that was interrupted and resumed equals one that was not. Both methods see the same batches.

    Args:
        model: As drawn from the seed; trained in place.
        data: The images.
        config: The section ``vae``.
        device: Where it runs.
        method: ``vae``, or ``erm``: encoder, mean and classifier by cross-entropy alone.

    Raises:
        ConfigError: The settings do not suit one another or the device.
    """

    def __init__(
        self, model: BetaVae, data: VaeData, config: VaeConfig, device: torch.device, method: Method = "vae"
    ) -> None:
        if config.amp == "fp16" and device.type == "cpu":
            raise ConfigError(
                "fp16 without a GPU", expected="bf16 or off", where="vae.amp", fix="--vae-amp bf16"
            )
        self.config, self.data, self.device, self.method = config, data, device, method
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.annealing = annealing_of(config)
        self.amp = choose_amp(config.amp, device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")
        self.progress = VaeProgress()
        self.best: dict[str, torch.Tensor] = {}
        self._pin = device.type == "cuda"
        self._reset_sums()

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self.config.steps

    def run(
        self,
        after_step: Callable[[VaeTraining], None] = lambda training: None,
        stop: Sequence[int] = (),
    ) -> None:
        """Train until all steps are done, or until ``stop`` is no longer empty.

        Args:
            after_step: Called after every step; a row was added to the history if it was logged.
            stop: Signals received so far; looked at between steps.

        Raises:
            TrainingError: The loss is no longer a number, or memory ran out.
        """
        progress, config = self.progress, self.config
        with (
            _memory_for(config),
            closing(self.data.training_batches(progress.step, config, self._pin)) as batches,
        ):
            while not self.finished and not stop:
                started = time.perf_counter()
                self._step(next(batches))
                progress.step += 1
                logged = progress.step % config.log_every == 0 or self.finished
                validated = progress.step % config.val_every == 0 or self.finished
                row = self._row() if logged or validated else {}  # waits for the device
                progress.seconds += time.perf_counter() - started
                if row:
                    progress.history.append(row | {"seconds": progress.seconds})
                if validated:
                    self._validate()
                after_step(self)

    def _step(self, batch: Batch) -> None:
        step = self.progress.step
        self.model.train()
        with seeded(self.device, self.config.seed * 1_000_003 + step):
            images, labels = self._on_device(batch)
            with autocast(self.device, self.amp):
                terms = self._terms(images, labels, self.annealing(step))
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(self.scaler.scale(terms.total))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._sums += terms.stacked()
        self._counts += np.array([1, len(batch.labels)])

    def _terms(self, images: torch.Tensor, labels: torch.Tensor, w: float) -> VaeTerms:
        """The loss of a batch of training, in which decoder and classifier see drawn codes."""
        if self.method == "erm":
            return erm_terms(self.model.classify(images), labels)
        config = self.config
        noise = torch.randn(len(images), config.latent, device=self.device)
        output = self.model(images, noise)
        kl_weight = config.loss_multiplier_kl * w
        return vae_terms(output, images, labels, kl_weight, config.loss_multiplier_y, config.kl_reduction)

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) float32 in [0, 1], channels_last, as extraction makes them; and labels."""
        pixels = batch.pixels.to(self.device, non_blocking=True)
        images = normalize(pixels, ZEROS, ONES, torch.float32)
        return images, batch.labels.to(self.device, non_blocking=True)

    def _reset_sums(self) -> None:
        self._sums = torch.zeros(len(TERMS), device=self.device)
        self._counts = np.zeros(2, np.int64)  # steps, images

    def _row(self) -> dict[str, float]:
        """The means since the last row; errors as `run`."""
        steps, images = self._counts.tolist()
        means = _named(self._sums.cpu().numpy() / steps, steps / images, self.method)
        self._reset_sums()
        step = self.progress.step
        if not math.isfinite(means["total_loss"]):
            raise TrainingError(
                f"the loss is no longer a number in the steps up to {step}",
                expected="finite losses",
                where=f"vae.lr {self.config.lr:g}, vae.amp {self.config.amp}",
                fix="lower the rate: --vae-lr 1e-5; with fp16: --vae-amp bf16 or off",
            )
        return {"step": step, "w": self.annealing(step - 1), **means}

    def _validate(self) -> None:
        """Judge the validation images, and keep the weights if they fare best."""
        progress, images = self.progress, self.data.images
        judged = self.judge(self.data.val)
        right = judged.probabilities.argmax(axis=1) == images.label[self.data.val]
        where = images.environment[self.data.val]
        accuracy = float(np.mean([right[where == each].mean() for each in np.unique(where)]))
        row = {**judged.terms, "accuracy": accuracy}
        progress.history[-1] |= {f"val_{name}": value for name, value in row.items()}
        cross_entropy = judged.terms["CE"]
        if (accuracy, -cross_entropy) > (progress.best_accuracy, -progress.best_cross_entropy):
            progress.best_accuracy, progress.best_cross_entropy = accuracy, cross_entropy
            progress.best_step = progress.step
            self.best = {name: value.cpu().clone() for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def judge(self, chosen: Ints) -> Judged:
        """What the model says of some images, by the means of their codes.

        Args:
            chosen: Their indices.
        """
        self.model.eval()
        sums = torch.zeros(len(TERMS), dtype=torch.float64, device=self.device)
        logits = []
        size = self.config.batch_size
        with _memory_for(self.config), closing(self.data.plain_batches(chosen, size, self._pin)) as batches:
            for batch in batches:
                images, labels = self._on_device(batch)
                with autocast(self.device, self.amp):
                    terms, scores = self._judged(images, labels)
                found = terms.stacked().double()
                sums[:4] += found[:4] * len(batch.labels)
                sums[4] += found[4]
                logits.append(scores)
        p = torch.cat(logits).double().softmax(dim=1).cpu().numpy()
        return Judged(p, _named(sums.cpu().numpy() / len(chosen), 1.0, self.method))

    def _judged(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[VaeTerms, torch.Tensor]:
        if self.method == "erm":
            logits = self.model.classify(images)
            return erm_terms(logits, labels), logits
        config, output = self.config, self.model(images)
        kl_weight, y_weight = config.loss_multiplier_kl, config.loss_multiplier_y
        return vae_terms(output, images, labels, kl_weight, y_weight, config.kl_reduction), output.logits

    @torch.no_grad()
    def reconstruct(
        self, chosen: Ints
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
        """Images beside what their codes' means give back.

        Returns:
            Pixels (N, H, W, 3) uint8; reconstructions (N, H, W, 3) in [0, 1]; means (N, latent).
        """
        self.model.eval()
        batch = self.data.load(chosen)
        images, _ = self._on_device(batch)
        with autocast(self.device, self.amp):
            output = self.model(images)
        shown = output.image.permute(0, 2, 3, 1).cpu().numpy()
        return batch.pixels.numpy(), shown, output.mean.cpu().numpy()

    @torch.no_grad()
    def decode(self, codes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images (N, H, W, 3) in [0, 1] of codes (N, latent)."""
        self.model.eval()
        with autocast(self.device, self.amp):
            logits = self.model.decoder(torch.from_numpy(codes).to(self.device))
        return torch.sigmoid(logits.float()).permute(0, 2, 3, 1).cpu().numpy()

    def state(self) -> dict[str, Any]:
        """Everything that resuming needs, of types that ``torch.load(weights_only=True)`` reads."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "best": self.best,
            "sums": self._sums.cpu(),
            "counts": self._counts.tolist(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = VaeProgress(**state["progress"])
        self.best = dict(state["best"])
        self._sums = state["sums"].to(self.device)
        self._counts = np.array(state["counts"], np.int64)


def _named(means: NDArray[Any], share: float, method: Method) -> dict[str, float]:
    """Terms by name; the last is a number of images, and those that a method has not are NaN."""
    found = dict(zip(TERMS, (float(value) for value in means), strict=True))
    found["accuracy"] *= share
    if method == "erm":
        found |= {"recon_loss": math.nan, "KLD_loss": math.nan}
    return found


@contextmanager
def _memory_for(config: VaeConfig) -> Iterator[None]:
    """Memory that runs out is told with the settings that need less of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"memory ran out in a step of {config.batch_size} images of {config.size} × {config.size} px",
            expected="a batch that fits into the device's memory",
            where=f"vae.batch_size, vae.size, vae.encoder {config.encoder}",
            fix=f"--vae-batch-size {max(2, config.batch_size // 2)}, or a smaller --size",
        ) from error
