"""ExpertPlan: how many experts each layer has, which rank holds them, and what they were copied from."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import UserError
from common.files import content_key, read_json, write_json
from pipeline.distributed.parallel_dims import ParallelDims


@dataclass(frozen=True)
class LayerPlacement:
    """Where one layer's new experts are.

    Attributes:
        dims: how ranks are divided for this layer.
        experts: for each rank of an expert-parallel group of the layer, the numbers of its experts. They begin at 1;
            expert 0, the original MLP, is on every rank.
    """

    dims: ParallelDims
    experts: list[list[int]]

    @property
    def local(self) -> list[int]:
        """The numbers of this rank's experts."""
        return self.experts[self.dims.ep_rank]


class Round(BaseModel):
    """One expansion of the model: round 0 is the dense model, round 1 the first group of new languages.

    Attributes:
        languages: those that the round added.
        num_new: for each layer, how many experts it added; they are numbered after those of earlier rounds.
        source: what they were copied from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    languages: tuple[str, ...]
    num_new: tuple[Annotated[int, Field(ge=0)], ...]
    source: Literal["mlp", "expert 0", "most used expert"]


class ExpertPlan(BaseModel):
    """The shape of the expanded model: made by the allocation, read by all that comes after.

    Attributes:
        counts: N_l of each layer: all of its experts, the original MLP (expert 0) included. A layer of one expert is
            dense: it has no router.
        top_k: K, experts per token.
        classifier_layers: layers with a routing classifier.
        classifier: what they classify: each token, or whole sequences.
        rounds: the expansions, the dense model first.
        similarity: S_l of each layer, if it was measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    counts: tuple[int, ...]
    top_k: int
    classifier_layers: tuple[int, ...] = ()
    classifier: Literal["token", "sequence"] = "token"
    rounds: tuple[Round, ...]
    similarity: tuple[float, ...] | None = None

    def model_post_init(self, _context: object) -> None:
        """Check that the fields fit each other.

        Raises:
            UserError: names the layer and the number that do not fit.
        """
        for layer, count in enumerate(self.counts):
            if count < 1:
                raise UserError(
                    f"expert plan: layer {layer} has {count} experts; it has at least its original MLP: allocate again"
                )
            if 1 < count < self.top_k:
                raise UserError(
                    f"experts.top_k: {self.top_k} is more than the {count} experts of layer {layer}; "
                    f"lower top_k, or give the layer {self.top_k} experts or one"
                )
            total = sum(r.num_new[layer] for r in self.rounds if layer < len(r.num_new))
            if total != count:
                raise UserError(
                    f"expert plan: layer {layer} has {count} experts, but its rounds add up to {total}; allocate again"
                )
        if any(len(r.num_new) != len(self.counts) for r in self.rounds):
            raise UserError(f"expert plan: a round does not list {len(self.counts)} layers; allocate again")
        check_layers(self.classifier_layers, len(self.counts))
        for layer in self.classifier_layers:
            if self.counts[layer] < 2:
                raise UserError(f"experts.classifier_layers: layer {layer} is dense, it has no router; leave it out")

    @classmethod
    def dense(cls, num_layers: int, *, old: list[str], new: list[str]) -> "ExpertPlan":
        """The plan of a model that stays dense: each layer has its original MLP alone.

        Args:
            num_layers: of the model.
            old: languages that it knows.
            new: languages that it is taught.
        """
        known = Round(languages=tuple(old), num_new=(1,) * num_layers, source="mlp")
        taught = Round(languages=tuple(new), num_new=(0,) * num_layers, source="expert 0")
        return cls(counts=(1,) * num_layers, top_k=1, rounds=(known, taught))

    @classmethod
    def first_expansion(
        cls,
        counts: list[int],
        *,
        old: list[str],
        new: list[str],
        top_k: int,
        classifier_layers: list[int],
        similarity: list[float] | None = None,
        classifier: Literal["token", "sequence"] = "token",
    ) -> "ExpertPlan":
        """The plan of a dense model's first expansion.

        Args:
            counts: N_l of each layer.
            old: languages that the dense model knows.
            new: languages that are added.
            top_k: K.
            classifier_layers: layers with a routing classifier.
            similarity: S_l of each layer, if it was measured.
            classifier: what classifiers classify.

        Raises:
            UserError: no layer gets an expert.
        """
        if sum(counts) <= len(counts):
            raise UserError("expert plan: no layer has a new expert; raise experts.num_new")
        rounds = (
            Round(languages=tuple(old), num_new=(1,) * len(counts), source="mlp"),
            Round(languages=tuple(new), num_new=tuple(max(0, count - 1) for count in counts), source="expert 0"),
        )
        return cls(
            counts=tuple(counts),
            top_k=top_k,
            classifier_layers=tuple(sorted(classifier_layers)),
            classifier=classifier,
            rounds=rounds,
            similarity=None if similarity is None else tuple(similarity),
        )

    def expand(
        self,
        num_new: list[int],
        *,
        languages: list[str],
        classifier_layers: list[int],
        similarity: list[float] | None = None,
        classifier: Literal["token", "sequence"] = "token",
        source: Literal["expert 0", "most used expert"] = "expert 0",
    ) -> "ExpertPlan":
        """The plan of a further expansion of the model that this plan describes.

        Args:
            num_new: for each layer, how many experts it adds.
            languages: that are added.
            classifier_layers: layers with a routing classifier from now on.
            similarity: S_l of each layer, if it was measured.
            classifier: what classifiers classify.
            source: what new experts begin as copies of.

        Raises:
            UserError: the number of layers differs, or no layer gets an expert.
        """
        if len(num_new) != self.num_layers:
            raise UserError(
                f"expert plan: {len(num_new)} layers are expanded, but the model has {self.num_layers}; allocate again"
            )
        if sum(num_new) < 1:
            raise UserError("expert plan: no layer gets a new expert; raise experts.num_new")
        added = Round(languages=tuple(languages), num_new=tuple(num_new), source=source)
        return ExpertPlan(
            counts=tuple(count + num for count, num in zip(self.counts, num_new, strict=True)),
            top_k=self.top_k,
            classifier_layers=tuple(sorted(classifier_layers)),
            classifier=classifier,
            rounds=(*self.rounds, added),
            similarity=None if similarity is None else tuple(similarity),
        )

    @property
    def num_layers(self) -> int:
        """Layers of the model, dense ones included."""
        return len(self.counts)

    @property
    def num_new(self) -> tuple[int, ...]:
        """For each layer, its experts besides the original MLP."""
        return tuple(count - 1 for count in self.counts)

    @property
    def num_groups(self) -> int:
        """Groups of languages: those of the dense model, and one per expansion. The last are the new languages."""
        return len(self.rounds)

    def old_experts(self, layer: int) -> tuple[int, ...]:
        """For each old group, how many of a layer's experts existed after its round, A(g); they come first."""
        return tuple(accumulate(r.num_new[layer] for r in self.rounds[:-1]))

    def num_frozen(self, layer: int) -> int:
        """How many of a layer's experts besides the original MLP are of earlier expansions; they do not train."""
        return self.old_experts(layer)[-1] - 1

    def group_of(self, language: str) -> int:
        """The group of an old language: the expansion that added it, or 0, the dense model's."""
        number = self.round_of(language)
        return 0 if number is None or number == len(self.rounds) - 1 else number

    def round_of(self, language: str) -> int | None:
        """The expansion that added a language, 0 for the dense model's; None if none did."""
        return next((number for number, one in enumerate(self.rounds) if language in one.languages), None)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with a router; in names of checkpoint files only these count."""
        return tuple(layer for layer, count in enumerate(self.counts) if count > 1)

    @property
    def trained_moe_layers(self) -> tuple[int, ...]:
        """Which of :attr:`moe_layers`, by their place there, got experts in the last expansion: those train."""
        return tuple(i for i, layer in enumerate(self.moe_layers) if self.rounds[-1].num_new[layer])

    @property
    def key(self) -> str:
        """A content key: plans are equal if their keys are. The similarities are left out."""
        as_before = {"classifier"} if self.classifier == "token" else set()  # plans of before it have the same key
        return content_key(self.model_dump(mode="json", exclude={"similarity"} | as_before))

    @property
    def experts_key(self) -> str:
        """A content key of what stage 1 depends on: classifiers, which come with stage 2, are left out."""
        return content_key(self.model_dump(mode="json", exclude={"similarity", "classifier_layers", "classifier"}))

    def placement(self, dims: ParallelDims) -> dict[int, LayerPlacement]:
        """Which ranks hold which new experts.

        Each layer's experts are divided as evenly as possible over the groups of :meth:`ParallelDims.of_layer`. Those
        left over go to the ranks that hold the fewest so far. Where earlier expansions' experts are frozen, those that
        train are dealt out first, so that they are spread evenly too.

        Args:
            dims: how ranks are divided.

        Returns:
            For each MoE layer, where its experts are.
        """
        held, training = [0] * dims.ep_size, [0] * dims.ep_size
        result: dict[int, LayerPlacement] = {}
        for layer in self.moe_layers:
            divided = dims.of_layer(self.num_new[layer])
            places = range(divided.ep_size)
            most = [max(held[place :: divided.ep_size]) for place in places]
            each, odd = divmod(self.num_new[layer], divided.ep_size)
            favoured = sorted(places, key=lambda place: (most[place], place))[:odd]  # noqa: B023
            room = [each + (place in favoured) for place in places]
            trained = [max(training[place :: divided.ep_size]) for place in places]
            frozen = self.num_frozen(layer)
            experts = _deal(frozen, self.num_new[layer], room, trained)
            for rank in range(dims.ep_size):
                mine = experts[rank % divided.ep_size]
                held[rank] += len(mine)
                training[rank] += sum(number > frozen for number in mine)
            result[layer] = LayerPlacement(divided, experts)
        return result

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> "ExpertPlan":
        """Read a plan.

        Raises:
            UserError: the file is damaged or not a plan.
        """
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise UserError(f"{path}: {where}: {problem['msg']}; allocate again") from error


def _deal(frozen: int, total: int, room: list[int], trained: list[int]) -> list[list[int]]:
    """Experts 1 to ``total`` in places with room for so many each; those after ``frozen`` go to where fewest train.

    Args:
        frozen: experts of earlier expansions.
        total: of the layer, without expert 0.
        room: of each place; its sum is ``total``.
        trained: how many experts train in each place so far, in other layers.
    """
    if not frozen:
        numbers = iter(range(1, total + 1))
        return [[next(numbers) for _ in range(size)] for size in room]
    experts: list[list[int]] = [[] for _ in room]
    new = [0] * len(room)
    for number in range(frozen + 1, total + 1):
        free = [place for place, size in enumerate(room) if len(experts[place]) < size]
        place = min(free, key=lambda place: (new[place], trained[place], place))
        experts[place].append(number)
        new[place] += 1
    old = iter(range(1, frozen + 1))
    for place, size in enumerate(room):
        experts[place][:0] = [next(old) for _ in range(size - len(experts[place]))]
    return experts


def check_layers(classifier_layers: Iterable[int], num_layers: int) -> None:
    """Check that a model has the layers that are to get a classifier.

    Raises:
        UserError: it has no such layer.
    """
    for layer in classifier_layers:
        if not 0 <= layer < num_layers:
            raise UserError(
                f"experts.classifier_layers: {layer} is not a layer of this model; "
                f"give numbers from 0 to {num_layers - 1}"
            )
