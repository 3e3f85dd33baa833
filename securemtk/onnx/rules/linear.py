"""Rules of products of matrices: with constants, and of activations."""

import math
from collections import Counter

import numpy as np

from securemtk.onnx.building.builder import Draft, Operand
from securemtk.onnx.building.registry import Refused, Step, activation_input, constant_input, fit, output_shape, rule
from securemtk.onnx.model.graph import Array, Graph, Node


def _operand(node: Node, graph: Graph, index: int) -> Operand:
    name = node.input(index)
    if name in graph.activations:
        return activation_input(node, graph, index)
    return constant_input(node, graph, index, f"factor {index}")


def _ranks(node: Node, graph: Graph) -> list[int]:
    """Return how many axes each input has in the model."""
    factors = [_operand(node, graph, i) for i in range(len(node.inputs))]
    return [graph.rank(x) if isinstance(x, str) else np.ndim(x) for x in factors]


@rule("Gemm")
def gemm(node: Node, graph: Graph) -> list[Step]:
    """All attributes, each matrix a constant or an activation; transA and products of activations as a whole only."""
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    # By samples this refuses whatever does not have an activation on the left and a constant on the right.
    shape, draft = output_shape(node, graph), Draft(node, graph)
    a, b = (
        _turned(draft, _operand(node, graph, i)) if node.attrs.get(name, 0) else _operand(node, graph, i)
        for i, name in enumerate(("transA", "transB"))
    )
    if not isinstance(a, str) and not isinstance(b, str):
        raise Refused("one of the two factors must be computed from the input", "write it as Add")
    third = node.input(2)
    bias = None
    if third and third not in graph.activations:
        bias = beta * fit(node, graph, constant_input(node, graph, 2, "the third matrix"), node.outputs[0])
    row = None
    if bias is not None and math.prod(bias.shape[:-1]) == 1 and isinstance(a, str) and not isinstance(b, str):
        row, bias = np.broadcast_to(bias.reshape(-1), shape[-1:]), None
    if isinstance(b, str) and isinstance(a, str):
        value = draft.dot(a, b)
        value = value if alpha == 1.0 else draft.scale(value, alpha)
    elif isinstance(b, str):
        value = _left(draft, alpha * np.asarray(a), b)
    else:
        value = draft.matmul(str(a), alpha * b, row)
    if bias is not None:
        value = draft.affine(value, shift=bias)
    if third in graph.activations:
        value = draft.binary("add", value, _third(node, graph, draft, beta))
    return draft.made(value)


def _third(node: Node, graph: Graph, draft: Draft, beta: float) -> str:
    value = activation_input(node, graph, 2)
    if not graph.whole and graph.rank(value) != 2:
        raise Refused("the third matrix must have one row for each sample", "reshape it")
    lead = (1,) * (2 - graph.rank(value))
    value = draft.reshape(value, (*lead, *draft.shape(value)))
    return value if beta == 1.0 else draft.scale(value, beta)


def _turned(draft: Draft, x: Operand) -> Operand:
    """Swap the last two axes."""
    if not isinstance(x, str):
        return x.swapaxes(-1, -2)
    n = len(draft.shape(x)) + 1
    return draft.transpose(x, (*range(n - 2), n - 1, n - 2))


def _left(draft: Draft, a: Array, x: str) -> str:
    """Multiply by one constant matrix on the left: W x = (x' W')' on the last two axes."""
    product = draft.matmul(str(_turned(draft, x)), a.T)
    return str(_turned(draft, product))


@rule("MatMul")
def matmul(node: Node, graph: Graph) -> list[Step]:
    """A constant and an activation in either order, or two activations, which both have the batch; vectors, matrices \
and stacks of them, which broadcast."""
    shape, draft = output_shape(node, graph), Draft(node, graph)
    a, b = _operand(node, graph, 0), _operand(node, graph, 1)
    if not graph.whole:
        _apart(node, graph)
    x, y = (_as_matrix(draft, z, graph.whole, column=z is b) for z in (a, b))
    return draft.made(draft.reshape(_product(draft, x, y, graph.whole), shape))


