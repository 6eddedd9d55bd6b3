"""Continually fine-tune a CLIP model on image-caption data that arrives in phases.

With no arguments: the built-in stream, a small CLIP trained on its base (three artists' drawings of many concepts),
and Mod-X on its phases (the same concepts in one new rendering each). Needs `pip install "hf_modx[demo]"`, no network,
no accelerator.

    accelerate launch examples/continual_clip.py

Plain fine-tuning and the joint upper bound on the same start weights:

    accelerate launch examples/continual_clip.py --recipe finetune
    accelerate launch examples/continual_clip.py --recipe joint

New groups of concepts in the place of new renderings, and two recipes added up:

    accelerate launch examples/continual_clip.py --demo_stream class --recipe er+modx

Your own data, one phase for each value of a column, starting from a pretrained CLIP:

    accelerate launch examples/continual_clip.py --model_name_or_path openai/clip-vit-base-patch32 \
        --dataset_name my_folder --caption_column text --phase_column month --num_train_epochs 5

With low-rank adapters, which need little memory beside the model (`pip install "hf_modx[peft]"`); the teacher is the
model without its adapter:

    accelerate launch examples/continual_clip.py --peft lora --lora_rank 16

The same from a file, flags override it (`examples/lora_one_gpu.yaml` is one for a pretrained CLIP on a small GPU):

    accelerate launch examples/continual_clip.py config.yaml --seed 1

A published protocol with its data, prompts and hyper-parameters; flags override them (`--data_root` has copies of the
data sets in folders of their names):

    accelerate launch examples/continual_clip.py --protocol mtil_order_1

Further tests after every phase, declared in a file: other data, zero-shot classification, linear probes:

    accelerate launch examples/continual_clip.py --tests tests.yaml

With a promise: after every phase the tests of what was learned before score at least 80 % of what they did before it,
or the weights move back until they do:

    accelerate launch examples/continual_clip.py --max_forgetting 0.2 --on_forgetting interpolate

Every phase as a revision of one repository on the Hub (after `hf auth login`), private unless told otherwise:

    accelerate launch examples/continual_clip.py --push_to_hub --hub_model_id my_clip

Run the command again after an interruption: finished phases are kept, the phase begun goes on from its checkpoint.
With `--push_to_hub` that works in an empty folder on another machine, too. A run that is finished but could not be
published whole ends with status 3, of which `accelerate launch` makes 1: the same command publishes the rest.

The last group of `--help` has the flags of this script; those before it are `ModXTrainingArguments`.
"""

import json
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoModel, AutoProcessor, set_seed

from hf_modx import RECIPES, ContinualRun, ModXTrainingArguments, PhaseStream, build_recipe
from hf_modx.callbacks import replay_of
from hf_modx.data.loading import at_most, load_splits, load_table
from hf_modx.demo import BASE_MAX_STEPS, DEMO_DEFAULTS, DEMO_RECIPE_ARGS, DEMO_STREAMS
from hf_modx.evaluation import EvaluationMatrix, EvaluationTest, load_tests
from hf_modx.hub import NotAStream, UnpublishedPhases
from hf_modx.hub.stream import is_cached_stream
from hf_modx.model_card.metadata import metric_name
from hf_modx.protocols import PROTOCOLS, read_protocol, source_of
from hf_modx.recipes import check_teachers, recipe_arguments, recipe_name
from hf_modx.run.provenance import is_hub_id
from hf_modx.run.retention import load_retention_tests
from hf_modx.yaml_arguments import parse_arguments

logger = logging.getLogger("hf_modx.example")

UNPUBLISHED = 3
"""Exit status of a run that is finished and not wholly on the Hub."""


