"""Statistics of one layer, gathered in one pass: covariances of inputs, and the reach of keys and values."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowbit_quantize.architectures import Architecture, LinearGroup, linear_of
from lowbit_quantize.precision import exact_products
from lowbit_quantize.targets import Drift

Observers = dict[str, Callable[[Tensor], None]]

SYMMETRIC_BLOCKS, WIDE = (
    6,
    1024,
)  # blocks of a covariance, if it is so wide that they cost less than they save
TOKEN_MULTIPLE = (
    128  # experts see any number of tokens; torch's CPU products compile a kernel for each new shape
)
BORROWED_TOKENS = 2048  # of a block's inputs that are kept for experts that see too few of their own
SAMPLE_STRIDE = 4  # of the tokens whose keys and values are kept


class Covariance:
    """`H`, the mean of x xᵀ over tokens, in float32, for inputs of `features` channels.

    Of a wide one only blocks on and above the diagonal are computed (7/12 of the products for six blocks). It is
    the largest matrix of a run: the mean takes the sum's place.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self._sum = torch.zeros(features, features, device=device)
        self._block = -(-features // SYMMETRIC_BLOCKS) if features >= WIDE else features
        self._finished = False
        self.tokens = 0

    @property
    def features(self) -> int:
        return len(self._sum)

    def add(self, inputs: Tensor) -> None:
        """Add (tokens, features); not after `matrix`."""
        assert not self._finished, "a finished mean takes no more tokens"
        wide = inputs.float()
        if extra := -len(wide) % TOKEN_MULTIPLE:
            wide = torch.cat([wide, wide.new_zeros(extra, wide.shape[1])])
        with exact_products(inputs.dtype):
            for start in range(0, wide.shape[1], self._block):
                stop = start + self._block
                self._sum[start:stop, start:].addmm_(wide[:, start:stop].T, wide[:, start:])
        self.tokens += len(inputs)

    def matrix(self) -> Tensor:
        """The mean of x xᵀ, (features, features); the same tensor each time, not to be changed."""
        if self._finished:
            return self._sum
        self._finished = True
        for start in range(0, self.features, self._block):
            stop = start + self._block
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
            corner = self._sum[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)
        return self._sum.div_(max(1, self.tokens))


class AttendedCovariance(Covariance):
    """A covariance whose tokens count by the attention they receive (attention.py), known after each batch."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self._waiting: Tensor | None = None

    @property
    def waiting(self) -> bool:
        return self._waiting is not None

    def add(self, inputs: Tensor) -> None:
        """Take (tokens, features); they are added when their attention is known, or once each if it never is."""
        self.weigh(None)
        self._waiting = inputs

    def weigh(self, received: Tensor | None) -> None:
        """Add what waits, with the attention that each of its tokens receives, (tokens,), relative to the mean."""
        inputs, self._waiting = self._waiting, None
        if inputs is None:
            return
        if received is not None:
            root = ((1 + received) / 2).sqrt().unsqueeze(1)
            inputs = (inputs.float() * root).to(
                inputs.dtype
            )  # rounded first, so that the products stay exact
        super().add(inputs)

    def matrix(self) -> Tensor:
        """The mean of x xᵀ, (features, features), tokens counted by attention."""
        self.weigh(None)
        return super().matrix()


class LayerStatistics:
    """What one pass over the calibration tokens saw of a decoder layer, for each of some groups of linears.

    An expert's linears are observed on the tokens that the block routes to it. One that sees fewer tokens than its
    linear has inputs borrows the rest from its layer: its covariance shrinks towards the one that it would have
    if every token of the block were its own.
    """

    def __init__(
        self,
        layer: nn.Module,
        architecture: Architecture,
        device: torch.device,
        groups: Sequence[LinearGroup] | None = None,
        paired: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        """Observe `groups`, by default all of the layer.

        `paired` names the first linears of groups whose inputs are observed in the base model too, and what the
        compressed model's inputs of each are divided by, (features,), if by anything.
        """
        self._layer, self._architecture = layer, architecture
        self._covariances: dict[str, Covariance] = {}
        self._drifts: dict[str, Drift] = {}  # by the name of a group's first linear
        self._residuals: dict[str, Drift] = {}  # by the name of the norm that reads the residual stream
        self._block_inputs = Sample(BORROWED_TOKENS)
        self._routes = False
        for group in architecture.groups_of(layer) if groups is None else groups:
            self._routes = self._routes or self._architecture.is_expert(group)
            features = linear_of(layer, group.linears[0]).in_features
            kind = AttendedCovariance if group.attended else Covariance
            for name in dict.fromkeys((self._place(group), *group.beside[:1])):
                self._covariances[name] = kind(features, device)
            if paired and group.linears[0] in paired:
                weights = [linear_of(layer, name).weight for name in group.linears]
                drift = Drift(weights, paired[group.linears[0]], group.attended, bool(group.residual))
                self._drifts[group.linears[0]] = drift
                if group.residual:
                    self._residuals[group.residual] = drift

    @property
    def observers(self) -> Observers:
        """What to call with the input of each observed module of the layer, in the compressed model."""
        observers: Observers = {name: drift.see_residual for name, drift in self._residuals.items()}
        observers.update({name: seen.add for name, seen in self._covariances.items()})
        for name, drift in self._drifts.items():
            observers[name] = both(observers[name], drift.add)
        if self._routes:
            router, sample = self._architecture.router, self._block_inputs.add
            observers[router] = both(observers[router], sample) if router in observers else sample
        elif self.attended:  # the attention is known before this is reached
            observers.setdefault(self._architecture.attention_end, _ignore)
        return observers

    @property
    def ends_before_attention(self) -> bool:
        """Whether nothing is observed beyond what attention is computed from."""
        return self.observers.get(self._architecture.attention_end) is _ignore

    @property
    def routes(self) -> bool:
        """Whether routed experts are observed, which may be called in any order."""
        return self._routes

    @property
    def base_observers(self) -> Observers:
        """What to call with the same modules' inputs in the base model, batch by batch, before `observers`."""
        observers: Observers = {name: drift.expect_residual for name, drift in self._residuals.items()}
        observers.update({name: drift.expect for name, drift in self._drifts.items()})
        return observers

    @property
    def attended(self) -> list[AttendedCovariance | Drift]:
        """The statistics whose tokens count by the attention they receive."""
        drifts = [drift for drift in self._drifts.values() if drift.attended]
        seen = [seen for seen in self._covariances.values() if isinstance(seen, AttendedCovariance)]
        return [*seen, *drifts]

    def target(self, group: LinearGroup, weight: Tensor, covariance: Tensor) -> Tensor:
        """What to round a group's stacked weight, (out, in), towards."""
        drift = self._drifts.get(group.linears[0])
        return weight if drift is None else drift.target(weight, covariance)

    @property
    def starved(self) -> dict[int, int]:
        """Tokens that were seen by each expert that borrows, by its number."""
        prefix = f"{self._architecture.experts}."
        places = {name: seen for name, seen in self._covariances.items() if name.startswith(prefix)}
        return {
            int(name.removeprefix(prefix).partition(".")[0]): seen.tokens
            for name, seen in places.items()
            if seen.tokens < seen.features
        }

    def covariance(self, group: LinearGroup) -> Tensor:
        """H of a group's input, (in, in)."""
        seen = self._covariances[self._place(group)]
        if not self._architecture.is_expert(group) or seen.tokens >= seen.features:
            return seen.matrix()
        own = seen.tokens / seen.features
        return own * seen.matrix() + (1 - own) * self._borrowed(group)

    def joint_covariance(self, groups: Sequence[LinearGroup]) -> Tensor:
        """H of the activation that all these groups read: for experts, every token of the block."""
        if self._architecture.is_expert(groups[0]):
            return self._covariances[self._architecture.router].matrix()
        return self.covariance(groups[0])

    def _borrowed(self, group: LinearGroup) -> Tensor:
        if group.beside:
            return self._covariances[self._architecture.router].matrix()
        expert = self._layer.get_submodule(group.linears[0].rpartition(".")[0])
        seen = Covariance(linear_of(self._layer, group.linears[0]).in_features, self._block_inputs.device)
        with torch.inference_mode():
            seen.add(expert.middle(self._block_inputs.rows()))  # type: ignore[operator]
        return seen.matrix()

    def _place(self, group: LinearGroup) -> str:
        """Whose input is observed for a group: its first linear's, or the router's where that is the same."""
        return (
            group.beside[0] if group.beside and not self._architecture.is_expert(group) else group.linears[0]
        )


class Sample:
    """Up to `size` rows, spread evenly over all that were added."""

    def __init__(self, size: int) -> None:
        self._size, self._rows, self._stride = size, torch.zeros(0, 0), 1

    @property
    def device(self) -> torch.device:
        return self._rows.device

    def add(self, rows: Tensor) -> None:
        kept = rows[:: self._stride]
        self._rows = torch.cat([self._rows, kept]) if len(self._rows) else kept.clone()
        while len(self._rows) > self._size:
            self._rows, self._stride = self._rows[::2].clone(), 2 * self._stride

    def rows(self) -> Tensor:
        return self._rows


def _ignore(_: Tensor) -> None:
    pass


def both(first: Callable[[Tensor], None], second: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def call(inputs: Tensor) -> None:
        first(inputs)
        second(inputs)

    return call


class KeyValueReach:
    """Largest |key| of a layer and largest |value| of each value channel, as handed to the cache; a sample of both."""

    def __init__(self) -> None:
        self.key = torch.zeros(())
        self.value = torch.zeros(())
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A cache seam: keys and values are (batch, kv_heads, tokens, head_dim) and pass unchanged."""
        self.key = torch.maximum(self.key.to(keys.device), keys.abs().amax().float())
        channels = values.abs().amax(dim=(0, 2)).float()  # (kv_heads, head_dim)
        self.value = torch.maximum(self.value.to(values.device), channels.reshape(-1))
        self._keys.append(_sample(keys))
        self._values.append(_sample(values))
        return keys, values

    @property
    def cached(self) -> bool:
        """Whether the layer put anything into the cache; one that shares another's does not."""
        return bool(self._keys)

    @property
    def key_sample(self) -> Tensor:
        """Keys of every `SAMPLE_STRIDE`-th token, (sampled, kv_heads · head_dim)."""
        return torch.cat(self._keys)

    @property
    def value_sample(self) -> Tensor:
        """Values of every `SAMPLE_STRIDE`-th token, (sampled, kv_heads · head_dim)."""
        return torch.cat(self._values)


def _sample(heads: Tensor) -> Tensor:
    return heads[:, :, ::SAMPLE_STRIDE].transpose(1, 2).flatten(2).flatten(0, 1)
