"""What the user orders ahead: predictions by what their correlations are made for, and the authority's answers."""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from protocols.dealing.pool import CorrelationPool
from protocols.errors import InputError, IntegrityError
from protocols.net.link import Link
from securemtk.serving.messages import Drop, Granted, Predict, Prepare, Use


@dataclass(frozen=True)
class PredictionKind:
    """What correlations are made for.

    Args:
        model: by number.
        batch: samples.
        open_tasks: names of the tasks that the authority's keys open.
    """

    model: int
    batch: int
    open_tasks: tuple[str, ...]


@dataclass(frozen=True)
class PreparedPrediction:
    """A prediction's number, and what it was ordered for."""

    prediction: int
    kind: PredictionKind


def kinds_of(model: int, batch: int, size: int, open_tasks: Sequence[str]) -> list[PredictionKind]:
    """Return what a batch orders that runs in chunks of `size` samples."""
    return [PredictionKind(model, min(size, batch - begin), tuple(open_tasks)) for begin in range(0, batch, size)]


def prepare_of(order: PreparedPrediction, *, use: bool = False) -> Prepare:
    """Return what is said to the authority to have a prediction dealt."""
    kind = order.kind
    return Prepare(order.prediction, kind.model, kind.batch, kind.open_tasks, use)


def predict_of(order: PreparedPrediction) -> Predict:
    """Return what is said to the keeper to have a prediction computed."""
    return Predict(order.prediction, order.kind.model, order.kind.batch)


class Orders:
    """Predictions that the authority was asked to deal, in the order in which they will be used.

    Args:
        keeper, authority: links to the other roles; used between other requests on them.
        pool: where our prediction shares arrive.
    """

    def __init__(self, keeper: Link, authority: Link, pool: CorrelationPool) -> None:
        self._keeper, self._authority, self._pool = keeper, authority, pool
        # Models of which the authority must allow each prediction when it is made.
        self.needs_grant: set[int] = set()
        self.ahead: deque[PreparedPrediction] = deque()
        self._unanswered: deque[PreparedPrediction] = deque()
        self._refused: dict[int, InputError] = {}
        self._numbers = itertools.count()

    def order(self, kinds: Sequence[PredictionKind], *, use: bool = False) -> None:
        """Have the authority deal predictions, to use at once or later; its answers come later."""
        for kind in kinds:
            order = PreparedPrediction(next(self._numbers), kind)
            self._authority.say(prepare_of(order, use=use and kind.model in self.needs_grant))
            self.ahead.append(order)
            self._unanswered.append(order)

    def take(self, kind: PredictionKind) -> tuple[PreparedPrediction, bool]:
        """Return the next order, which is of `kind`, and whether it was made ahead; what else waits is thrown away."""
        is_ahead = bool(self.ahead) and self.ahead[0].kind == kind
        if not is_ahead:
            self.drop_all()
            self.order([kind], use=True)
        return self.ahead.popleft(), is_ahead

    def confirm(self, order: PreparedPrediction, *, is_ahead: bool) -> None:
        """Return once the authority has agreed to an order, and under grants to its use now.

        Raises:
            InputError: what the authority refuses it for.
        """
        self.take_answers(order)
        if is_ahead and order.kind.model in self.needs_grant:
            self.ask_use(order)

    def ask_use(self, order: PreparedPrediction) -> None:
        """Have the authority allow a prediction that it dealt ahead; throw its shares away where it does not."""
        self.take_answers(None)
        self._authority.say(Use(order.prediction))
        try:
            self._hear_granted(order)
        except InputError:
            self._drop(order)
            raise

    def take_answers(self, order: PreparedPrediction | None) -> None:
        """Take the authority's answers up to that on an order, all for None; raise the refusal of this order."""
        while self._unanswered and (order is None or order in self._unanswered):
            answered = self._unanswered.popleft()
            try:
                self._hear_granted(answered)
            except InputError as error:
                self._refused[answered.prediction] = error
        if order is not None:
            refusal = self._refused.get(order.prediction)
            # Nobody wants the ones before any more.
            self._refused = {number: e for number, e in self._refused.items() if number > order.prediction}
            if refusal is not None:
                raise refusal

    def drop_all(self) -> None:
        """Throw away what was ordered ahead."""
        while self.ahead:
            self._drop(self.ahead.popleft())

    def _drop(self, order: PreparedPrediction) -> None:
        self._keeper.say(Drop(order.prediction))
        self._pool.drop(order.prediction)

    def _hear_granted(self, order: PreparedPrediction) -> None:
        granted = self._authority.hear(Granted).message.prediction
        if granted != order.prediction:
            raise IntegrityError(f"the authority must answer on prediction {order.prediction}; it did on {granted}")
