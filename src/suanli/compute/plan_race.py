"""A race of plans: on one copy of a training, which computes by one plan after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from suanli.compute.entrants import Combination
from suanli.compute.plan import plain_plan
from suanli.compute.plan_check import judge
from suanli.compute.plan_trial import (
    FIRST_STEP_S,
    FIRST_STEP_TIMES,
    Subject,
    Trainee,
    first_line,
    free_memory,
    limit_time,
)
from suanli.compute.race import Entrant, Race
from suanli.compute.step_runner import AppliedSettings, Numbers, apply_settings
from suanli.core.errors import MachineError
from suanli.core.registry import load
from suanli.core.types import Plan, Trial
from suanli.machine import timing
from suanli.machine.timing import Gain

TURN_S = 0.03  # that a turn takes at least: several steps where they are shorter
CHECKED_EXAMPLES = 128  # of the first batch, on which outputs and gradients are compared
PROOF_ROUNDS = 6  # of the winner against plain PyTorch, at most
PLAIN: Combination = ()


def check_numbers(
    subject: Subject, field: Iterable[Combination], threads: int | None
) -> tuple[dict[Combination, float], dict[Combination, Trial]]:
    """The errors of those combinations that compute the same as plain PyTorch, and the trials of the others. What acts
    on memory and threads alone can't change a number, so combinations that differ in it are checked once."""
    errors: dict[Combination, float] = {PLAIN: 0.0}
    refused: dict[Combination, Trial] = {}
    reference = _numbers(subject, plain_plan(subject.device, threads))
    outcomes: dict[Combination, tuple[float | None, str | None]] = {PLAIN: (0.0, None)}
    for names in field:
        rounding = tuple(n for n in names if not load("speedups", n).delayed_effect)
        if rounding not in outcomes:
            plan = replace(plain_plan(subject.device, threads), speedups=rounding)
            outcomes[rounding] = _judge(subject, plan, reference)
        error, reason = outcomes[rounding]
        if reason is None:
            assert error is not None
            errors[names] = error
        else:
            refused[names] = Trial(change=join_names(names), kept=False, reason=reason, error=error)
    return errors, refused


def _judge(subject: Subject, plan: Plan, reference: Numbers) -> tuple[float | None, str | None]:
    """The relative error, or None, and the reason against the plan."""
    try:
        with limit_time(FIRST_STEP_S * FIRST_STEP_TIMES):
            return judge(subject, plan, reference, _numbers(subject, plan), CHECKED_EXAMPLES)
    except MachineError as refusal:  # needless beside the others
        return None, refusal.message
    except Exception as failure:  # noqa: BLE001  # a kernel library may raise anything
        return None, f"failed: {first_line(failure)}"
    finally:
        free_memory(subject.device)


def _numbers(subject: Subject, plan: Plan) -> Numbers:
    trainee = subject.trial(plan)
    with apply_settings(trainee.compute):
        return trainee.compute_numbers(CHECKED_EXAMPLES)


def race_on_copy(
    trainee: Trainee, field: Sequence[Combination], base: Plan, step_s: float
) -> tuple[Combination, list[Trial]]:
    """The fastest of `field`, or plain PyTorch where it isn't faster by more than the spread on fresh rounds; and a
    trial of each. `step_s`: about the seconds of a step."""
    track = _Track(trainee, base, step_s)
    race = Race(sorted(field, key=process_part))  # so that a round changes the process once
    track.run(race)
    proof = Race([PLAIN, race.leader], rounds=PROOF_ROUNDS)
    track.run(proof)
    winner = race.leader if race.leader != PLAIN and proof.gain(PLAIN, race.leader).proven else PLAIN
    return winner, [*track.failures, *trials_of(race, proof, winner, PLAIN, lambda names: names)]


class _Track:
    def __init__(self, trainee: Trainee, base: Plan, step_s: float) -> None:
        self._trainee, self._base, self._step_s = trainee, base, step_s
        self._steps = max(1, math.ceil(TURN_S / max(step_s, 1e-6)))
        self._warm: set[Combination] = set()
        self._process: Combination | None = None  # what the last step set for the process
        self.failures: list[Trial] = []

    def run(self, race: Race[Combination]) -> None:
        with AppliedSettings(self._trainee.compute) as settings:
            while (names := race.turn) is not None:
                try:
                    race.record(self._turn(names, settings))
                except Exception as failure:
                    if len(race.field) == 1:
                        raise
                    reason = f"failed: {first_line(failure)}"
                    self.failures.append(Trial(change=join_names(names), kept=False, reason=reason))
                    race.withdraw(names)

    def _turn(self, names: Combination, settings: AppliedSettings) -> float:
        """Seconds of a step. The first step of a combination isn't timed, and none after a change whose effect shows
        only from the second step on."""
        self._trainee.switch(replace(self._base, speedups=names))
        settings.change(self._trainee.compute)
        with limit_time(FIRST_STEP_S + FIRST_STEP_TIMES * self._steps * self._step_s):
            process = process_part(names)
            if names not in self._warm or process != self._process:
                self._trainee.advance()
            self._warm.add(names)
            self._process = process
            return timing.seconds(self._advance) / self._steps

    def _advance(self) -> None:
        for _ in range(self._steps):
            self._trainee.advance()


def process_part(names: Combination) -> Combination:
    """Those whose effect shows only from the second step on."""
    return tuple(n for n in names if load("speedups", n).delayed_effect)


def trials_of(
    race: Race[Entrant],
    proof: Race[Entrant] | None,
    winner: Entrant,
    plain: Entrant,
    names: Callable[[Entrant], Combination],
) -> list[Trial]:
    """A trial of each entrant that ran, compared with the plain one, the fastest last; the best is compared on the
    rounds of `proof`. `names` gives its speedups."""
    trials: list[Trial] = []
    for entrant in race.entrants if plain in race.entrants else ():
        both = proof if proof is not None and entrant in proof.entrants else race
        if entrant == plain or not both.seconds(entrant) or not both.seconds(plain):
            continue
        gain = both.gain(plain, entrant)
        trials.append(
            Trial(
                change=join_names(names(entrant)),
                kept=entrant == winner,
                reason=_reason(gain, entrant == winner, entrant == race.leader),
                ratio=gain.ratio,
                spread=gain.spread,
                rounds=gain.rounds,
                step_s=timing.spread(both.seconds(entrant)).median,
            )
        )
    return sorted(trials, key=lambda trial: trial.ratio or 0.0)


def add_errors(trials: Iterable[Trial], errors: Mapping[Combination, float]) -> list[Trial]:
    """The trials with the errors of what they tried."""
    by_change = {join_names(names): error for names, error in errors.items()}
    return [replace(trial, error=by_change.get(trial.change)) for trial in trials]


def _reason(gain: Gain, is_winner: bool, is_leader: bool) -> str:
    text = describe_gain(gain)
    if is_winner:
        return text
    return f"{text}, not clearly faster" if is_leader else f"{text}, but another combination was faster"


def describe_gain(gain: Gain) -> str:
    rounds = "1 round" if gain.rounds == 1 else f"{gain.rounds} rounds"
    return f"{gain.ratio:.2f} times as fast (spread {gain.spread:.2f}, {rounds})"


def join_names(names: Sequence[str]) -> str:
    return " ".join(f"+{name}" for name in names)
