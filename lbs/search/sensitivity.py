"""What the loss is where one choice alone is lower, for every choice: each pass begins at the layer it belongs to.

What stands before that layer is as it is with all choices open, so it is computed once: one walk along the graph with
everything open, from which passes part. Values that nothing behind reads are let go, so a walk and one pass at a time
are all that is held. A model that cannot be traced takes whole passes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol

from torch import Tensor, fx, nn

from lbs.graph import trace
from lbs.search.ledger import Choice
from lbs.traced import Evaluation, evaluating
from lbs_kernels.errors import GraphError


class Tried(Protocol):
    """Choices, and what makes a model compute at their levels: a ledger, say."""

    choices: list[Choice]

    def apply(self) -> None:
        """Make the model follow the present levels."""


Loss = Callable[[Any, Any], Tensor]  # of what the model returns and what a batch says it should
Batches = Sequence[tuple[Tensor, Any]]


def losses(
    model: nn.Module, ledger: Tried, batches: Batches, loss: Loss, without: Container[Choice] = ()
) -> tuple[float, dict[Choice, list[float]]]:
    """(mean loss, all choices at the levels they have; by choice those at every level below, lowest first).

    Arguments:
        model: of the ledger, whose choices are at their top and applied; they are again afterwards. batches: (images,
            whatever `loss` compares outputs with). without: choices that are left at their top.
    """
    total = sum(len(images) for images, _ in batches)
    found = {choice: [0.0] * choice.top for choice in ledger.choices if choice not in without}
    try:
        walk: _Walk | _Whole = _Walk(trace(model, batches[0][0][:2]).module, ledger, list(found))
    except GraphError:
        walk = _Whole(model, ledger)
    open_loss = 0.0
    with evaluating(model):
        for images, labels in batches:
            share = len(images) / total

            def weighed(outputs: Any, labels: Any = labels, share: float = share) -> float:
                return float(loss(outputs, labels)) * share

            open_loss += walk.along(images, weighed, found)
    return open_loss, found


def _tried(ledger: Tried, choice: Choice, found: list[float], run: Callable[[], float]) -> None:
    """Adds to `found` what `run` gives with the choice at each level below its top, where it is again afterwards."""
    for level in reversed(range(choice.top)):
        choice.level = level
        ledger.apply()
        found[level] += run()
    choice.level = choice.top
    ledger.apply()


class _Whole:
    """Passes from the images to the outputs."""

    def __init__(self, model: nn.Module, ledger: Tried) -> None:
        self.model, self.ledger = model, ledger

    def along(self, images: Tensor, loss: Callable[[Any], float], found: dict[Choice, list[float]]) -> float:
        for choice, losses in found.items():
            _tried(self.ledger, choice, losses, lambda: loss(self.model(images)))
        return loss(self.model(images))


class _Walk(Evaluation):
    """Goes along the nodes of a graph, and from each that a choice belongs to, to the end and back."""

    def __init__(self, module: fx.GraphModule, ledger: Tried, choices: Sequence[Choice]) -> None:
        super().__init__(module)
        self.ledger = ledger
        self.nodes = list(module.graph.nodes)
        first = {str(n.target): n for n in reversed(self.nodes) if n.op == "call_module"}
        self.starting: dict[fx.Node, list[Choice]] = {}
        self.uncalled: list[Choice] = []
        for choice in choices:
            if choice.layer in first:
                self.starting.setdefault(first[choice.layer], []).append(choice)
            else:
                self.uncalled.append(choice)

    def along(self, images: Tensor, loss: Callable[[Any], float], found: dict[Choice, list[float]]) -> float:
        """Adds to `found` what every choice costs on the images; the loss with all of them open."""
        self.args_iter = iter((images,))
        env: dict[fx.Node, Any] = {}
        for index, node in enumerate(self.nodes):
            for choice in self.starting.get(node, ()):
                _tried(self.ledger, choice, found[choice], lambda at=index: loss(self._to_the_end(at, dict(env))))  # type: ignore[misc]
            outputs = self._step(node, env)
        whole = loss(outputs)
        for choice in self.uncalled:
            found[choice] = [value + whole for value in found[choice]]
        return whole

    def _to_the_end(self, index: int, env: dict[fx.Node, Any]) -> Any:
        for node in self.nodes[index:]:
            outputs = self._step(node, env)
        return outputs

    def _step(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """Run one node, and let go of what only it still read."""
        self.env = env
        env[node] = value = self.run_node(node)
        for dead in self.user_to_last_uses.get(node, ()):
            del env[dead]
        return value
