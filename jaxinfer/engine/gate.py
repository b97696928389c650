"""How many tokens the next program of decode steps proposes, if any: as many as bring the most tokens a second.

A step that verifies takes longer the more sequences share it, since arithmetic bounds it sooner than a plain step, and
the more tokens it verifies; and what it brings depends on how many proposed tokens are right, which the text decides.
So the gate weighs two numbers before every program: what a step takes, predicted for the sequences that decode now and
corrected by what earlier programs took, and how many tokens one has brought lately. It does so for plain steps, for as
many proposed tokens as the method has and, where the engine adapts, for the powers of two below that. What is chosen
depends on tokens that were read, never on those to come, so that sampled outputs keep their distribution.

Where fewer tokens are faster little would be learnt of the text, and the gate lets a program propose all now and then:
so seldom that it costs little. An engine that knows nothing of its texts yet expects much, and learns from one program
whether it is right: until that was read the next ones decode plainly. What was not proposed is taken to be right as
often as the last that was. And where proposals are faster nothing would be learnt of the time that plain steps take:
now and then a program decodes plainly, unless that is so much slower that no correction would make it faster. A
decision for plain steps stands for a few programs, and with it their times: the programs of a small model are so short
that their device waits for the host, and to weigh each took a tenth of it. An engine that warms up times both at once.
What the host checks has times of its own, with the host's part in them; there a few plain steps come soon.

Since times are measured, the same requests may make other programs in another run. It changes outputs as little as the
method does: what is proposed for certain not at all, but for rounding. A draft model does not see what is decoded
plainly, and proposes worse after it.
"""

from __future__ import annotations

import math

import numpy as np

from jaxinfer.decode.layout import Layout
from jaxinfer.engine.costs import Costs, predicted_costs
from jaxinfer.engine.options import IN_FLIGHT, Options
from jaxinfer.engine.sequence import Sequence, constrained
from jaxinfer.model import Model

MEMORY = 256  # proposals over which what earlier ones brought fades
OPTIMISM = 8  # proposals, all of them right, that an engine begins with
STANDS = 16  # programs that a decision for plain steps is for, where nothing that changes it is known earlier
PROBES_APART = 64  # programs at the least, of those that could have proposed all and did not, or none and did
PROBES_COST = 0.01  # of the time of the programs between two probes, at the most
WRONG = 2.0  # times that a predicted speed-up may be too large


