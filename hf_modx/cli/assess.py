"""Say what a recipe has to expect of new data, before any training.

Measures the model as it is on every phase of DATA: zero-shot recall, the share of rows that Mod-X would keep at the
planned batch, duplicates, rows that cannot be used, the shift from the old data, and the time and memory of a few real
steps; and advises a recipe with its alpha and its replay. Nothing is kept but what is printed,
and the base of a built-in stream, which is cached.

DATA is a data set as other commands take it: splits NAME_train and NAME_test are phases, any other data set is one
phase, of its train split with its test split. demo:domain, demo:class and demo:instance are the built-in streams,
whose base is the old data; with them MODEL may be "demo", the small CLIP trained on that base.

    hf-modx assess openai/clip-vit-base-patch32 my_data --old coco_sample --caption_column text --batch_size 256
    hf-modx assess runs/modx-seed0/phase-3 next_month --old last_month --json
    hf-modx assess demo demo:class
"""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

from accelerate import PartialState
from datasets import concatenate_datasets

from ..assessment import Advice, Assessment, Cost, advise, assess, measure_cost
from ..data import PairCollator, refuse_unknown_pair_ids
from ..data.loading import load_splits
from ..demo import DEMO_DEFAULTS, DEMO_STREAMS, trained_base
from ..evaluation import Encoder
from ..markdown import escaped, table
from ..model_card.metadata import metric_name
from ..phases import TRAIN, Phase, PhaseStream
from ..pretrained import load_dual_encoder
from ..training_args import ModXTrainingArguments

DEMO = "demo"
METRICS = ("image_to_text_recall@1", "text_to_image_recall@1", "image_to_text_recall@5")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL[@REVISION]", help="folder, id on the Hub, or demo")
    parser.add_argument("data", metavar="DATA", help="data set, or demo:STREAM")
    parser.add_argument("--old", metavar="DATA", help="what the model has learned, or part of it")
    parser.add_argument("--phase", help="names of phases, comma-separated. Default: all")
    parser.add_argument("--dataset_config_name", help="configuration of the data sets")
    parser.add_argument("--image_column", default="image", help="column of the images (default: image)")
    parser.add_argument("--caption_column", default="caption", help="column of the captions (default: caption)")
    parser.add_argument("--pair_id_column", default="pair_id", help="column of the pair ids, where there is one")
    parser.add_argument(
        "--same_pair_id",
        choices=["positive", "neutral"],
        help="planned, as the next two (default: positive; of the built-in streams neutral)",
    )
    parser.add_argument("--mask_duplicates", action="store_true", help="equal captions belong together")
    parser.add_argument(
        "--pairs_in_batch", default="any", choices=["any", "apart", "together"], help="pairs that belong together"
    )
    parser.add_argument(
        "--batch_size", type=int, help="the contrastive batch planned (default: 64; of the built-in streams 128)"
    )
    parser.add_argument(
        "--num_train_epochs",
        type=float,
        help="planned, of each phase (default: 3; of the built-in streams 200 steps)",
    )
    parser.add_argument("--max_steps", type=int, default=-1, help="planned, of each phase, in the place of epochs")
    parser.add_argument("--target_recall", type=float, help="image-to-text recall@1 that is good enough, 0 to 1")
    parser.add_argument("--sample", type=int, default=2048, help="rows of each part to look at (default: 2048)")
    parser.add_argument("--timed_steps", type=int, default=5, help="real steps of a phase; 0: none (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of samples and of a built-in stream (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON with all measures in the place of the tables")


def run(options: argparse.Namespace) -> None:
    stream = stream_of(options.data, options)
    is_demo = options.data.partition(":")[0] == DEMO
    args = planned(options, is_demo)
    phases = chosen_phases(stream, options.phase)
    old = stream.base if options.old is None else as_one_phase(stream_of(options.old, options))
    refuse_unknown_pair_ids([part.train for part in [*phases, *filter(None, [old])]], options.pair_id_column)
    with redirect_stdout(sys.stderr):  # the log of the base's training is no JSON
        name = trained_base(stream, args) if options.model == DEMO and is_demo else options.model
    model, processor = load_dual_encoder(name, PartialState().device)
    encoder = Encoder(model, PairCollator.for_model(model, processor), args.eval_batch_size, device=model.device)
    found = [
        assess(
            encoder,
            phase,
            old,
            batch_size=args.contrastive_batch_size,
            columns=(options.image_column, options.caption_column, options.pair_id_column),
            positives=args.same_pair_id == "positive",
            mask_duplicates=args.mask_duplicates,
            pairs_in_batch=args.pairs_in_batch,
            sample=options.sample,
            seed=options.seed,
        )
        for phase in phases
    ]
    advice = advise(found, target_recall=options.target_recall)
    cost = None
    if options.timed_steps and advice.recipe != "frozen":
        settings = {"old": old.train if old is not None else None, "timed_steps": options.timed_steps}
        largest = max((phase.train for phase in phases), key=len)
        cost = measure_cost(model, processor, largest, advice.recipe, args, **settings)
    if PartialState().is_main_process:
        print(as_json(found, advice, cost) if options.json else as_text(found, advice, cost))