@dataclass
class ScriptArguments:
    """What to learn, from what, and how."""

    _argument_group_name = "what to learn, from what, and how"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A CLIP model. Default: the small CLIP trained on the stream's base."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    from_scratch: bool = field(
        default=False, metadata={"help": "Random weights, of the seed, in the architecture of the model."}
    )
    recipe: list[str] = field(
        default_factory=lambda: ["modx"],
        metadata={
            "help": f"How to learn and what to keep: {', '.join(RECIPES)}, or several added up as in modx+er. In a "
            "YAML file also a list of parts with their options: [{modx: {alpha: 5}}, er]"
        },
    )
    recipe_args: str = field(
        default="{}",
        metadata={
            "help": "Options of the recipe as JSON: '{\"alpha\": 20}'. Of several added up by part: "
            '\'{"modx": {"alpha": 20}}\''
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set on the Hub (what PhaseStream.push_to_hub has published is a stream as it stands), a "
            "folder written by save_to_disk, an image folder with metadata, or parquet files. Default: the built-in "
            "drawings."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "The split that is cut into phases. Default: train, or the only one."}
    )
    phase_column: str | None = field(
        default=None, metadata={"help": "One phase a value; with --num_phases, equal parts in its order (time)."}
    )
    num_phases: int | None = field(default=None, metadata={"help": "Number of equal parts, random without a column."})
    phase_splits: str | None = field(default=None, metadata={"help": "Splits that are the phases: a,b,c"})
    test_splits: str | None = field(default=None, metadata={"help": "As many test splits, in the phases' order."})
    test_fraction: float = field(default=0.1, metadata={"help": "Share of a phase held out where it has no test."})
    max_train_samples: int | None = field(default=None, metadata={"help": "At most so many pairs a phase."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "At most so many pairs a test."})
    protocol: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(PROTOCOLS)}, or a file like theirs; see hf_modx.protocols."},
    )
    data_root: str | None = field(
        default=None, metadata={"help": "Folder that holds the protocol's data sets under their names."}
    )
    tests: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of further tests, each with name, kind (retrieval, zero_shot, linear_probe), dataset, "
            "columns and, of classes, templates; see hf_modx.evaluation.load_tests."
        },
    )
    union_test: bool = field(default=False, metadata={"help": "Also test on the pairs of all tests in one gallery."})
    replay_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Old or public pairs in the columns of the data, for recipes that replay: the memory starts with "
            'them. Bounds are the recipe\'s: \'{"memory_size": 5000, "batch_share": 0.25}\'.'
        },
    )
    replay_split: str = field(default="train", metadata={"help": "Split of replay_dataset: train[:10000]"})
    demo_stream: str | None = field(
        default=None,
        metadata={
            "help": "Which built-in stream: the same concepts in new renderings (domain, the default), new groups of "
            "concepts (class) or random ones (instance).",
            "choices": DEMO_STREAMS,  # as it stands when a command is read: the study adds one
        },
    )
    demo_validation: bool = field(
        default=False,
        metadata={"help": "The built-in stream for choosing options: two phases, tests that are no final ones."},
    )
    base_max_steps: int = field(
        default=BASE_MAX_STEPS, metadata={"help": "Steps of the small CLIP before the first phase."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print phases, sizes and steps; train nothing."})

    def __post_init__(self):
        try:
            self.recipe_options = json.loads(self.recipe_args)
        except json.JSONDecodeError as error:
            raise ValueError(f"--recipe_args must be JSON like '{{\"alpha\": 20}}': {error}") from error
        if not isinstance(self.recipe_options, dict):
            raise ValueError("--recipe_args must be a JSON object like '{\"alpha\": 20}'.")
        self.recipe = parts_of(self.recipe)
        if self.dataset_name is None and self.model_name_or_path is None:
            self.recipe, self.recipe_options = suited_to_demo(self.recipe, self.recipe_options)
        if self.protocol is not None and self.data_root is not None:
            for name in {"images", "texts"} & set(self.recipe_options):
                self.recipe_options[name] = source_of(self.recipe_options[name], self.data_root)
        callbacks = build_recipe(self.recipe, **self.recipe_options)  # tells what is wrong while the user still looks
        if self.replay_dataset is not None and replay_of(callbacks) is None:
            raise ValueError(f"--replay_dataset needs a recipe that replays: --recipe {recipe_name(self.recipe)}+er")
        if self.replay_dataset is not None and self.model_name_or_path is None:
            raise ValueError("--replay_dataset needs --model_name_or_path: the built-in stream replays its own base.")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.phase_column is not None or self.num_phases is not None:
            for name in ("phase_splits", "test_splits"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} does not go with --phase_column or --num_phases.")
        elif self.dataset_split is not None:
            raise ValueError("--dataset_split, which is cut into phases, needs --phase_column or --num_phases.")
        if self.protocol is not None and self.dataset_name is not None:
            raise ValueError("--protocol has data of its own and does not go with --dataset_name.")
        if self.from_scratch and self.model_name_or_path is None:
            raise ValueError("--from_scratch needs --model_name_or_path, the model whose architecture is meant.")
        if self.data_root is not None and self.protocol is None:
            raise ValueError("--data_root needs --protocol.")
        others = self.dataset_name is not None or self.protocol is not None
        if others and (self.demo_stream is not None or self.demo_validation):
            raise ValueError("--demo_stream and --demo_validation do not go with --dataset_name or --protocol.")
        if self.dataset_name is None:
            for name in ("phase_column", "num_phases", "phase_splits", "test_splits"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} needs --dataset_name: the built-in stream has phases of its own.")


def parts_of(recipe: list[str]) -> str | list:
    """A name as it stands; of several parts each a name or, in JSON, a mapping to its options."""
    parts = [json.loads(part) if part.startswith("{") else part for part in recipe]
    return parts[0] if len(parts) == 1 and isinstance(parts[0], str) else parts


def suited_to_demo(recipe: str | list, options: dict) -> tuple[str | list, dict]:
    """A recipe and its options, with those that suit the built-in data where none are given."""
    if not isinstance(recipe, str):
        parts = [{part: None} if isinstance(part, str) else part for part in recipe]
        return [with_demo_options(part, part) for part in parts], options
    names = recipe_name(recipe).split("+")
    if len(names) == 1 and not isinstance(options.get(names[0]), dict):
        return recipe, {**DEMO_RECIPE_ARGS.get(names[0], {}), **options}
    return recipe, with_demo_options(options, names)


def with_demo_options(options: dict, names: Iterable[str]) -> dict:
    """Options by part; what is no mapping is left for `build_recipe` to refuse."""
    suited = {name: DEMO_RECIPE_ARGS[name] for name in names if name in DEMO_RECIPE_ARGS}
    given = {name: options.get(name) or {} for name in suited}
    return options | {
        name: {**suited[name], **of_part} for name, of_part in given.items() if isinstance(of_part, dict)
    }


def main(argv: list[str]) -> EvaluationMatrix | None:
    script, args = parse_arguments((ScriptArguments, ModXTrainingArguments), argv, defaults)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hf_modx").setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)
    use_all_cores(args)
    check_teachers(script.recipe, build_recipe(script.recipe, **script.recipe_options), args.teacher)
    stream, tests = load_stream(script, args)
    if script.tests is not None:
        further = load_tests(script.tests)
        if repeated := sorted(set(tests) & set(further)):
            raise SystemExit(f"{script.tests}: the protocol has tests of the names {', '.join(repeated)} already.")
        tests |= further
    tests |= load_retention_tests(args, [*stream.tests(), *tests])
    if script.dry_run:
        if args.process_index == 0:
            print(plan(stream, script, args))
        return None
    if script.model_name_or_path is None and stream.base is None:
        raise SystemExit("Give --model_name_or_path with your own data: the small CLIP is for the built-in one.")
    run = ContinualRun(
        stream,
        script.recipe,
        args,
        **start_model(script, args),
        recipe_args=script.recipe_options,
        base_max_steps=script.base_max_steps,
        tests=tests,
    )
    unpublished = None
    try:
        matrix = run.run()
    except UnpublishedPhases as error:
        unpublished, matrix = error, run.matrix()
    if args.process_index == 0:
        print(report(run, matrix))
        if unpublished is not None:
            print(unpublished, file=sys.stderr)
    if unpublished is not None:
        raise SystemExit(UNPUBLISHED)
    return matrix


def start_model(script: ScriptArguments, args: ModXTrainingArguments) -> dict:
    """The arguments of `ContinualRun` that say what the run starts from."""
    name, revision = script.model_name_or_path, script.model_revision
    if not script.from_scratch:
        return {"model": name, "revision": revision}
    set_seed(args.seed)
    model = AutoModel.from_config(AutoConfig.from_pretrained(name, revision=revision), dtype=torch.float32)
    return {"model": model, "processing_class": AutoProcessor.from_pretrained(name, revision=revision)}


def use_all_cores(args: ModXTrainingArguments) -> None:
    """`accelerate launch` gives a process one thread unless told otherwise; alone on a CPU it may have all cores."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if args.device.type == "cpu" and args.world_size == 1 and launched:
        torch.set_num_threads(os.cpu_count() or 1)


def defaults(chosen, given: set[str]) -> dict:
    """The output folder names the recipe and the seed; the small CLIP has settings that suit the built-in data, and a
    recipe those that belong to its method."""
    if chosen.protocol is not None:
        return protocol_defaults(chosen, given)
    recipe = parts_of(chosen.recipe)
    settings = {"output_dir": f"runs/{recipe_name(recipe)}-seed{chosen.seed}"}
    if chosen.dataset_name is None and chosen.model_name_or_path is None:
        settings |= DEMO_DEFAULTS
    return settings | method_defaults(recipe, given)


def method_defaults(recipe: str | list, given: set[str]) -> dict:
    """What belongs to the methods of a recipe; of the two ways to set the text tower's learning rate that given."""
    settings = recipe_arguments(recipe)
    if "text_learning_rate" in given:
        settings.pop("text_learning_rate_factor", None)
    return settings


def protocol_defaults(chosen, given: set[str]) -> dict:
    """The settings of the protocol; another recipe than its own has options of its own."""
    settings = dict(read_protocol(chosen.protocol).settings)
    own, options = [settings.pop("recipe", "modx")], json.dumps(settings.pop("recipe_args", {}))
    recipe = chosen.recipe if "recipe" in given else own
    if recipe == own:
        settings["recipe_args"] = options
    of_method = method_defaults(parts_of(recipe), given | set(settings))
    name = f"{Path(chosen.protocol).stem}-{recipe_name(parts_of(recipe))}-seed{chosen.seed}"
    return {"output_dir": f"runs/{name}", "recipe": recipe, **of_method, **settings}


def load_stream(script: ScriptArguments, args: ModXTrainingArguments) -> tuple[PhaseStream, dict[str, EvaluationTest]]:
    """The phases, and the tests beside them."""
    tests: dict[str, EvaluationTest] = {}
    if script.protocol is not None:
        columns = {name: getattr(args, name) for name in ("image_column", "caption_column", "pair_id_column")}
        stream, tests = read_protocol(script.protocol).load(script.data_root, **columns)
    elif script.dataset_name is None:
        stream = DEMO_STREAMS[script.demo_stream or "domain"](args.seed, validation=script.demo_validation)
    else:
        stream = published_stream(script)
        if stream is None:
            data = load_splits(script.dataset_name, script.dataset_config_name, args.image_column)
            stream = cut_into_phases(data, script, args.seed)

    def limited(name: str, part: Dataset) -> Dataset:
        limit = script.max_eval_samples if name.endswith("(test)") else script.max_train_samples
        return at_most(part, limit, args.seed)

    stream = stream.map_parts(limited)
    if script.replay_dataset is not None:
        columns = {name: getattr(args, name) for name in ("image_column", "caption_column", "pair_id_column")}
        stream = stream.with_replay(load_table(script.replay_dataset, script.replay_split), **columns)
    return stream.with_union_test() if script.union_test else stream, tests


def published_stream(script: ScriptArguments) -> PhaseStream | None:
    """What `PhaseStream.push_to_hub` has published under this name, unless other phases are asked for."""
    asked = (script.dataset_config_name, script.phase_column, script.num_phases, script.phase_splits)
    others = any(value is not None for value in asked)
    if others or not is_hub_id(script.dataset_name):
        return None
    if datasets.config.HF_HUB_OFFLINE:
        if is_cached_stream(script.dataset_name):
            raise SystemExit(
                f"{script.dataset_name} is a stream of phases, and which split is what is asked of the Hub. Start "
                "without HF_HUB_OFFLINE, or name the splits: --phase_splits, --test_splits."
            )
        return None
    try:
        return PhaseStream.from_hub(script.dataset_name)
    except NotAStream:
        return None


def cut_into_phases(data: DatasetDict, script: ScriptArguments, seed: int) -> PhaseStream:
    fraction = script.test_fraction
    if script.phase_column is None and script.num_phases is None:
        return PhaseStream.from_splits(data, names(script.phase_splits), names(script.test_splits), fraction, seed)
    split = script.dataset_split or ("train" if "train" in data or len(data) > 1 else next(iter(data)))
    if split not in data and script.dataset_split is None:
        raise SystemExit(f"Say with --dataset_split which split is cut into phases: {', '.join(data)}.")
    if split not in data:
        raise SystemExit(f"There is no split {split!r}. The splits are: {', '.join(data)}.")
    if script.phase_column is None:
        return PhaseStream.random(data[split], script.num_phases, seed, test_fraction=fraction)
    if script.num_phases is None:
        return PhaseStream.from_column(data[split], script.phase_column, test_fraction=fraction, seed=seed)
    return PhaseStream.from_time(
        data[split], script.phase_column, script.num_phases, test_fraction=fraction, seed=seed
    )


def names(listed: str | None) -> list[str] | None:
    return None if listed is None else [name.strip() for name in listed.split(",")]


def plan(stream: PhaseStream, script: ScriptArguments, args: ModXTrainingArguments) -> str:
    lines = [f"Recipe {recipe_name(script.recipe)}, {args.contrastive_batch_size} pairs a step"]
    callbacks = build_recipe(script.recipe, **script.recipe_options)
    before = 0
    for number, phase in enumerate(stream.all_phases(), start=0 if stream.base else 1):
        if number == 0:
            steps = script.base_max_steps if script.model_name_or_path is None else 0
        else:
            steps = args.phase_steps(len(phase.train)) if all(callback.trains for callback in callbacks) else 0
        if number > 0 and any(callback.starts_from == "base" for callback in callbacks):
            steps = before = before + steps
        test = f"{len(phase.test):,} to test" if phase.test is not None else "no test"
        lines.append(f"phase {number}: {phase.name}, {len(phase.train):,} pairs to learn in {steps:,} steps, {test}")
    return "\n".join(lines)


def report(run: ContinualRun, matrix: EvaluationMatrix) -> str:
    summary = {name: value for name, value in matrix.summary().items() if value is not None}
    headline = f"{metric_name(run.metrics[0])} in percent (bold: the phase that teaches the test)"
    lines = ["", headline, "", matrix.measured().to_markdown()]
    lines += ["", ", ".join(f"{name.replace('_', ' ')} {100 * value:.1f}" for name, value in summary.items())]
    for metric in ("zero_shot_top1", "linear_probe_top1"):
        if metric in run.metrics[1:]:
            lines += ["", f"{metric_name(metric)} in percent", "", run.matrix(metric).measured().to_markdown()]
    lines += [f"Checkpoints: {run.folder}/phase-0 to {run.phase_folder(len(run.stream)).name}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