class Gate:
    """Says how many tokens programs of decode steps propose, and learns from them."""

    def __init__(self, layout: Layout, costs: Costs | None = None, always: bool = False):
        """Args:
        costs: None proposes all always, if there is a method.
        always: whether something is proposed even where plain decoding is predicted to be faster.
        """
        self._depth, self._costs = layout.depth, costs
        self._choices = layout.choices if always else (0, *layout.choices)
        self._brought_Q = np.full(self._depth + 1, float(OPTIMISM))
        self._without, self._proposing = 0, 0  # programs since the last that proposed all, and none
        self._told, self._unread = False, 0  # whether any were read, and programs until those on their way are
        self._stands, self._of = 0, 0  # programs for which nothing is weighed: so many sequences decode plainly

    @property
    def weighed(self) -> tuple[int, ...]:
        """Between what it chooses."""
        return () if self._costs is None else self._choices

    @property
    def accepted(self) -> tuple[float, ...]:
        """How often lately the first proposed token was right, the first two, and so on."""
        return tuple((self._brought_Q[1:] / self._brought_Q[0]).tolist())

    def tokens(self, drafts: int) -> float:
        """That a step has brought a sequence lately, of those in which so many proposed tokens may be right."""
        return float(self._brought_Q[: drafts + 1].sum() / self._brought_Q[0])

    def drafts(self, decoding: list[Sequence]) -> int:
        """Proposed tokens that a step of the next program may bring each of these: one of the layout's `choices`, or
        none, where nothing is to be proposed. Where the host checks what is proposed, it is all or none."""
        if not self._depth or self._costs is None:
            return self._depth
        checked = constrained(decoding)
        if self._stands and self._of == len(decoding) and not checked:
            self._stands -= 1
            self._without, self._proposing = self._without + 1, 0
            return 0
        best = self._weigh([len(sequence.tokens) for sequence in decoding], checked)
        self._without = 0 if best == self._depth else self._without + 1
        self._proposing = self._proposing + 1 if best else 0
        return best

    def _weigh(self, contexts: list[int], checked: bool) -> int:
        """What brings the most tokens a second, or shows what more or fewer proposals would bring."""
        assert self._costs is not None
        choices = [drafts for drafts in self._choices if drafts in (0, self._depth) or not checked]
        seconds = {drafts: self._costs.seconds(contexts, drafts, checked) for drafts in choices}
        rates = {drafts: self.tokens(drafts) / seconds[drafts] for drafts in choices}
        best = max(rates, key=rates.__getitem__)
        cost = seconds[self._depth] / seconds[best]
        if best < self._depth and self._probes(best, cost):
            return self._depth
        if 0 in rates and (self._probes_plainly(rates[best] / rates[0]) or (checked and self._is_news(contexts))):
            return 0
        if 0 in rates and best and not self._told:
            return self._first(best)
        if not best and not checked:
            self._let_stand(len(contexts), cost)
        return best

    def _let_stand(self, count: int, cost: float) -> None:
        """Nothing is weighed for a few programs of so many sequences, or until it is time for a probe."""
        left = _apart(cost) - self._without  # none where no probe is worth it
        self._stands, self._of = (min(STANDS, left) if left > 0 else STANDS) - 1, count

    def time(self, contexts: list[int], drafts: int, seconds: float, checked: bool = False) -> None:
        """Takes in what a step took of sequences of so many tokens each, in which so many proposed tokens might be
        right, and which the host checked or not. While a decision stands for so many, plain steps are not asked."""
        stands = self._stands and self._of == len(contexts) and not (drafts or checked)
        if self._costs is not None and not stands:
            self._costs.learn(contexts, drafts, seconds, checked)

    def learn(self, brought_Q: np.ndarray) -> None:
        """Takes in what steps with proposals brought.

        Args:
            brought_Q: how many there were, and of them those in which the first proposed token was right, the first
                two, and so on, as far as so many were proposed.
        """
        self._told, self._stands = True, 0
        faded_Q = self._brought_Q * (MEMORY / (MEMORY + brought_Q[0]))
        before, last = (faded_Q[: len(brought_Q)] + brought_Q)[-2:]
        again = last / before if before else 0.0  # how often the last is right where those before it are
        beyond = brought_Q[-1] * again ** np.arange(1, len(faded_Q) - len(brought_Q) + 1)
        self._brought_Q = faded_Q + np.concatenate([brought_Q, beyond])

    def _first(self, drafts: int) -> int:
        """What a program proposes where none was read: so many, or none while those of another are on their way."""
        if self._unread:
            self._unread -= 1
            return 0
        self._unread = IN_FLIGHT - 1
        return drafts

    def _probes(self, drafts: int, cost: float) -> bool:
        """Whether it is time to see what more proposals bring than so many; never where they would lose even if all
        were right.

        Args:
            cost: of a step that proposes all, over one that proposes so many.
        """
        return cost * self.tokens(drafts) < self._depth + 1 and self._without >= _apart(cost)

    def _probes_plainly(self, speedup: float) -> bool:
        """Whether it is time to see what plain steps take, which proposals are so many times as fast as."""
        return speedup < WRONG and self._proposing >= _apart(speedup)

    def _is_news(self, contexts: list[int]) -> bool:
        """Whether plain steps that the host checks are the ones of which nothing is known: no prediction bounds them,
        so a few show what they take."""
        assert self._costs is not None
        return self._costs.timed(contexts, self._depth, True) and not self._costs.timed(contexts, 0, True)


def _apart(cost: float) -> int:
    """Programs between two probes each of which takes as long as so many of them."""
    return max(PROBES_APART, math.ceil((cost - 1) / PROBES_COST))


def predicted_gate(model: Model, layout: Layout, options: Options) -> Gate:
    """By what the cost model says of this model on this machine."""
    always = options.always_speculate
    if layout.speculation is None or (always and not layout.adaptive):
        return Gate(layout)
    return Gate(layout, predicted_costs(model, layout, steps=options.steps_per_dispatch), always)
