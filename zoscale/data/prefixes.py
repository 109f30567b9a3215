"""`Row`: a sequence to run; several that begin alike as one row (`share_prefixes`), or any (`side_by_side`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Row:
    """One sequence to run, or several, which may share their beginnings, and the places whose next token matters.

    Args:
        tokens: input token ids; of several sequences the tree of their prefixes, a token before what follows it.
        answers: (column, target token, option number within the example) triples.
        example: number of the example within the micro-batch; 0 where options are numbered throughout a micro-batch.
        tree: of several sequences, (position, end) of each token: its place in its sequences, and the column where
            what follows it ends; it is seen from there on no more. Empty for one sequence.
    """

    tokens: tuple[int, ...]
    answers: tuple[tuple[int, int, int], ...]
    example: int
    tree: tuple[tuple[int, int], ...] = ()


def share_prefixes(rows: Sequence[Row], longest: int, *, branching: bool) -> list[Row]:
    """The same answers from fewer tokens: rows of one example merged where they begin alike.

    A row that another one continues needs no tokens of its own in any causal model. Rows that part need a model whose
    attention takes a mask of any form: each token then attends only to those of its own sequence.

    Args:
        rows: of one example, one sequence each.
        longest: most tokens of a merged row.
        branching: merge rows that part, too.
    """
    made: list[Row] = []
    merging = _Merging()
    for row in sorted(rows, key=lambda row: row.tokens):
        shared = common_prefix(merging.sequence, row.tokens)
        continues = shared == len(merging.sequence) or (branching and shared > 0)
        fits = len(merging.tokens) + len(row.tokens) - shared <= longest
        if merging.tokens and not (continues and fits):
            made.append(merging.row(row.example))
            merging, shared = _Merging(), 0
        merging.add(row, shared)
    return [*made, merging.row(rows[0].example)]


class _Merging:
    """A row that grows by sequences in their order."""

    def __init__(self) -> None:
        self.sequence: tuple[int, ...] = ()
        self.tokens: list[int] = []
        self._columns: list[int] = []  # of the newest sequence
        self._positions: list[int] = []
        self._ends: dict[int, int] = {}
        self._answers: list[tuple[int, int, int]] = []

    def add(self, row: Row, shared: int) -> None:
        """Append a sequence of which the first `shared` tokens are there."""
        first = len(self.tokens)
        self._ends |= dict.fromkeys(self._columns[shared:], first)
        self._columns[shared:] = range(first, first + len(row.tokens) - shared)
        self._positions += range(shared, len(row.tokens))
        self.tokens += row.tokens[shared:]
        self._answers += [(self._columns[place], token, option) for place, token, option in row.answers]
        self.sequence = row.tokens

    def row(self, example: int) -> Row:
        """What has grown."""
        length = len(self.tokens)
        tree = tuple((position, self._ends.get(c, length)) for c, position in enumerate(self._positions))
        return Row(tuple(self.tokens), tuple(self._answers), example, tree if self._ends else ())


def side_by_side(rows: Sequence[Row]) -> Row:
    """The same sequences in one row, each token attending to those of its own; that needs a mask of any form.

    Args:
        rows: with options that are numbered throughout.
    """
    if len(rows) == 1:
        return rows[0]
    tokens: list[int] = []
    answers: list[tuple[int, int, int]] = []
    tree: list[tuple[int, int]] = []
    for row in rows:
        first = len(tokens)
        tokens += row.tokens
        answers += [(first + column, token, option) for column, token, option in row.answers]
        own = row.tree or [(place, len(row.tokens)) for place in range(len(row.tokens))]
        tree += [(position, first + end) for position, end in own]
    return replace(rows[0], tokens=tuple(tokens), answers=tuple(answers), tree=tuple(tree))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))
