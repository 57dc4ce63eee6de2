"""Partitions: which client holds which samples."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Subset

from sparsity.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Parts = list[Tensor]
TRIES = 1000  # draws of a random partition before it is given up


class Partition:
    """Divides samples among clients, the same for the same seed. Partitions override `draw`."""

    needs_labels = False  # whether labels matter
    apart = False  # whether clients hold data that no other machine has

    def __call__(self, labels: Tensor, clients: int, seed: int = 0) -> Parts:
        """The indices of each client's samples in ascending order, int64: each sample is at exactly one client.

        Raises `InputError` where there are fewer samples than clients, or no draw gives each client what it must have.
        """
        if clients < 1 or len(labels) < clients:
            raise InputError(f"{len(labels)} samples cannot be divided among {clients} clients, at least one for each")
        rng = np.random.default_rng(seed)
        return [torch.from_numpy(np.sort(part)) for part in self.draw(labels.cpu().numpy(), clients, rng)]

    def draw(self, labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        """The indices of each client's samples, in any order."""
        raise NotImplementedError(f"{type(self).__name__} divides nothing")


class IID(Partition):
    """Shuffled and dealt out evenly: sizes differ by one at most."""

    def draw(self, labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        return np.array_split(rng.permutation(len(labels)), clients)


class Skewed(Partition):
    """Drawn at random until each client has at least `least` samples. Partitions override `once`.

    Args:
        alpha: of the symmetric Dirichlet distribution that shares are drawn from; the smaller, the more unequal.
        least: samples of each client.
    """

    def __init__(self, alpha: float = 0.5, least: int = 1) -> None:
        if alpha <= 0 or least < 1:
            raise InputError(f"expected {alpha=} above 0 and {least=} of at least 1")
        self.alpha, self.least = alpha, least

    def once(self, labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        """One draw, whatever it gives to whom."""
        raise NotImplementedError(f"{type(self).__name__} divides nothing")

    def draw(self, labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        for _ in range(TRIES):
            found = self.once(labels, clients, rng)
            if min(map(len, found)) >= self.least:
                return found
        raise InputError(
            f"alpha={self.alpha} starves a client: in {TRIES} draws of {clients} clients one always had fewer than "
            f"{self.least} of {len(labels)} samples; take a larger alpha, fewer clients or a smaller `least`"
        )

    def _shared(self, samples: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        """The samples, shuffled, in shares."""
        shares = rng.dirichlet(np.full(clients, self.alpha))
        ends = np.rint(np.cumsum(shares)[:-1] * len(samples)).astype(int)
        return np.split(rng.permutation(samples), ends)


class Dirichlet(Skewed):
    """Each class is divided among the clients by shares of its own: the smaller alpha, the fewer classes each has.

    Hsu, Qi & Brown (arXiv 1909.06335) in the variant of Yurochkin et al. (arXiv 1905.12022), which draws per class.
    """

    needs_labels = True

    def once(self, labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        classes = [self._shared(np.flatnonzero(labels == label), clients, rng) for label in np.unique(labels)]
        return [np.concatenate(parts) for parts in zip(*classes, strict=True)]


class Pathological(Partition):
    """Each client has samples of exactly so many classes, and classes are shared out evenly.

    McMahan et al. (arXiv 1602.05629), who deal two shards of sorted samples to each client, so that some clients get
    more classes; here it is exact.
    """

    needs_labels = True

    def __init__(self, classes: int = 2) -> None:
        if classes < 1:
            raise InputError(f"a client has at least one class, got classes={classes}")
        self.classes = classes

    def draw(self, labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        kinds = np.unique(labels)
        if self.classes > len(kinds) or clients * self.classes < len(kinds):
            raise InputError(
                f"{clients} clients of {self.classes} classes each cannot share {len(kinds)} classes out: take at most "
                f"{len(kinds)} classes, and at least {-(-len(kinds) // self.classes)} clients"
            )
        held = self._classes(len(kinds), clients, rng)
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for kind, label in enumerate(kinds):
            holders = np.flatnonzero([kind in mine for mine in held])
            mine = rng.permutation(np.flatnonzero(labels == label))
            if len(mine) < len(holders):
                raise InputError(
                    f"class {label} has {len(mine)} samples for {len(holders)} clients: take fewer clients"
                )
            for client, part in zip(holders, np.array_split(mine, len(holders)), strict=True):
                parts[client].append(part)
        return [np.concatenate(part) for part in parts]

    def _classes(self, kinds: int, clients: int, rng: np.random.Generator) -> list[set[int]]:
        """The classes of each client: those that the fewest have so far, among equals at random."""
        taken = np.zeros(kinds, int)
        found = []
        for _ in range(clients):
            order = np.lexsort((rng.random(kinds), taken))[: self.classes]
            taken[order] += 1
            found.append(set(order.tolist()))
        return found


class QuantitySkew(Skewed):
    """Clients have the same classes and very different numbers of samples."""

    def once(self, labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        return self._shared(np.arange(len(labels)), clients, rng)


class ById(Partition):
    """One client for each natural id: a writer, a user, a hospital. Clients are in the order of their ids.

    Args:
        ids: that of each sample, in the order of the samples.
    """

    def __init__(self, ids: Sequence[Any]) -> None:
        self.ids = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)

    def draw(self, labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        names = sorted(set(self.ids))
        if len(self.ids) != len(labels) or len(names) != clients:
            raise InputError(
                f"there are {len(self.ids)} ids, {len(names)} different ones, for {len(labels)} samples of {clients} "
                f"clients: give one id for each sample, and take {len(names)} clients"
            )
        places: Mapping[Any, int] = {name: place for place, name in enumerate(names)}
        owners = np.array([places[each] for each in self.ids])
        return [np.flatnonzero(owners == place) for place in range(clients)]


class OwnData(Partition):
    """Each client has data of its own, on its own machine, and nothing is divided: for Flower's nodes.

    A client's indices are those of its own training set, 0 to `samples` - 1.

    Args:
        samples: how many training samples each client has. The server weighs their updates by these, whatever they say.
    """

    apart = True

    def __init__(self, samples: list[int]) -> None:
        if not isinstance(samples, list | tuple) or not all(type(each) is int and each > 0 for each in samples):
            raise InputError(f"samples are a whole number for each client, at least one, got {samples!r}")
        self.samples = list(samples)

    def __call__(self, labels: Tensor, clients: int, seed: int = 0) -> Parts:
        if len(self.samples) != clients:
            raise InputError(f"samples={self.samples} are those of {len(self.samples)} clients, there are {clients=}")
        return [torch.arange(count) for count in self.samples]


def labels_of(dataset: Any) -> Tensor:
    """The label of each sample of a map-style dataset, int64: its `labels` or `targets`, or else read one by one.

    Raises `InputError` where they are not one whole number for each sample.
    """
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    for name in ("labels", "targets"):
        found = getattr(dataset, name, None)
        if found is not None and len(found) == len(dataset):
            return _whole(found)
    first = dataset[0]
    if not isinstance(first, list | tuple) or len(first) < 2:
        raise InputError(
            f"labels are looked for in pairs (input, label), got {type(first).__name__}: give the dataset an attribute "
            "`labels`, or take a partition that needs none (IID, QuantitySkew, ById)"
        )
    read = (dataset[place][1] for place in range(len(dataset)))
    return _whole(list(track(read, "labels", total=len(dataset), transient=True)))


def _whole(found: Any) -> Tensor:
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError) as error:
        raise InputError(f"labels are one whole number for each sample, got {found[0]!r} for the first") from error
    if labels.ndim != 1 or bool((labels != labels.long()).any()) or bool((labels < 0).any()):
        raise InputError(
            f"labels are one whole number from 0 on for each sample, got {tuple(labels.shape)} of {labels.dtype}, "
            f"{found[0]!r} for the first: take a partition that needs none (IID, QuantitySkew, ById), or give classes"
        )
    return labels.long()


def holdings(parts: Parts, labels: Tensor) -> Tensor:
    """How many samples of each class each client holds: int64 [clients, classes]."""
    classes = int(labels.max()) + 1
    return torch.stack([labels[part].bincount(minlength=classes) for part in parts])


def figure(parts: Parts, labels: Tensor) -> "Figure":
    """Who holds what: a bar for each client, its classes stacked. Needs matplotlib (the `viz` extra)."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    table = holdings(parts, labels).numpy()
    picture = Figure(figsize=(max(6.0, 0.12 * len(parts) + 3), 4), layout="constrained")
    axes = picture.add_subplot()
    below = np.zeros(len(parts))
    for label, counts in enumerate(table.T):
        axes.bar(
            np.arange(len(parts)),
            counts,
            bottom=below,
            width=1.0,
            color=colormaps["tab20"](label % 20),
            label=str(label),
        )
        below = below + counts
    axes.set(xlabel="client", ylabel="samples", xlim=(-0.5, len(parts) - 0.5))
    axes.locator_params(axis="x", integer=True)
    axes.set_title("Who holds what", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return picture