def _apart(node: Node, graph: Graph) -> None:
    """Refuse a product that does not keep the batch as the first axis of samples on their own."""
    ranks = _ranks(node, graph)
    shared = [x in graph.activations for x in node.inputs]
    if all(shared) and (ranks[0] != ranks[1] or ranks[0] < 3):
        raise Refused("both activations must have the batch and matrices of their own", "add axes by Unsqueeze")
    if shared[1] and ranks[1] < 3:
        raise Refused("a constant first factor must act on the axes of one sample", "put the activation first")
    if shared[0] and (ranks[0] < 2 or ranks[1] > max(ranks[0], 2)):
        raise Refused("the constant must not add axes to the activation", "reshape it")
    if shared[1] and not shared[0] and ranks[0] > ranks[1]:
        raise Refused("the constant must not add axes to the activation", "reshape it")


def _as_matrix(draft: Draft, x: Operand, whole: bool, *, column: bool) -> Operand:
    """Make a vector a matrix of one row or column."""
    if not isinstance(x, str):
        return x if x.ndim > 1 else (x[:, None] if column else x[None])
    shape = draft.shape(x)
    # By samples one axis is a row of the matrix that the batch makes.
    if len(shape) > 1 or not whole:
        return x
    return draft.reshape(x, (*shape, 1) if column else (1, *shape))


def _product(draft: Draft, a: Operand, b: Operand, whole: bool) -> str:
    """Multiply two operands of matrices; a constant has ONNX's axes."""
    if isinstance(a, str) and isinstance(b, str):
        return draft.dot(*_same_rank(draft, a, b))
    if isinstance(a, str):
        constant = np.asarray(b)
        if math.prod(constant.shape[:-2]) == 1:
            return draft.matmul(a, constant.reshape(constant.shape[-2:]))
        return draft.dot(*_same_rank(draft, a, draft.constant(a, _of_sample(constant, a, draft, whole))))
    constant = np.asarray(a)
    if math.prod(constant.shape[:-2]) == 1:
        return _left(draft, constant.reshape(constant.shape[-2:]), str(b))
    stack = draft.constant(str(b), _of_sample(constant, str(b), draft, whole))
    return draft.dot(*_same_rank(draft, stack, str(b)))


def _of_sample(constant: Array, x: str, draft: Draft, whole: bool) -> Array:
    """Drop the batch axis of a constant that has one."""
    if whole or constant.ndim <= len(draft.shape(x)):
        return constant
    if constant.shape[0] != 1 and (constant != constant[:1]).any():
        raise Refused("the constant must be the same for all samples", "give the batch axis size 1")
    first: Array = constant[0]
    return first


def _same_rank(draft: Draft, *values: str) -> tuple[str, ...]:
    """Add leading axes of 1 where they are missing."""
    rank = max(len(draft.shape(x)) for x in values)
    return tuple(draft.reshape(x, (*[1] * (rank - len(draft.shape(x))), *draft.shape(x))) for x in values)


# --- Einsum ---------------------------------------------------------------------------------------------------------


@rule("Einsum")
def einsum(node: Node, graph: Graph) -> list[Step]:
    """One activation, or two factors of which one may be constant: diagonals, sums, transposes and products of \
matrices; by samples the batch comes first wherever it is."""
    shape, draft = output_shape(node, graph), Draft(node, graph)
    terms, result = _labels(node, graph)
    operands = [_operand(node, graph, i) for i in range(len(terms))]
    if len(operands) > 2:
        raise Refused("it must have at most two factors", "write it as several nodes")
    if not graph.whole:
        # The batch is no axis of a sample.
        batch = result[:1]
        for i, x in enumerate(operands):
            if (isinstance(x, str) and terms[i][:1] != batch) or batch in terms[i][1:]:
                raise Refused("the batch must be the first axis of each activation and the result", "reorder it")
            if not isinstance(x, str) and batch in terms[i]:
                operands[i] = _of_sample(x, str(operands[1 - i]), draft, whole=False)
                if terms[i][0] != batch or np.ndim(operands[i]) == len(terms[i]):
                    raise Refused("the constant must be the same for all samples", "leave the batch out of it")
        terms, result = [t.removeprefix(batch) for t in terms], result[1:]
    for i, term in enumerate(terms):
        operands[i], terms[i] = _diagonal(draft, operands[i], term)
    if len(operands) == 1:
        value, left = _summed(draft, str(operands[0]), terms[0], result)
        return draft.made(draft.reshape(_ordered(draft, value, left, result), shape))
    return draft.made(draft.reshape(_pair(draft, operands, terms, result), shape))


