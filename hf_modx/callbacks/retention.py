"""A promise on what was learned before: how much of it a phase may lose."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..distributed import on_main_process
from ..interpolation import WeightInterpolation, require_interpolation, snapshot
from ..trained_weights import adapters_merged
from .base import LossCallback, PhaseBoundary

logger = logging.getLogger(__name__)

POLICIES = ("stop", "restore", "interpolate")
RETRIEVAL_METRIC = "image_to_text_recall@1"
HALVINGS = 6
"""Evaluations of `interpolate`: it finds the edge to 1/64 of the way."""
ROUNDING = 1e-9
LOWER_IS_BETTER = ("loss", "rank")  # how the names of such metrics end
PRICES = (0.01, 100.0)
SMALLEST_BUDGET = 0.01
GOOD, STOPPED = "good.", "stopped_at"  # in the state


class RetentionBudget(LossCallback):
    """Hold a phase to a budget of forgetting: what it leaves scores on the old tests at least `1 - max_forgetting` of
    what the model that it started from did.

    The score is the mean of one metric over the tests, and `forgetting = 1 - score / score at the start of the phase`.
    It is measured at the start, after every so many steps, and at the end on the weights that the phase is to leave,
    after the callback that owns them (`WeightEnsemble`, `WiseFT`). Where the budget is broken:

    - "stop": training ends at the first look that finds it broken. The fewest steps.
    - "restore": training goes on, since forgetting may come back under the budget as the learning rate falls.
    - "interpolate": training goes on. At the end the weights move back towards those at the start of the phase, to the
      edge of the budget: the largest weight w of `(1 - w) start + w end` that a bisection of six evaluations finds
      within it. The way between is WiSE-FT's (Wortsman et al., CVPR 2022).

    With "stop" and "restore" a phase that would end beyond the budget leaves the weights of the newest look within it,
    or those at its start where there is none. So each policy keeps the promise, up to "nothing is learned".

    The budget is of ONE phase, relative to the model that it starts from: after K phases `(1 - max_forgetting)^K` of
    the start's score is promised, where the tests stay the same. It is of the mean: a single test may lose more.

    The looks also set a price on forgetting, which `ModX(alpha="auto")` pays: the multiplier of a dual ascent in the
    logarithm. `price <- price * 2^g` with `g = (forgetting - max_forgetting) / max_forgetting`, held to [-1, 1]: at
    twice the budget or beyond it doubles, at the budget it stays, with nothing forgotten it halves. It begins with 1,
    is held to [0.01, 100], and is carried from phase to phase.

    Args:
        max_forgetting: the budget, in [0, 1).
        on_forgetting: "stop", "restore" or "interpolate".
        every: optimizer steps between two looks; below 1 a share of the steps of the phase.
        metric: of all tests, as `ModXTrainer.measure` names it, one of which more is better. None: image-to-text
            recall@1, and the first metric of a `LabelTest`.
        tests: by name, tables in the columns of the training set or `LabelTest`s. `ContinualRun` sets them for each
            phase; without any, nothing is promised.

    Raises:
        ValueError: a value out of its range, or a loss or a rank as the metric; when the phase starts, a metric that a
            test does not have or that is NaN, an adapter that cannot be taken back (see `require_interpolation`), or a
            training that keeps other weights than its last.
    """

    needs_phase_start = True
    guards_weights = True

    def __init__(
        self,
        max_forgetting: float = 0.1,
        on_forgetting: str = "interpolate",
        every: float = 0.1,
        metric: str | None = None,
        tests: Mapping[str, Any] | None = None,
    ):
        if not 0 <= max_forgetting < 1:
            raise ValueError(f"max_forgetting is a part of the old score, in [0, 1), got {max_forgetting}.")
        if on_forgetting not in POLICIES:
            raise ValueError(f"on_forgetting must be one of {', '.join(POLICIES)}, got {on_forgetting!r}.")
        if not every > 0 or (every >= 1 and every != int(every)):
            raise ValueError(f"A look is every so many steps, or a share of the phase's below 1, got {every}.")
        if metric is not None and metric.endswith(LOWER_IS_BETTER):
            raise ValueError(f"Of {metric} less is better: take a metric that falls with forgetting, as recall does.")
        self.max_forgetting = max_forgetting
        self.on_forgetting = on_forgetting
        self.every = every
        self.metric = metric
        self.tests: Mapping[str, Dataset | Any] = tests or {}
        self.asked: str | None = None  # the names that a run was asked for: a part of what makes it the same run
        self._price = 1.0
        self._phase: PhaseBoundary | None = None
        self._record: dict[str, Any] = {}
        self._forget()

    def _forget(self) -> None:
        """What a phase has shown so far."""
        self._start: Tensor = torch.zeros(0, dtype=torch.float64)  # score of every test
        self._looks: list[tuple[int, float]] = []  # step, forgetting
        self._evaluations = 0
        self._steps = self._planned_steps = self._stopped_at = 0
        self._good: dict[str, Tensor] = {}
        self._good_step = 0
        self._good_scores = self._start

    @property
    def price(self) -> float:
        """On forgetting, for what is steered towards the budget; 1 at first."""
        return self._price

    # ---- In a phase ----

    def start_phase(self, phase: PhaseBoundary) -> None:
        if phase.args.load_best_model_at_end:
            raise ValueError("RetentionBudget decides which weights a phase leaves: unset load_best_model_at_end.")
        if phase.args.enable_jit_checkpoint and self.on_forgetting == "stop":
            raise ValueError(
                "enable_jit_checkpoint takes a phase that the budget stops for one that a signal has: choose another "
                "on_forgetting, or run the phase in a ContinualRun, which has a way of its own."
            )
        require_interpolation(phase.model)
        self._forget()
        self._phase, self._record = phase, {}
        self._start = self._good_scores = self._scores()
        if not self._start.isfinite().all():
            raise ValueError(
                f"No share of {self._by_test(self._start)} can be promised: the start of the phase has NaN."
            )
        if len(self._start) and not self._start.mean() > 0:
            logger.warning(
                "The model that the phase starts from scores zero on %s: it has nothing to forget.",
                ", ".join(self.tests),
            )

    def on_step_end(self, args, state, control, **kwargs):
        self._steps, self._planned_steps = state.global_step, state.max_steps
        is_last = state.global_step >= state.max_steps  # what the phase leaves is measured anyway
        if not len(self._start) or is_last or state.global_step % self._interval(state.max_steps):
            return
        scores = self._scores()
        forgetting = self._forgetting(scores)
        self._looks.append((state.global_step, forgetting))
        self._raise_price(forgetting)
        if self._is_within(forgetting):
            self._keep(scores)
        elif self.on_forgetting == "stop":
            self._stopped_at = state.global_step
            control.should_training_stop = True
            logger.warning(
                "Step %d: %.1f %% of the old score is forgotten, more than %.1f %%. The phase ends here.",
                state.global_step,
                100 * forgetting,
                100 * self.max_forgetting,
            )

    def finish_phase(self, phase: PhaseBoundary) -> None:
        if self._phase is None:
            return
        record = {
            "max_forgetting": self.max_forgetting,
            "on_forgetting": self.on_forgetting,
            "tests": {name: self._metric_of(name) for name in self.tests},
        }
        if len(self._start):
            record |= self._keep_promise(phase)
        self._record = record
        self._phase = None
        self._forget()

    def results(self) -> dict[str, Any]:
        return {"retention": self._record} if self._record else {}

    def _keep_promise(self, phase: PhaseBoundary) -> dict[str, Any]:
        """Leave weights within the budget, and tell how."""
        scores = self._scores()
        trained = forgetting = self._forgetting(scores)
        how: dict[str, Any] = {"action": "stopped" if self._stopped_at else "none"}
        if not self._is_within(forgetting):
            line = WeightInterpolation(phase.model, phase.phase_start)
            if self.on_forgetting == "interpolate":
                weight, scores = self._edge(line)
                how = {"action": "interpolated", "weight": weight}
            else:
                scores = self._go_back(line)
                how |= {"action": "stopped" if self._stopped_at else "restored", "restored_step": self._good_step}
            forgetting = self._forgetting(scores)
        if self._stopped_at:
            how["stopped_at"] = self._stopped_at
        return {
            **how,
            "forgetting": forgetting,
            "forgetting_of_training": trained,
            "start": self._by_test(self._start),
            "end": self._by_test(scores),
            "looks": [{"step": step, "forgetting": found} for step, found in self._looks],
            "steps": self._steps,
            "planned_steps": self._planned_steps,
            "evaluations": self._evaluations,
        }

    def _go_back(self, line: WeightInterpolation) -> Tensor:
        """To the newest look within the budget; gives its scores."""
        if self._good:
            line.go_back(self._good)
        else:
            line.go_to(0.0)
        return self._good_scores

    def _edge(self, line: WeightInterpolation) -> tuple[float, Tensor]:
        """Go from the start of the phase as far towards its end as the budget lets; the weight of the end, and the
        scores."""
        within, beyond, scores = 0.0, 1.0, self._start
        for _ in range(HALVINGS):
            weight = (within + beyond) / 2
            line.go_to(weight)
            found = self._scores()
            if self._is_within(self._forgetting(found)):
                within, scores = weight, found
            else:
                beyond = weight
        line.go_to(within)
        return within, scores

    # ---- Looks ----

    def _interval(self, max_steps: int) -> int:
        return int(self.every) if self.every >= 1 else max(1, math.ceil(self.every * max_steps))

    def _scores(self) -> Tensor:
        """(T,) of the model as it is now. The random numbers of the training stay as they are."""
        if not self.tests:
            return torch.zeros(0, dtype=torch.float64)
        self._evaluations += 1
        with torch.random.fork_rng(devices=[]), adapters_merged(self._phase.model):
            found = [self._score(name, self._phase.measure(test)) for name, test in self.tests.items()]
        # One process's numbers for all: where one stops and another trains on they wait for each other for ever.
        return torch.tensor(on_main_process(lambda: found), dtype=torch.float64)

    def _metric_of(self, name: str) -> str:
        return self.metric or getattr(self.tests[name], "metrics", (RETRIEVAL_METRIC,))[0]

    def _score(self, name: str, values: Mapping[str, float]) -> float:
        metric = self._metric_of(name)
        if metric not in values:
            raise ValueError(f"The test {name!r} has no metric {metric!r}. It has {', '.join(values)}.")
        return values[metric]

    def _forgetting(self, scores: Tensor) -> float:
        before = self._start.mean().item()
        # NaN: nothing is left.
        return 1 - scores.nan_to_num(nan=0.0).mean().item() / before if before > 0 else 0.0

    def _is_within(self, forgetting: float) -> bool:
        return forgetting <= self.max_forgetting + ROUNDING

    def _raise_price(self, forgetting: float) -> None:
        over = (forgetting - self.max_forgetting) / max(self.max_forgetting, SMALLEST_BUDGET)
        lowest, highest = PRICES
        self._price = min(max(self._price * 2 ** min(max(over, -1.0), 1.0), lowest), highest)

    def _keep(self, scores: Tensor) -> None:
        if self.on_forgetting != "interpolate":
            self._good, self._good_step, self._good_scores = snapshot(self._phase.model), self._steps, scores

    def _by_test(self, scores: Tensor) -> dict[str, float]:
        return dict(zip(self.tests, scores.tolist(), strict=True))

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, Tensor]:
        state = {"price": torch.tensor(self._price, dtype=torch.float64)}
        if self._phase is None:
            return state
        counts = [self._evaluations, self._steps, self._planned_steps, self._good_step]
        looks = torch.tensor(self._looks, dtype=torch.float64).reshape(-1, 2)
        state |= {"start": self._start, "looks": looks, "good_scores": self._good_scores.clone()}
        state |= {"counts": torch.tensor(counts), STOPPED: torch.tensor(self._stopped_at)}
        return state | {f"{GOOD}{name}": weight for name, weight in self._good.items()}

    def weights_in_state(self, model: nn.Module) -> Iterable[Tensor]:
        if self.on_forgetting == "interpolate":
            return ()
        return [weight for weight in model.parameters() if weight.requires_grad]

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._price = state["price"].item() if "price" in state else 1.0
        if "start" not in state:
            return
        self._start, self._good_scores = state["start"], state["good_scores"]
        self._looks = [(int(step), forgetting) for step, forgetting in state["looks"].tolist()]
        counts = state["counts"].tolist()
        self._evaluations, self._steps, self._planned_steps, self._good_step = counts
        self._stopped_at = int(state[STOPPED])
        self._good = {name.removeprefix(GOOD): weight for name, weight in state.items() if name.startswith(GOOD)}
