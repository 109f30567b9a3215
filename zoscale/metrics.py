"""Scores of an answer's text, by name; any function of the user's; and metrics of all answers together."""

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from zoscale.config import ConfigError, imported

Score = Callable[[str, Sequence[str]], float]
"""From the model's answer and the accepted ones to a number; higher is better, 1 is right."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation, articles and surplus space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def accuracy(answer: str, accepted: Sequence[str]) -> float:
    """Whether the answer is one of the accepted ones as they stand."""
    return float(answer in accepted)


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Whether the answer is one of the accepted ones after normalisation."""
    return float(normalise(answer) in {normalise(text) for text in accepted})


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall of the answer's words, after normalisation."""
    return max(_overlap(normalise(answer).split(), normalise(text).split()) for text in accepted)


def _overlap(ours: Sequence[str], theirs: Sequence[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


METRICS: dict[str, Score] = {"accuracy": accuracy, "f1": f1, "exact_match": exact_match}


Tally = Sequence[tuple[float, float, float]]
"""Per label, in the order of the options: examples where it is chosen and right, where chosen, where right."""


def last_f1(tally: Tally) -> float:
    """F1 of the last label against the others: MultiRC's F1a, over all its answers."""
    return _label_f1(*tally[-1])


def macro_f1(tally: Tally) -> float:
    """The mean F1 of the labels that are right or chosen somewhere."""
    found = [_label_f1(*counts) for counts in tally if any(counts)]
    return sum(found) / len(found)


def _label_f1(correct: float, chosen: float, right: float) -> float:
    return 2 * correct / (chosen + right) if chosen + right else 0.0


TALLIED: dict[str, Callable[[Tally], float]] = {"f1a": last_f1, "macro_f1": macro_f1}
"""Metrics of all examples together: no mean of scores, so no objectives."""


Scored = Sequence[tuple[Sequence[float], int]]
"""Per example: the score of each label, in one order for all, and the number of the right one."""


def calibrated_accuracy(scored: Scored) -> float:
    """Accuracy once every label's mean score over the examples is subtracted: the liking for a word is taken out.

    What batch calibration does (arXiv 2309.17249), with the mean of the log-probabilities in place of the logarithm of
    the mean probability. It needs no labels, so an untuned model has it for nothing.
    """
    means = [sum(scores) / len(scored) for scores in zip(*(scores for scores, _ in scored), strict=True)]
    right = 0
    for scores, gold in scored:
        rest = [score - mean for score, mean in zip(scores, means, strict=True)]
        right += rest.index(max(rest)) == gold
    return right / len(scored)


COMPARED: dict[str, Callable[[Scored], float]] = {"calibrated_accuracy": calibrated_accuracy}
"""Likewise, of the scores of labels that all examples share."""


@functools.cache
def score(name: str) -> Score:
    """The score of a name in `METRICS`, or the function that `module:function` names.

    Raises:
        ConfigError: if there is none.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(f"one of {', '.join(METRICS)}, or module:function", name, "correct the name")
    found = imported(name)
    if not callable(found):
        raise ConfigError(f"a function {function!r} in {module}", "none", "correct the name")
    return _checked(name, found)


def _checked(name: str, function: Callable[..., Any]) -> Score:
    """The same function, for which anything but a number is an error of the user's."""

    def call(answer: str, accepted: Sequence[str]) -> float:
        try:
            value = function(answer, accepted)
        except Exception as error:  # whatever a user's function does
            remedy = "it is called with the text and the list of right ones"
            raise ConfigError(f"a number from {name}", f"{type(error).__name__}: {error}"[:200], remedy) from error
        if isinstance(value, Real):
            return float(value)
        raise ConfigError(f"a number from {name}", repr(value)[:80], "return a float")

    return call
