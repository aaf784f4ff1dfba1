"""Linear CKA of two embeddings of the same patches, from sums that grow with D, not with patches.

CKA (centred kernel alignment) compares what is near to what: 1 for embeddings that are equal up to a
rotation, a reflection and one scale, 0 where nothing that varies in one varies with the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

LEAST = 1e-6  # of the squares: less spread than this is rounding in float32


@dataclass
class Moments:
    """Sums over n patches of x (D,) and y (E,), with d = |x|² and e = |y|²; all float64 but `n`.

    Both are taken from an origin near them, the mean of the first block: CKA does not depend on it, but
    squares of what lies far from it would lose the digits that tell patches apart.

    Attributes:
        n: How many patches.
        origin_x: (D,) what x is taken from.
        origin_y: (E,) what y is taken from.
        x: (D,) Σ x.
        y: (E,) Σ y.
        xx: (D, D) Σ x xᵀ.
        yy: (E, E) Σ y yᵀ.
        xy: (D, E) Σ x yᵀ.
        d: Σ d.
        e: Σ e.
        dd: Σ d².
        ee: Σ e².
        de: Σ d·e.
        xd: (D,) Σ x·d.
        xe: (D,) Σ x·e.
        yd: (E,) Σ y·d.
        ye: (E,) Σ y·e.
    """

    n: int
    origin_x: torch.Tensor
    origin_y: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor
    yy: torch.Tensor
    xy: torch.Tensor
    d: torch.Tensor
    e: torch.Tensor
    dd: torch.Tensor
    ee: torch.Tensor
    de: torch.Tensor
    xd: torch.Tensor
    xe: torch.Tensor
    yd: torch.Tensor
    ye: torch.Tensor

    @classmethod
    def zeros(cls, dim_x: int, dim_y: int, device: torch.device | None = None) -> Moments:
        """Of no patch yet.

        Args:
            dim_x: D.
            dim_y: E.
            device: Where the blocks will be; None: the CPU.
        """

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        square = {"xx": (dim_x, dim_x), "yy": (dim_y, dim_y), "xy": (dim_x, dim_y)}
        return cls(
            n=0, origin_x=empty(dim_x), origin_y=empty(dim_y), x=empty(dim_x), y=empty(dim_y),
            **{name: empty(*shape) for name, shape in square.items()},
            d=empty(), e=empty(), dd=empty(), ee=empty(), de=empty(),
            xd=empty(dim_x), xe=empty(dim_x), yd=empty(dim_y), ye=empty(dim_y),
        )  # fmt: skip

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add a block of patches.

        The products are float32 within a block and float64 between blocks.

        Args:
            x: (n, D) float32, n ≥ 1.
            y: (n, E) float32, the same patches.
        """
        if not self.n:
            self.origin_x, self.origin_y = (each.mean(dim=0).double() for each in (x, y))
        x, y = x - self.origin_x.float(), y - self.origin_y.float()
        d, e = (((each * each) @ torch.ones_like(each[0])).double() for each in (x, y))
        self.n += len(x)
        self.xx += x.T @ x
        self.yy += y.T @ y
        self.xy += x.T @ y
        self.d += d.sum()
        self.e += e.sum()
        self.dd += d @ d
        self.ee += e @ e
        self.de += d @ e
        factors = torch.stack((torch.ones_like(d), d, e), dim=1).float()
        of_x, of_y = (x.T @ factors).double(), (y.T @ factors).double()
        self.x += of_x[:, 0]
        self.xd += of_x[:, 1]
        self.xe += of_x[:, 2]
        self.y += of_y[:, 0]
        self.yd += of_y[:, 1]
        self.ye += of_y[:, 2]

    def merge(self, other: Moments) -> None:
        """Add the patches of another, which stays as it is."""
        begun = self.n > 0
        if begun:
            other = other._moved(other.origin_x - self.origin_x, other.origin_y - self.origin_y)
        for field in fields(self):
            if begun and field.name.startswith("origin"):
                continue
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def _moved(self, p: torch.Tensor, q: torch.Tensor) -> Moments:
        """The sums of x + p (D,) and y + q (E,), by multiplying out."""
        n, pp, qq = self.n, p @ p, q @ q
        px, qy = p @ self.x, q @ self.y
        d, e = self.d + 2 * px + n * pp, self.e + 2 * qy + n * qq
        return Moments(
            n,
            self.origin_x - p,
            self.origin_y - q,
            self.x + n * p,
            self.y + n * q,
            self.xx + torch.outer(self.x, p) + torch.outer(p, self.x) + n * torch.outer(p, p),
            self.yy + torch.outer(self.y, q) + torch.outer(q, self.y) + n * torch.outer(q, q),
            self.xy + torch.outer(self.x, q) + torch.outer(p, self.y) + n * torch.outer(p, q),
            d,
            e,
            self.dd + 4 * (p @ self.xx @ p + p @ self.xd + pp * px) + 2 * pp * self.d + n * pp * pp,
            self.ee + 4 * (q @ self.yy @ q + q @ self.ye + qq * qy) + 2 * qq * self.e + n * qq * qq,
            self.de + 4 * p @ self.xy @ q + 2 * (q @ self.yd + p @ self.xe + qq * px + pp * qy)
            + qq * self.d + pp * self.e + n * pp * qq,
            self.xd + 2 * self.xx @ p + pp * self.x + p * d,
            self.xe + 2 * self.xy @ q + qq * self.x + p * e,
            self.yd + 2 * p @ self.xy + pp * self.y + q * d,
            self.ye + 2 * self.yy @ q + qq * self.y + q * e,
        )  # fmt: skip

    def linear_cka(self) -> float:
        """‖YᵀX‖²_F / (‖XᵀX‖_F · ‖YᵀY‖_F) of the centred embeddings.

        With fewer patches than features it is large for any two embeddings: see `debiased_cka`.

        Returns:
            In [0, 1]; NaN for fewer than two patches, or embeddings that are all the same.

        Source: Kornblith et al. 2019, arXiv 1905.00414, equation 4.
        """
        if self.n < 2:
            return math.nan
        own_x, own_y, both = (
            float(torch.linalg.norm(products - torch.outer(a, b) / self.n))
            for products, a, b in (
                (self.xx, self.x, self.x), (self.yy, self.y, self.y), (self.xy, self.x, self.y)
            )
        )  # fmt: skip
        if not self._vary():
            return math.nan
        return min(1.0, both * both / (own_x * own_y))

    def debiased_cka(self) -> float:
        """CKA of unbiased estimates of HSIC: about 0 for unrelated embeddings, however few patches.

        The sums over pairs of different patches come out of the moments: with K = XXᵀ and L = YYᵀ
        without their diagonals, tr KL = ‖XᵀY‖²_F − Σ d·e, and K1 = X Σx − d.

        Returns:
            At most about 1, and below 0 by chance; NaN for fewer than four patches, or where an
            embedding's own estimate is not above 0.

        Source: Song et al. 2012 (JMLR 13, equation 5) for the estimate; Nguyen et al. 2021, arXiv
        2010.15327, for its use in CKA, which they average over minibatches; here it is exact.
        """
        if self.n < 4 or not self._vary():
            return math.nan
        both = self._hsic(self.xy, self.x, self.y, (self.d, self.e), self.de, self.xe, self.yd)
        own_x = self._hsic(self.xx, self.x, self.x, (self.d, self.d), self.dd, self.xd, self.xd)
        own_y = self._hsic(self.yy, self.y, self.y, (self.e, self.e), self.ee, self.ye, self.ye)
        return both / math.sqrt(own_x * own_y) if own_x > 0 and own_y > 0 else math.nan

    def _vary(self) -> bool:
        """Whether both embeddings differ between patches."""
        for total, squares in ((self.x, self.d), (self.y, self.e)):
            spread = float(squares) - float(total @ total) / self.n
            if not spread > LEAST * float(squares):
                return False
        return True

    def _hsic(
        self,
        products: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        diagonals: tuple[torch.Tensor, torch.Tensor],
        crossed: torch.Tensor,
        x_by_e: torch.Tensor,
        y_by_d: torch.Tensor,
    ) -> float:
        """The unbiased estimate, times n·(n − 3), which cancels."""
        n = self.n
        trace = products.square().sum() - crossed
        sums = (x @ x - diagonals[0]) * (y @ y - diagonals[1])
        through = x @ products @ y - x @ x_by_e - y @ y_by_d + crossed
        return float(trace + sums / ((n - 1) * (n - 2)) - 2 * through / (n - 2))
