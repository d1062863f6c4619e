"""PHI standardisation: a rotation and one scale after which all channels of a teacher's features vary alike.

Source: Ranzinger et al. 2024, PHI-S (arXiv 2410.01680), sections 3.3 and 4. Where one error is summed over several
teachers and all their channels, none of them counts more than another, and within a teacher the ratios of all
distances stay.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from w2s.errors import ConfigError


class PhiS(nn.Module):
    """Targets y become a^-1 H U^T (y - m), in which every channel has variance 1.

    m is the mean of the features, U has the eigenvectors of their covariance, a^2 is the mean of its eigenvalues, and H
    is a Hadamard matrix of orthonormal rows: each entry of a row has the same size, so that each channel gets the same
    share of every eigenvalue. All are found in the first batch that is taken in, and stay: a rotation that turned under
    the student would be another target.

    Attributes:
        mean: m [D], float64.
        rotation: a^-1 H U^T [D, D], float64; zeros before the first batch.
    """

    mean: Tensor
    rotation: Tensor

    def __init__(self, width: int) -> None:
        """Prepare for features of `width` channels.

        Raises:
            ConfigError: there is no Hadamard matrix of that size here.
        """
        super().__init__()
        hadamard(width)
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("rotation", torch.zeros(width, width, dtype=torch.float64))
        self._found = False  # known to the host without waiting for the device
        self.register_load_state_dict_post_hook(lambda module, _: module._look())

    @property
    def ready(self) -> bool:
        """Whether the rotation is known."""
        return self._found

    @torch.no_grad()
    def forward(self, targets: Tensor, group: dist.ProcessGroup | None = None, *, update: bool) -> Tensor:
        """Normalise targets [n, P, D] (float32 in, float32 out); as `TargetNorm`.

        Raises:
            ValueError: there is no rotation yet and `update` is false.
        """
        if not self._found and not update:
            raise ValueError("PhiS has seen no targets: call it with update=True first")
        if not self._found:
            self._find(targets.flatten(0, 1).double(), group)
        return (targets - self.mean.float()) @ self.rotation.float().T

    def _find(self, features: Tensor, group: dist.ProcessGroup | None) -> None:
        """Find mean and rotation of `features` [m, D] of all ranks, which the first of them tells the others."""
        total = features.new_tensor(float(len(features)))
        mean = _sum(features.sum(0), group) / _sum(total, group)
        centred = features - mean
        covariance = _sum(centred.T @ centred, group) / total
        rotation = rotation_of(covariance)
        if group is not None and dist.get_rank(group):
            rotation.zero_()  # eigenvectors are known up to their signs: those of the first rank count
        self.mean.copy_(mean)
        self.rotation.copy_(_sum(rotation, group))
        self._found = True

    def _look(self) -> None:
        self._found = bool(self.rotation.any())


def rotation_of(covariance: Tensor) -> Tensor:
    """Return a^-1 H U^T for a covariance [D, D], float64."""
    values, vectors = torch.linalg.eigh(covariance)
    scale = values.mean().clamp_min(torch.finfo(values.dtype).tiny).rsqrt()
    return scale * hadamard(len(values)).to(covariance) @ vectors.T


def hadamard(size: int) -> Tensor:
    """Return a Hadamard matrix divided by the root of its size, which makes it orthogonal: float64 [size, size].

    Sylvester doubles a smaller one, Paley makes one of the squares of a prime field (Paley 1933).

    Raises:
        ConfigError: neither does for this size.
    """
    smaller = [size // 2**doublings for doublings in range(size.bit_length()) if size % 2**doublings == 0]
    matrix = next((each for each in map(_undoubled, smaller) if each is not None), None)
    if matrix is None:
        raise ConfigError(
            f"target_norm=phi_s needs a Hadamard matrix of {size} channels, and there is none here: use another "
            "target_norm"
        )
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def _undoubled(size: int) -> Tensor | None:
    """A Hadamard matrix of entries 1 and -1 that is not a double, if one of the constructions gives it."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4 == 0 and _is_prime(size - 1):
        skew = _bordered(size - 1, -1.0)  # of q = 3 mod 4
        return skew + torch.eye(size, dtype=torch.float64)
    if size % 4 == 0 and size // 2 % 4 == 2 and _is_prime(size // 2 - 1):
        even = _bordered(size // 2 - 1, 1.0)  # of q = 1 mod 4
        one, other = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
        return torch.kron(even, one) + torch.kron(torch.eye(size // 2, dtype=torch.float64), other)
    return None


def _bordered(q: int, sign: float) -> Tensor:
    """Paley's conference matrix: the quadratic characters of all differences in the field of q, and a border."""
    squares = torch.arange(q) ** 2 % q
    character = -torch.ones(q, dtype=torch.float64)
    character[squares] = 1.0
    character[0] = 0.0
    element = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:] = character[(element[:, None] - element) % q]
    matrix[0, 1:], matrix[1:, 0] = 1.0, sign
    return matrix


def _is_prime(value: int) -> bool:
    return value > 1 and all(value % factor for factor in range(2, int(value**0.5) + 1))


def _sum(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks of `group`, in place."""
    if group is not None and group.size() > 1:
        dist.all_reduce(part, group=group)
    return part
