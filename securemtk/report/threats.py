"""The threat model, stated once as data: what is protected from whom, what is not, and what of it a run decides."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from securemtk.mtk.evaluation.leaks import AnswerLeak, LabelLeak
from securemtk.mtk.training.decoupling import Decoupling

ADVERSARY = (
    "The adversary is semi-honest: it follows the protocol and then looks at all that it has seen. It corrupts at most "
    "one of keeper (holds the weights), user (holds the input) and authority (holds the keys); no two collude."
)
PUBLIC = (
    "Public by design: the network's layers and shapes, names and classes of tasks and which are secured, mean and "
    "covariance of a secured or decoupled task's scores, sizes and times of messages."
)

# A measured gain counts from here on: less is luck, or the better of two attackers.
LEAST_GAIN, DEVIATIONS = 0.03, 3
_PLURAL = {"label": "labels", "scores": "scores"}


@dataclass(frozen=True)
class Statement:
    """One line of the threat model.

    Args:
        what: that is, or is not, protected.
        whom: from whom it is, or who gets it.
        why: by what means, or for what reason not.
    """

    what: str
    whom: str
    why: str


@dataclass(frozen=True)
class ThreatModel:
    """What may be relied on, and what may not.

    Args:
        adversary: whom the protocol withstands.
        public: what nobody hides.
        protected: what is protected.
        unprotected: what is not.
    """

    adversary: str
    public: str
    protected: tuple[Statement, ...]
    unprotected: tuple[Statement, ...]


_ALWAYS_PROTECTED = (
    Statement("the input and the scores", "keeper and authority", "both are computed on secret shares alone"),
    Statement("the weights", "user and authority", "they stay with the keeper, who computes with them on shares"),
    Statement("all messages", "anybody on the network", "mutual TLS 1.3 between the roles"),
)
_KEYS_PROTECTED = (
    Statement("the trigger-keys", "user and keeper", "the authority enters them as shares"),
    Statement(
        "which tasks are open in a prediction", "keeper", "its messages do not depend on which keys were granted"
    ),
    Statement(
        "a closed task's answer under encryption",
        "a user without its key",
        "what is revealed in its place is noise of the authority, exactly",
    ),
)
_KEYS_UNPROTECTED = (
    Statement(
        "closed answers outside encryption",
        "whoever runs the model in the clear",
        "the network closes its tasks only statistically: release sampled labels (bounded, see the guarantees) or "
        "probabilities rounded to 0.01, never raw scores",
    ),
    Statement(
        "the keys and the closed tasks",
        "whoever holds the weights",
        "a head can be trained anew and an opening pattern be reconstructed: keys protect against users, not against "
        "the keeper",
    ),
    Statement("a key that was handed out", "its holder", "it stays handed out; grants end what the authority allows"),
)
_ALWAYS_UNPROTECTED = (
    Statement(
        "everything, where roles share a machine",
        "its owner",
        "Session() starts keeper and authority as processes beside the user's: a way to develop and to measure",
    ),
    Statement("results and secrets", "a role that deviates from the protocol", "it is semi-honest security"),
    Statement("everything", "two roles that collude", "two shares are the secret"),
    Statement(
        "what open answers teach",
        "whoever may ask often",
        "answers are answers: a copy of the model can be trained from them, or members of the training part be told",
    ),
    Statement("what its authors have overlooked", "whoever finds it", "nobody else has audited this code"),
)
_MEMORISED = Statement(
    "members of the training part",
    "whoever sees raw closed answers",
    "closed labels were drawn once for each training sample (targets = fixed), and a network can learn them by heart",
)
_NO_KEYS = Statement("the answers of all tasks", "every user", "no task of this run is secured")


def threat_model(
    secured: Sequence[str],
    labels: Sequence[LabelLeak],
    answers: Sequence[AnswerLeak],
    decoupling: Decoupling | None,
    targets: str = "soft",
) -> ThreatModel:
    """Return the threat model of a run.

    Args:
        secured: names of its secured tasks.
        labels: of each pair of a secured task and another one, as `label_leaks` returns them.
        answers: what attackers make of released answers, as `answer_leaks` returns them.
        decoupling: as training found it.
        targets: what the assembler asked of closed tasks.
    """
    protected = (*_ALWAYS_PROTECTED, *(_KEYS_PROTECTED if secured else ()), *_decoupled(decoupling))
    lines = (_said(leak, answers, secured, decoupling) for leak in labels)
    unprotected = [line for line in lines if line is not None]
    unprotected += _KEYS_UNPROTECTED if secured else (_NO_KEYS,)
    unprotected += (_MEMORISED,) if secured and targets == "fixed" else ()
    return ThreatModel(ADVERSARY, PUBLIC, protected, (*unprotected, *_ALWAYS_UNPROTECTED))


def _decoupled(decoupling: Decoupling | None) -> Iterator[Statement]:
    if decoupling is None:
        return
    for target, sources in decoupling.by_closed().items():
        yield Statement(
            f"what {', '.join(sources)} would tell of {target} while it is closed",
            f"a user without the key of {target}",
            f"decoupling: each answer is true with probability {decoupling.beta:g}, and else noise in its likeness",
        )


def _said(
    leak: LabelLeak, answers: Sequence[AnswerLeak], secured: Sequence[str], decoupling: Decoupling | None
) -> Statement | None:
    """Return what one open task tells of a closed one; None where neither labels nor attackers show that it does."""
    measured = [a for a in answers if a.target == leak.target and a.sources == (leak.source,)]
    worst = max(measured, key=lambda a: a.gain, default=None)
    is_seen = worst is not None and worst.gain > max(LEAST_GAIN, DEVIATIONS * worst.standard_error)
    decoupled = decoupling is not None and leak.source in decoupling.sources([leak.target])
    beta = decoupling.beta if decoupling is not None and decoupled else 1.0
    if not is_seen and not (leak.leaky and beta > 0):
        return None
    whom = f"whoever holds the key of {leak.source}" if leak.source in secured else f"whoever sees {leak.source}"
    why = f"its true labels tell {100 * leak.guess:.0f} % of training labels, {100 * leak.prior:.0f} % is the prior"
    if worst is not None:
        why += f"; attackers guess {100 * worst.best:.0f} % of test labels from its released {_PLURAL[worst.rule]}"
    if leak.source not in secured:
        why += f"; decoupling lets {100 * beta:.0f} % of its answers through" if decoupled else "; it is not decoupled"
    return Statement(f"{leak.target} while it is closed", whom, why)
