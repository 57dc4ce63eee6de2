"""The server: what it makes of its clients' updates."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsity.errors import InputError
from sparsity.federated.exact import Exact, Wide
from sparsity.federated.layout import Layout
from sparsity.federated.state import State
from sparsity.ops import largest

Slopes = Callable[[Callable[[], Tensor]], Iterator[Tensor]]


def no_samples(where: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Of a server without samples of its own."""
    return iter(())


class Update:
    """What a client has come to.

    values: its model's state as a vector, zero where it prunes. mask: bool of [masked]. samples: of how many it
    speaks. more: further vectors: the change of its "controls" (SCAFFOLD), "squares" of gradients (PruneFL).
    """

    def __init__(self, values: Tensor, mask: Tensor, samples: int, more: dict[str, Tensor] | None = None) -> None:
        self.values, self.mask, self.samples = values, mask, samples
        self.more = dict(more or {})


class Sums:
    """The sums of a round's updates, the same in whatever order they are added.

    Of weights that have masks only those that keep one count, for what they keep: weighted by samples.
    """

    def __init__(self, layout: Layout, more: dict[str, int]) -> None:
        self.values = Exact(layout.size)
        self._holders = torch.zeros(layout.masked, dtype=torch.int64)
        self.more = {name: (Wide if name == "squares" else Exact)(size) for name, size in more.items()}
        self._totals = torch.zeros(2, dtype=torch.int64)  # samples, clients
        self._mask: Tensor | None = None  # of the last clients that were added
        self._last = [0, 0]  # their samples and how many they are, which the tensors do not have yet

    def add(self, update: Update) -> None:
        """Adds an update that has been looked at (`tolerance.refuse`)."""
        for name, total in self.more.items():
            total.add(update.more[name])
        self.values.add(update.values, update.samples)
        if update.mask is not self._mask:
            self._count()
        self._mask, self._last = update.mask, [self._last[0] + update.samples, self._last[1] + 1]

    def tensors(self) -> list[Tensor]:
        """The integers to add up over processes, in place."""
        vectors = [self.values, *self.more.values()]
        return [self.holders, self._totals, *(tensor for vector in vectors for tensor in vector.tensors())]

    @property
    def holders(self) -> Tensor:
        """The samples of those that keep a weight, int64 of [masked]."""
        self._count()
        return self._holders

    @property
    def samples(self) -> int:
        """Of all updates."""
        return int(self._totals[0]) + self._last[0]

    @property
    def clients(self) -> int:
        """How many updates."""
        return int(self._totals[1]) + self._last[1]

    def _count(self) -> None:
        # Clients with the same mask count together: a vector for each would take longer than small clients train.
        if self._mask is not None:
            self._holders.add_(self._mask, alpha=self._last[0])
            self._totals += torch.tensor(self._last)
        self._mask, self._last = None, [0, 0]


class FedAvg:
    """The average of the clients' weights: McMahan et al. (AISTATS 2017, arXiv 1602.05629).

    A weight is averaged over the clients that keep it (FedDST), by their samples.

    Args:
        rate: how far to go from the last weights towards the average.
        residual: whether clients that did not take part count with the last weights, by their samples, as in FedSGC:
            with a tenth of the clients in a round the step is a tenth of FedAvg's.
    """

    controls = False  # whether clients correct their drift by control variates
    gathers = False  # whether all updates are needed at once, beside their sums
    share = 0.0  # the part of the training samples that the server keeps for itself

    def __init__(self, rate: float = 1.0, residual: bool = False) -> None:
        if rate <= 0:
            raise InputError(f"rate must be above 0, got {rate}")
        self.rate, self.residual = rate, residual

    def mean(self, state: State, sums: Sums, layout: Layout, samples: int) -> tuple[Tensor, Tensor]:
        """The average, and where there is one: float64 and bool of [size]. `samples` are those of all clients."""
        absent = samples - sums.samples if self.residual else 0
        mask = torch.cat([state.mask, torch.ones(layout.size - layout.masked, dtype=torch.bool)])
        total = sums.values.value() + absent * torch.where(mask, state.values, 0.0)
        unmasked = torch.full((layout.size - layout.masked,), sums.samples, dtype=torch.int64)
        holders = torch.cat([sums.holders, unmasked]) + absent * mask
        return torch.where(holders > 0, total / holders.clamp_min(1), 0.0), holders > 0

    def gathered(self, updates: list[Update], layout: Layout, own: Slopes) -> tuple[Tensor, Tensor]:
        """As `mean`, of all updates at once, where the method `gathers` them; `own`: what its samples say."""
        raise NotImplementedError(f"{type(self).__name__} needs sums only")

    def step(self, before: Tensor, mean: Tensor, held: Tensor, moments: dict[str, Tensor]) -> Tensor:
        """The new values, where `held`; may write to `moments`."""
        return mean if self.rate == 1 else before + self.rate * (mean - before)