def stream_of(data: str, options: argparse.Namespace) -> PhaseStream:
    """The phases of a data set, or of a built-in stream."""
    kind, _, name = data.partition(":")
    if kind == DEMO and not Path(data).exists():
        if (name or "domain") not in DEMO_STREAMS:
            raise ValueError(f"There is no built-in stream {name!r}. There are: {', '.join(DEMO_STREAMS)}.")
        return DEMO_STREAMS[name or "domain"](options.seed)
    splits = load_splits(data, options.dataset_config_name, options.image_column)
    if any(split.endswith(TRAIN) for split in splits):
        return PhaseStream.from_splits(splits)
    train = "train" if "train" in splits else next(iter(splits))
    test = splits.get("test") if train != "test" else None
    return PhaseStream((Phase(Path(data).stem, splits[train], test),))


def as_one_phase(stream: PhaseStream) -> Phase:
    """All pairs and all tests of a stream."""
    parts = stream.all_phases()
    tests = [part.test for part in parts if part.test is not None]
    train = [part.train for part in parts]
    shared = [column for column in train[0].column_names if all(column in part.column_names for part in train + tests)]
    train, tests = ([part.select_columns(shared) for part in some] for some in (train, tests))
    return Phase("old", concatenate_datasets(train), concatenate_datasets(tests) if tests else None)


def chosen_phases(stream: PhaseStream, names: str | None) -> list[Phase]:
    if names is None:
        return list(stream)
    known = {phase.name: phase for phase in stream}
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"There is no phase {', '.join(unknown)}. The phases are: {', '.join(known)}.")
    return [known[name] for name in wanted]


def planned(options: argparse.Namespace, is_demo: bool) -> ModXTrainingArguments:
    settings = dict(DEMO_DEFAULTS) if is_demo else {}
    settings |= {name: getattr(options, name) for name in ("mask_duplicates", "pairs_in_batch")}
    if options.same_pair_id is not None:
        settings["same_pair_id"] = options.same_pair_id
    if options.max_steps > 0 or options.num_train_epochs is not None:
        settings["max_steps"] = options.max_steps
    if options.num_train_epochs is not None:
        settings["num_train_epochs"] = options.num_train_epochs
    if options.batch_size is not None:
        settings["per_device_train_batch_size"] = -(-options.batch_size // PartialState().num_processes)
    columns = {name: getattr(options, name) for name in ("image_column", "caption_column", "pair_id_column")}
    return ModXTrainingArguments(
        output_dir="unused", seed=options.seed, report_to="none", disable_tqdm=True, **columns, **settings
    )


def as_json(found: Iterable[Assessment], advice: Advice, cost: Cost | None) -> str:
    phases = [phase.to_dict() for phase in found]
    return json.dumps({"phases": phases, "advice": advice.to_dict(), "cost": cost and cost.to_dict()}, indent=2)


def as_text(found: Iterable[Assessment], advice: Advice, cost: Cost | None) -> str:
    """Markdown: a column a phase, and below it the advice."""
    found = list(found)
    lines = [table(["", *(escaped(phase.phase) for phase in found)], rows_of(found)), ""]
    lines += [
        "Recipes, the best first: " + ", ".join(f"{name} ({100 * held:.0f} %)" for name, held in ranked(advice)) + "."
    ]
    lines += [f"Between {' and '.join(two)} the measures do not decide." for two in advice.alike]
    lines += ["In brackets: rows that hold what the old model knows.", "", advice.sentence, *advice.notes]
    if cost is not None:
        lines += [
            "",
            f"The longest phase: {cost.steps:,} steps of {advice.recipe}, {cost.seconds_a_step:.2f} s each, "
            f"{cost.seconds / 60:.1f} minutes without evaluation, {cost.peak_bytes / 2**30:.1f} GiB at the peak.",
        ]
    return "\n".join(lines)


def ranked(advice: Advice) -> list[tuple[str, float]]:
    return [(name, advice.held[name]) for name in advice.ranking]


def rows_of(found: list[Assessment]) -> list[list[str]]:
    rows = [["pairs to learn", *(f"{phase.pairs:,}" for phase in found)]]
    rows += [
        [f"{metric_name(metric)}, zero-shot, %", *(f"{100 * phase.zero_shot[metric]:.1f}" for phase in found)]
        for metric in METRICS
    ]
    rows += [["among pairs", *(f"{phase.tested_pairs:,}" for phase in found)]]
    for size in sorted({size for phase in found for size in phase.kept}):
        kept = [f"{100 * phase.kept[size]:.1f}" if size in phase.kept else "" for phase in found]
        rows.append([f"rows kept, batch of {size:,}, %", *kept])
    if any(phase.kept_with_replay is not None for phase in found):
        rows += [["... with replay, %", *(f"{100 * phase.kept_with_replay:.1f}" for phase in found)]]
    rows += [["rows with a caption of another pair", *(f"{phase.duplicates.captions:,}" for phase in found)]]
    rows += [["rows with an image of another pair", *(f"{phase.duplicates.images:,}" for phase in found)]]
    rows += [["rows that cannot be used, %", *(f"{100 * phase.bad_share:.1f}" for phase in found)]]
    if any(phase.shift is not None for phase in found):
        rows += rows_of_shift(found)
    return rows


def rows_of_shift(found: list[Assessment]) -> list[list[str]]:
    rows = []
    for title, name, factor, digits in (
        ("old and new images told apart, %", "image_classifier", 100, 1),
        ("old and new captions told apart, %", "text_classifier", 100, 1),
        ("distance of mean images", "image_distance", 1, 2),
        ("distance of mean captions", "text_distance", 1, 2),
        ("recall@1, old less new, points", "recall_gap", 100, 1),
    ):
        values = [getattr(phase.shift, name, None) for phase in found]
        rows.append([title, *("" if value is None else f"{factor * value:.{digits}f}" for value in values)])
    return rows
