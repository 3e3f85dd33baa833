"""The four agents: what each holds, found by walking all that can be reached from it."""

import gc
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from protocols.errors import KeyRefused
from securemtk.data import DataSet, load
from securemtk.mtk.keys.file_stores import FileGrants, HeldKeys
from securemtk.mtk.keys.grants import KeyRequest, Ledger
from securemtk.mtk.keys.key import TriggerKey, draw_keys
from securemtk.mtk.training.agents import DataDistributor, KeyDistributor, ModelKeeper
from securemtk.mtk.training.assembler import Assembler, AssemblerConfig
from securemtk.mtk.training.model import MultiTaskModel
from securemtk.mtk.training.train import TrainConfig, train

SECURED = ("digit", "parity")
AGENTS = (DataDistributor, KeyDistributor, Assembler, ModelKeeper)
# What an agent may hold of keys, data and weights.
MAY = {DataDistributor: {"data"}, KeyDistributor: {"keys"}, Assembler: {"keys"}, ModelKeeper: {"weights"}}


@pytest.fixture(scope="module")
def digits() -> DataSet:
    whole = load("digits")
    few = {name: y[:64] for name, y in whole.y_train.items()}
    return replace(whole, x_train=whole.x_train[:64], y_train=few)


def referents(thing) -> list:
    """Return what an object refers to; of a function what is bound in it, not the module that it stands in."""
    if isinstance(thing, types.ModuleType | type | str | bytes | int | float):
        return []
    if isinstance(thing, types.FunctionType):
        return [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
    if isinstance(thing, Tensor):
        # What it was computed from and its gradient are not among its referents.
        return [*gc.get_referents(thing), thing.grad_fn, *([thing.grad] if thing.is_leaf else [])]
    if isinstance(thing, torch.autograd.graph.Node):
        return [*(node for node, _ in thing.next_functions), getattr(thing, "variable", None)]
    return gc.get_referents(thing)


def reachable(root) -> list:
    """Return all objects that can be reached from one."""
    seen, waiting = {id(root): root}, [root]
    while waiting:
        for thing in referents(waiting.pop()):
            if id(thing) not in seen:
                seen[id(thing)] = thing
                waiting.append(thing)
    return list(seen.values())


def holdings(root, dataset: DataSet, keys: dict[str, TriggerKey]) -> set[str]:
    """Tell which of keys, data and weights can be reached from an object, by value and by type."""
    patterns = [key.pattern[:, key.mask[0]].tobytes() for key in keys.values()]
    samples = {x.tobytes() for x in dataset.x_train}
    size = dataset.x_train[0].size
    found = set()
    for thing in reachable(root):
        if isinstance(thing, TriggerKey):
            found.add("keys")
        if isinstance(thing, DataSet):
            found.add("data")
        if isinstance(thing, nn.Module | nn.Parameter | torch.optim.Optimizer):
            found.add("weights")
        if not isinstance(thing, Tensor | np.ndarray):
            continue
        array = thing.detach().cpu().numpy() if isinstance(thing, Tensor) else thing
        if array.dtype == np.float32 and any(pattern in array.tobytes() for pattern in patterns):
            found.add("keys")
        if array.dtype == np.float32 and array.size and array.size % size == 0:
            found |= {"data"} if samples & {row.tobytes() for row in array.reshape(-1, size)} else set()
        labels = [y.astype(np.int64) for y in dataset.y_train.values()]
        columns = array.reshape(len(array), -1).T if array.ndim and array.dtype == np.int64 else []
        if any(np.array_equal(column, y) for column in columns for y in labels):
            found.add("data")
    return found


def test_the_search_finds_what_is_hidden_in_closures_methods_and_copies(digits):
    keys = draw_keys(SECURED, digits.shape)
    model = MultiTaskModel(digits.tasks, digits.shape)

    class Holder:
        def method(self):
            return self.inside

    holder = Holder()
    holder.inside = {"deep": [torch.tensor(digits.x_train[3:4])]}
    values = torch.tensor(keys["digit"].pattern[keys["digit"].mask])
    for hidden, what in (
        (holder.method, "data"),
        ([torch.tensor(digits.y_train["digit"])], "data"),
        (lambda: keys, "keys"),
        (lambda x=values: x, "keys"),
        ({"a": (model(torch.tensor(digits.x_train[:2]))[0],)}, "weights"),
        (torch.optim.SGD(model.parameters(), 0.1), "weights"),
    ):
        assert what in holdings(hidden, digits, keys)
    assert holdings([1, "text", np.zeros((2, *digits.shape), np.float32)], digits, keys) == set()


def test_no_agent_of_a_training_holds_keys_data_or_weights_that_are_not_its_own(digits):
    keys = draw_keys(SECURED, digits.shape)
    tasks = tuple(replace(task, secured=task.name in SECURED) for task in digits.tasks)
    data = DataDistributor(digits, tasks)
    distributor = KeyDistributor(HeldKeys(keys.values()))
    assembler = Assembler(tasks, distributor.for_training(), AssemblerConfig())
    model = MultiTaskModel(tasks, digits.shape)
    optimizer = torch.optim.AdamW(model.parameters())
    keeper = ModelKeeper(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    generator = torch.Generator().manual_seed(0)

    def loss_of(scores, batch):
        pairs = zip(scores, batch.targets, strict=True)
        return sum(nn.functional.cross_entropy(s, t) for s, t in pairs)

    losses = [float(keeper.learn(assembler.batch(*data.rows(torch.arange(32)), generator), loss_of)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert [s.shape for s in keeper.answer(data.rows(torch.arange(3))[0])] == [(3, task.classes) for task in tasks]
    agents = (data, distributor, assembler, keeper)
    for agent in agents:
        assert holdings(agent, digits, keys) == MAY[type(agent)], type(agent).__name__
    assert holdings(agents, digits, keys) == {"keys", "data", "weights"}


def test_train_is_made_of_agents_none_of_which_holds_more_than_its_own(digits):
    keys = draw_keys(SECURED, digits.shape)
    found = []
    gc.collect()

    def look(what, share):
        # What lives now, in the middle of a training.
        for thing in gc.get_objects():
            if type(thing) in AGENTS:
                found.append((type(thing), holdings(thing, digits, keys)))

    train(digits, SECURED, TrainConfig(epochs=1, batch=32, augment=False), keys=keys, progress=look)
    assert {kind for kind, _ in found} == {DataDistributor, Assembler, ModelKeeper}
    for kind, held in found:
        assert held == MAY[kind], kind.__name__


def test_the_interfaces_let_no_agent_ask_another_for_what_is_not_its_own():
    """Nothing public but what the roles need: samples leave as batches, keys to the assembler and the dealer."""
    public = {kind: {name for name in vars(kind) if not name.startswith("_")} for kind in AGENTS}
    assert public[DataDistributor] == {"rows"}
    assert public[KeyDistributor] == {"draw", "needs_grant", "for_training", "find", "permit"}
    assert public[ModelKeeper] == {"learn", "answer"}


def test_a_key_distributor_gives_keys_of_the_model_that_is_asked_and_only_under_its_grants(tmp_path):
    keys = draw_keys(SECURED, (1, 16, 16))
    model_id = keys["digit"].model_id
    ledger = Ledger(tmp_path / "grants.json")
    ledger.grant("ann", model_id, "digit")
    distributor = KeyDistributor(HeldKeys(keys.values()), FileGrants(ledger))
    asked = KeyRequest("ann", model_id, ("digit",), 1, 0)
    assert distributor.find(asked) == [keys["digit"]]
    distributor.permit(asked, use=True)
    for batch in (0, -5, 1.5, True):
        with pytest.raises(KeyRefused, match="whole number of samples"):
            distributor.permit(replace(asked, batch=batch), use=True)
    with pytest.raises(KeyRefused, match="only others"):
        distributor.permit(replace(asked, user="bob"), use=True)
    with pytest.raises(KeyRefused, match="of another one"):
        distributor.find(replace(asked, model_id="0" * 32))
    with pytest.raises(KeyRefused, match="it holds none"):
        distributor.find(replace(asked, tasks=("large",)))
    free = KeyDistributor(HeldKeys(keys.values()))
    assert (distributor.needs_grant, free.needs_grant) == (True, False)
    free.permit(replace(asked, user=None), use=True)
    assert sorted(free.for_training()) == sorted(SECURED)


def test_a_key_distributor_makes_keys_from_shape_and_range_alone():
    made = KeyDistributor.draw(SECURED, (1, 16, 16), low=-1.0, high=1.0).for_training()
    assert list(made) == list(SECURED)
    assert min(key.pattern.min() for key in made.values()) < 0
    assert KeyDistributor.draw((), (1, 16, 16), low=0.0, high=1.0).for_training() == {}