class FedAvgM(FedAvg):
    """Momentum on the server: Hsu, Qi & Brown (arXiv 1909.06335).

    Args:
        rate: of the server.
        momentum: what part of the last step goes on, in [0, 1).
        residual: as in `FedAvg`.
    """

    def __init__(self, rate: float = 1.0, momentum: float = 0.9, residual: bool = False) -> None:
        super().__init__(rate, residual)
        if not 0 <= momentum < 1:
            raise InputError(f"momentum must lie in [0, 1), got {momentum}")
        self.momentum = momentum

    def step(self, before: Tensor, mean: Tensor, held: Tensor, moments: dict[str, Tensor]) -> Tensor:
        change = torch.where(held, mean - before, 0.0)
        moments["momentum"] = self.momentum * moments.get("momentum", torch.zeros_like(before)) + change
        return before + self.rate * moments["momentum"]


class FedAdam(FedAvg):
    """Adam on the server: Reddi et al., "Adaptive federated optimization" (ICLR 2021, arXiv 2003.00295).

    Moments move only where a client keeps the weight: elsewhere a second moment near zero would blow the next step up.

    Args:
        rate: of the server.
        betas: of the two moments.
        tau: the degree of adaptivity, added to the root of the second moment.
        residual: as in `FedAvg`.
    """

    def __init__(
        self, rate: float = 0.1, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3, residual: bool = False
    ) -> None:
        super().__init__(rate, residual)
        if tau <= 0 or not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"expected {tau=} above 0 and {betas=} in [0, 1)")
        self.betas, self.tau = betas, tau

    def step(self, before: Tensor, mean: Tensor, held: Tensor, moments: dict[str, Tensor]) -> Tensor:
        change = mean - before
        for name, beta, value in zip(("first", "second"), self.betas, (change, change.square()), strict=True):
            last = moments.get(name, torch.full_like(before, 0.0 if name == "first" else self.tau**2))
            moments[name] = torch.where(held, beta * last + (1 - beta) * value, last)
        return before + self.rate * moments["first"] / (moments["second"].sqrt() + self.tau)


class SCAFFOLD(FedAvg):
    """Control variates against the drift of clients: Karimireddy et al. (ICML 2020, arXiv 1910.06378), option II.

    Clients add the difference of the server's and their own control to their gradients, and send how theirs has
    changed: twice the bytes. Controls of pruned weights rest; a client that trains meanwhile forgets its own, and the
    server its part in the mean. Their optimizer has to be plain SGD.
    """

    controls = True


class FedMedian(FedAvg):
    """The median of the clients that keep a weight: Yin et al. (ICML 2018, arXiv 1803.01498).

    Unweighted; of an even number of clients the mean of the middle two. Needs all updates of a round at once.
    """

    gathers = True

    def __init__(self, rate: float = 1.0) -> None:
        super().__init__(rate)

    def gathered(self, updates: list[Update], layout: Layout, own: Slopes) -> tuple[Tensor, Tensor]:
        values, kept = _stacked(updates, layout)
        ordered = values.masked_fill(~kept, torch.inf).sort(0).values
        count = kept.sum(0)
        low, high = (count - 1).clamp_min(0) // 2, count // 2
        middle = (ordered.gather(0, low[None]) + ordered.gather(0, high[None]))[0] / 2
        return torch.where(count > 0, middle, 0.0), count > 0


class FedTrimmedMean(FedAvg):
    """The mean of the clients that keep a weight without the largest and the smallest: arXiv 1803.01498.

    Unweighted. Needs all updates of a round at once.

    Args:
        trimmed: what part of the values to leave out at each end, in [0, 0.5), in whole values: of 0.1 none where fewer
            than ten clients keep a weight.
        rate: as in `FedAvg`.
    """

    gathers = True

    def __init__(self, trimmed: float = 0.1, rate: float = 1.0) -> None:
        super().__init__(rate)
        if not 0 <= trimmed < 0.5:
            raise InputError(f"trimmed is a part at each end and must lie in [0, 0.5), got {trimmed}")
        self.trimmed = trimmed

    def gathered(self, updates: list[Update], layout: Layout, own: Slopes) -> tuple[Tensor, Tensor]:
        values, kept = _stacked(updates, layout)
        order = values.masked_fill(~kept, torch.inf).argsort(0).argsort(0)
        count = kept.sum(0)
        cut = (count * self.trimmed).floor().long()
        taken = kept & (order >= cut) & (order < count - cut)
        total = torch.where(taken, values, 0.0).sum(0)
        return total / taken.sum(0).clamp_min(1), count > 0


