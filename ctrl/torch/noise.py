r"""`ctrl.Noise` on a device: the same words, drawn where the policy lives, so that a GPU neither waits for normals nor copies them.

    Philox4x32-10( key = seed, counter = (path low, path high, step // 4, coordinate | stream << 28) )  ->  w_0, w_1, w_2, w_3

in signed 64-bit integers, whose products wrap modulo 2^64; Box-Muller in float64, rounded once to the precision that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ctrl import check
from ctrl.check import Array
from ctrl.kernels.normals import ACTION, START, STEP
from ctrl.noise import Noise, NoiseLike

CHUNK = 2**22  # counters at a time: bounds the working memory, about 100 bytes each
HOSTS = ("cpu", "mps")  # where the CPU's normals are used: compiled code is faster there, and MPS has no float64
LOW = 0xFFFFFFFF
MULTIPLIERS, INCREMENTS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True, eq=False)
class DeviceNoise:
    r"""The normals of a `ctrl.Noise` as tensors on a device, with its face: `start`, `steps` and `actions` return tensors.

        xi[p, i, j] = normal( Philox4x32-10( key = seed, counter = (p, i // 4, j, stream) ), i mod 4 )

    noise : whose numbers these are      dtype : float64 within a few units in the last place of its own, float32 those rounded
    Source: Salmon et al. (2011), Random123; theory.md, section 0.   Checked: tests/test_torch_noise.py::test_normals_are_those_of_the_noise
    """

    noise: Noise
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check.instance("noise", self.noise, Noise, "a ctrl.Noise")
        object.__setattr__(self, "device", torch.device(self.device))

    @property
    def paths(self) -> int:
        return self.noise.paths

    @property
    def group(self) -> int:
        """Consecutive paths that form one independent unit."""
        return self.noise.group

    @property
    def weights(self) -> None:
        """Random paths weigh the same."""
        return None

    def start(self, d: int) -> Tensor:
        """Normals of the start law, (n, d)."""
        return self._normals(START, 1, d)[:, 0]

    def steps(self, k: int, d: int) -> Tensor:
        """Brownian increments in units of sqrt(D), (n, k, d)."""
        return self._normals(STEP, k, d)

    def actions(self, k: int, d: int) -> Tensor:
        """Normals of sampled actions, (n, k, d)."""
        return self._normals(ACTION, k, d)

    def component(self, weights: ArrayLike) -> Array:
        """A mixture component per path, (n,): the noise's own."""
        return self.noise.component(weights)

    def __getitem__(self, part: slice) -> DeviceNoise:
        return replace(self, noise=self.noise[part])

    def _normals(self, stream: int, k: int, d: int) -> Tensor:
        k, d = check.integer("k", k, at_least=1), check.integer("d", d, at_least=1)
        out = torch.empty(self.paths, k, d, dtype=self.dtype, device=self.device)
        lane = torch.arange(d, device=self.device) | stream << 28
        for path, rows in self._chunks(out, max(1, CHUNK // d)):
            for m in range(0, k, 4):
                w = words(self.noise.seed, path[:, None], m // 4, lane)
                for row, normal in zip(rows[:, m : m + 4].unbind(1), (*box_muller(w[0], w[1]), *box_muller(w[2], w[3])), strict=False):
                    row.copy_(normal)
        if self.noise.antithetic:
            out[1::2].neg_()
        return out

    def _chunks(self, out: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Path indices, the same for both of an antithetic pair, and where their normals go."""
        first, keep = self.noise.first, ~int(self.noise.antithetic)
        for a, rows in zip(range(0, self.paths, size), out.split(size), strict=True):
            yield first + a + torch.arange(len(rows), device=self.device) & keep, rows


def words(seed: int, path: Tensor, group: int, lane: Tensor) -> list[Tensor]:
    r"""Philox4x32-10 of counters (path, group, lane), integers below 2^63, 2^32 and 2^32 in tensors that broadcast: four words.

    Source: Salmon et al. (2011).   Checked: tests/test_torch_noise.py::test_words_are_philox
    """
    c = [path & LOW, path >> 32, torch.full_like(path, group), lane]
    k = [seed & LOW, seed >> 32]
    for _ in range(10):
        a, b = c[0] * MULTIPLIERS[0], c[2] * MULTIPLIERS[1]
        c = [(b >> 32 & LOW) ^ c[1] ^ k[0], b & LOW, (a >> 32 & LOW) ^ c[3] ^ k[1], a & LOW]
        k = [(k[0] + INCREMENTS[0]) & LOW, (k[1] + INCREMENTS[1]) & LOW]
    return c


def box_muller(wa: Tensor, wb: Tensor) -> tuple[Tensor, Tensor]:
    r"""Two normals of two words, float64: sqrt(-2 log u_a) (cos, sin)(2 pi u_b) with u = (w + 1/2) 2^-32, the angle reduced exactly.

    Source: theory.md, section 0.   Checked: tests/test_torch_noise.py::test_normals_are_those_of_the_noise
    """
    radius = (-2 * ((wa.double() + 0.5) * 2.0**-32).log()).sqrt()
    turn = (wb + 2**29) >> 30  # nearest quarter turn, 0 ... 4
    x = ((wb - (turn << 30)).double() + 0.5) * (2 * math.pi * 2.0**-32)
    cosine, sine, odd = radius * x.cos(), radius * x.sin(), turn & 1 == 1
    return torch.where(odd, sine, cosine) * (1 - ((turn + 1) & 2)), torch.where(odd, cosine, sine) * (1 - (turn & 2))


AnyNoise = NoiseLike | DeviceNoise


def near(noise: AnyNoise, like: Tensor) -> AnyNoise:
    """The same noise, made where `like` lives and in its precision: a `ctrl.Noise` becomes a DeviceNoise on a GPU, all else stays.

    Source: Salmon et al. (2011).   Checked: tests/test_torch_noise.py::test_noise_is_made_where_the_policy_lives
    """
    if like.device.type in HOSTS or not isinstance(noise, Noise):
        return noise
    return DeviceNoise(noise, like.device, like.dtype)