def _labels(node: Node, graph: Graph) -> tuple[list[str], str]:
    """Return the labels of each factor and of the result; those of an ellipsis are capital letters of their own."""
    left, arrow, result = str(node.attrs["equation"]).replace(" ", "").partition("->")
    terms = left.split(",")
    ranks = _ranks(node, graph)
    hidden = [n - len(t.replace("...", "")) if "..." in t else 0 for t, n in zip(terms, ranks, strict=True)]
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in left][: max(hidden)]
    if not arrow:
        single = [c for c, n in Counter(left.replace(",", "").replace(".", "")).items() if n == 1]
        result = "..." * ("..." in left) + "".join(sorted(single))
    expanded = [t.replace("...", "".join(free[len(free) - n :])) for t, n in zip(terms, hidden, strict=True)]
    return expanded, result.replace("...", "".join(free))


def _diagonal(draft: Draft, x: Operand, labels: str) -> tuple[Operand, str]:
    """Take the places where axes of one label agree."""
    distinct = "".join(dict.fromkeys(labels))
    if distinct == labels:
        return x, labels
    sizes = draft.shape(x) if isinstance(x, str) else np.shape(x)
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    places = np.einsum(grid, [distinct.index(c) for c in labels], list(range(len(distinct))))
    return draft.places(x, places) if isinstance(x, str) else np.ravel(x)[places], distinct


def _ordered(draft: Draft, value: str, labels: str, wanted: str) -> str:
    return draft.transpose(value, (0, *(1 + labels.index(c) for c in wanted)))


def _summed(draft: Draft, value: str, labels: str, kept: str) -> tuple[str, str]:
    """Sum over the labels that nobody else has."""
    axes = [i for i, c in enumerate(labels, 1) if c not in kept]
    left = "".join(c for c in labels if c in kept)
    summed = draft.reduce("sum", value, axes)
    return draft.reshape(summed, [n for c, n in zip(labels, draft.shape(value), strict=True) if c in kept]), left


def _pair(draft: Draft, operands: list[Operand], terms: list[str], result: str) -> str:
    """Multiply two factors: labels of both that stay are a stack of matrices, those that go are summed over."""
    if not isinstance(operands[0], str):
        operands, terms = operands[::-1], terms[::-1]
    a, (b, of_b) = str(operands[0]), (operands[1], terms[1])
    a, of_a = _summed(draft, a, terms[0], terms[1] + result)
    if isinstance(b, str):
        b, of_b = _summed(draft, b, of_b, of_a + result)
    else:
        b = b.sum(tuple(i for i, c in enumerate(of_b) if c not in of_a + result))
        of_b = "".join(c for c in of_b if c in of_a + result)
    both = [c for c in of_a if c in of_b]
    stack, inner = "".join(c for c in both if c in result), "".join(c for c in both if c not in result)
    rows, columns = ("".join(c for c in x if c not in both) for x in (of_a, of_b))
    sizes = dict(zip(of_b, draft.shape(b) if isinstance(b, str) else b.shape, strict=True))
    for c, n in zip(of_a, draft.shape(a), strict=True):
        if sizes.get(c, n) != n:
            raise Refused("sizes of one label must not broadcast", "expand the factor before it")
        sizes[c] = n

    def many(labels: str) -> int:
        return math.prod(sizes[c] for c in labels)

    a = draft.reshape(_ordered(draft, a, of_a, stack + rows + inner), (many(stack), many(rows), many(inner)))
    order, form = stack + inner + columns, (many(stack), many(inner), many(columns))
    if isinstance(b, str):
        product = draft.dot(a, draft.reshape(_ordered(draft, b, of_b, order), form))
    else:
        matrices = b.transpose([of_b.index(c) for c in order]).reshape(form)
        product = draft.matmul(a, matrices[0]) if form[0] == 1 else draft.dot(a, draft.constant(a, matrices))
    found = stack + rows + columns
    return _ordered(draft, draft.reshape(product, [sizes[c] for c in found]), found, result)
