"""Arguments of a Trainer that a run of many phases cannot follow, told before any training."""

from collections.abc import Iterable

from ..callbacks.retention import LOWER_IS_BETTER
from ..training_args import ModXTrainingArguments
from .evaluation_tests import METRICS, RANKS


def check_checkpoints(args: ModXTrainingArguments, tests: Iterable[str]) -> None:
    """Raise a ValueError where no run would go on from its checkpoints, or where the best of them would not be
    found by what is measured.

    Args:
        tests: names of the retrieval tests, which are those evaluated inside a phase.
    """
    if args.save_only_model:
        raise ValueError(
            "save_only_model leaves checkpoints that nothing goes on from: leave it out, or save none inside a phase "
            "(save_strategy='no')."
        )
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            "A run goes on by itself from the last checkpoint in its output_dir. Leave resume_from_checkpoint out; a "
            "new run can start from the model in a checkpoint or phase of another one (--model_name_or_path)."
        )
    if args.load_best_model_at_end:
        wanted = args.metric_for_best_model.removeprefix("eval_")
        known = [f"{test}_{metric}" for test in tests for metric in (*METRICS, *RANKS, "loss")]
        if wanted not in known:
            near = f" Its name is that of a test and of a metric, such as {known[0]!r}." if known else ""
            raise ValueError(f"{wanted!r} is measured of no test (metric_for_best_model).{near}")
        if wanted.endswith(LOWER_IS_BETTER) and args.greater_is_better:  # the default of all but losses
            raise ValueError(f"Of {wanted!r} less is better: set greater_is_better to false.")