class FedLAW(FedAvg):
    """Learnable aggregation weights: Li et al., "Revisiting weighted aggregation" (ICML 2023, arXiv 2302.10911).

    The global model is gamma times the mean of the clients' models, weighted by a softmax; both are trained by Adam on
    samples that the server keeps for itself, from the clients' numbers of samples and a gamma of 1. A gamma below 1
    shrinks the weights. Buffers are averaged without it. Needs all updates of a round at once.

    Args:
        share: the part of the training samples that is the server's, in (0, 1); no client has them.
        epochs: over these in each round.
        learning: Adam's rate.
    """

    gathers = True

    def __init__(self, share: float = 0.02, epochs: int = 20, learning: float = 0.01) -> None:
        super().__init__()
        if not 0 < share < 1 or epochs < 1 or learning <= 0:
            raise InputError(f"expected {share=} in (0, 1), {epochs=} of at least 1 and {learning=} above 0")
        self.share, self.epochs, self.learning = share, epochs, learning

    def gathered(self, updates: list[Update], layout: Layout, own: Slopes) -> tuple[Tensor, Tensor]:
        values, kept = _stacked(updates, layout)
        sizes = torch.tensor([float(update.samples) for update in updates], dtype=torch.float64)
        logits, log_gamma = sizes.log().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([logits, log_gamma], self.learning, betas=(0.5, 0.999))
        for _ in range(self.epochs):
            for slope in own(lambda: _weighted(values, kept, logits, log_gamma, layout).detach()):
                adam.zero_grad()
                with torch.enable_grad():
                    # The slope of the loss along the mean is all that its two parameters need of the model.
                    (_weighted(values, kept, logits, log_gamma, layout) @ slope.double()).backward()  # type: ignore[no-untyped-call]
                adam.step()
        return _weighted(values, kept, logits, log_gamma, layout).detach(), kept.any(0)


def _weighted(values: Tensor, kept: Tensor, logits: Tensor, log_gamma: Tensor, layout: Layout) -> Tensor:
    """Of each weight the mean over those that keep it."""
    shares = logits.softmax(0)
    mean = (shares @ values) / (shares @ kept.double()).clamp_min(1e-30)
    return torch.where(layout.learned, log_gamma.exp() * mean, mean)


def server_step(
    state: State, sums: Sums, server: FedAvg, layout: Layout, samples: int, updates: list[Update] | None = None,
    own: Slopes = no_samples,
) -> State:  # fmt: skip
    """The state after a round: the clients' average, pruned to the counts that each layer had.

    `samples` are those of all clients; `updates` all of the round's where the server `gathers` them, and `own` the
    slopes of the loss over its own samples, at the values that it asks for before each batch. The weights that stay are
    the largest of all that some client keeps. Without any update the state stays as it is.
    """
    after = State(state.values, state.mask)
    vars(after).update({**vars(state), "round": state.round + 1, "moments": dict(state.moments)})
    if sums.clients == 0:
        return after
    if server.gathers:
        mean, held = server.gathered(updates or [], layout, own)
    else:
        mean, held = server.mean(state, sums, layout, samples)
    # A variance or a counter is no direction to go on in: buffers are averaged, whatever the server's optimizer.
    stepped = torch.where(layout.learned, server.step(state.values, mean, held, after.moments), mean)
    values = torch.where(held, stepped, 0.0)
    after.mask = _pruned(values, held, state.mask, layout)
    values[: layout.masked][~after.mask] = 0.0
    for moment in after.moments.values():
        moment[: layout.masked][~after.mask] = 0.0
    after.values = layout.join(layout.split(values))  # as the model's dtypes hold it
    after.directions = (after.values - state.values)[: layout.masked].sign().to(torch.int8)
    return after


def _pruned(values: Tensor, held: Tensor, before: Tensor, layout: Layout) -> Tensor:
    """The masks of the union, of which each layer keeps as many as it had."""
    union, masks = layout.masks(held[: layout.masked]), layout.masks(before)
    sizes = layout.masks(values[: layout.masked].abs())
    found = {}
    for name, any_keeps in union.items():
        count = int(masks[name].count_nonzero())
        scores = sizes[name].masked_fill(~any_keeps, -torch.inf)
        found[name] = any_keeps if int(any_keeps.count_nonzero()) <= count else largest(scores, count)
    return layout.mask(found)


def _stacked(updates: list[Update], layout: Layout) -> tuple[Tensor, Tensor]:
    """All values, and which count: float64 and bool of [clients, size]."""
    everywhere = torch.ones(layout.size - layout.masked, dtype=torch.bool)
    kept = torch.stack([torch.cat([update.mask, everywhere]) for update in updates])
    return torch.stack([update.values.double() for update in updates]), kept
