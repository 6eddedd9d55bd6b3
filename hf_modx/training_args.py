"""Arguments of one phase of training."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


@dataclass
class ModXTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what image-caption pairs and two towers need.

    Steps and epochs are per phase. The defaults of the optimizer are those of the Mod-X code (AdamW, weight decay 0.1,
    20 % linear warm-up, cosine), except the learning rate, which suits a pretrained start of a few epochs. What is
    pushed to the Hub is private unless `hub_private_repo` is False, and the token is in no pickle of the arguments.

    Raises:
        ValueError: a value out of its range, named with the remedy; those of the retention budget where a run is made.
    """

    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    caption_column: str = field(
        default="caption", metadata={"help": "Column of the captions: strings, or lists of strings."}
    )
    pair_id_column: str = field(
        default="pair_id",
        metadata={
            "help": "Integer column, used where the data has it: rows of one id (the same product or concept) belong "
            "together, in the loss, in screening and in the tests."
        },
    )
    same_pair_id: str = field(
        default="positive",
        metadata={
            "help": "What two rows that belong together are to each other in the loss: 'positive': each is a right "
            "answer, and the target is shared out equally; 'neutral': neither right nor wrong, they are left out.",
            "choices": ["positive", "neutral"],
        },
    )
    pairs_in_batch: str = field(
        default="any",
        metadata={
            "help": "New rows that belong together: 'apart' in different batches, 'together' in one, as far as sizes "
            "permit, or 'any' where chance puts them. Replayed rows are drawn at random always.",
            "choices": ["any", "apart", "together"],
        },
    )
    mask_duplicates: bool = field(
        default=False,
        metadata={
            "help": "Pairs that drew the same caption belong together as pairs of one pair_id do, on whatever process "
            "they are: no negatives of each other, and what same_pair_id says."
        },
    )
    gradient_cache_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs that a process holds activations of at once. The batches of one optimizer step "
            "(per_device_train_batch_size x gradient_accumulation_steps on each process) then form ONE contrastive "
            "batch, at the price of a second forward pass."
        },
    )
    teacher: str = field(
        default="previous",
        metadata={
            "help": "Which old model ContinualRun gives the recipe to keep to: 'previous', the one that the phase "
            "starts from, or 'initial', in every phase the one that the run began with (phase-0, which must stay in "
            "output_dir). It concerns terms on embeddings, as those of modx, lwf, anchor and cclip, and none on "
            "weights.",
            "choices": ["previous", "initial"],
        },
    )
    teacher_cache: str = field(
        default="auto",
        metadata={
            "help": "Embed each training image and caption with the old model once a phase and look them up. 'memory' "
            "or 'disk' says where, 'off' runs the old model in every step, 'auto' decides: off where images are "
            "augmented or a phase sees too few of its pairs, else memory up to 1 GiB.",
            "choices": ["auto", "memory", "disk", "off"],
        },
    )
    image_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which ContinualRun keeps every image as the processor resizes and crops it, 3 x height "
            "x width bytes each; training then only rescales and normalises. Can be shared by runs."
        },
    )
    bad_samples: str = field(
        default="error",
        metadata={
            "help": "What ContinualRun does with images that cannot be decoded, captions that are missing or empty "
            "and training images that are also in a test of pairs: 'error' refuses to start and names them, 'skip' "
            "leaves them out and counts them in results.json.",
            "choices": ["error", "skip"],
        },
    )
    image_augmentation: str = field(
        default="none",
        metadata={
            "help": "'affine_color': random rotation, scale, shift and colour of training images.",
            "choices": ["none", "affine_color"],
        },
    )
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the text tower and its projection; default: learning_rate."}
    )
    text_learning_rate_factor: float | None = field(
        default=None, metadata={"help": "The same as a multiple of learning_rate, for instance 10."}
    )
    freeze_vision_model: bool = field(
        default=False, metadata={"help": "Do not train the vision tower; a projection behind it is trained."}
    )
    freeze_text_model: bool = field(
        default=False, metadata={"help": "Do not train the text tower; a projection behind it is trained."}
    )
    decay_logit_scale: bool = field(
        default=False,
        metadata={"help": "Apply weight decay to logit_scale too, as the authors' code and the stock Trainer do."},
    )
    dataloader_timeout: int = field(
        default=0,
        metadata={
            "help": "Seconds that a worker of the data loader may take for a batch. Where one takes longer, as with a "
            "disk that does not answer, new ones read the batch again, up to twice. 0 waits for ever."
        },
    )
    max_logit_scale: float = field(
        default=100.0,
        metadata={
            "help": "The factor on the cosines is clamped to [1, this] after every step; not where it is not trained "
            "or the model has a sigmoid loss."
        },
    )

    peft: str | None = field(
        default=None,
        metadata={
            "help": "'lora': a phase trains a fresh low-rank adapter, all else is frozen. The teacher is the model "
            "with the adapter off, and takes no memory; with teacher 'initial' that is so in the first phase only.",
            "choices": ["lora"],
        },
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter of a phase."})
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "An adapter's change is multiplied by lora_alpha / lora_rank. Default: 2 lora_rank."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on what goes into the adapter, in [0, 1)."})
    lora_targets: str | None = field(
        default=None,
        metadata={
            "help": "Linear layers that get an adapter, by the end of their names: q_proj,v_proj. Default: all in the "
            "two towers, not the projections beside them."
        },
    )
    lora_merge: bool = field(
        default=True,
        metadata={
            "help": "Merge the adapter at the end of a phase: ContinualRun leaves a plain model. False leaves one "
            "adapter of the model before the first phase, which holds all phases up to this one and loads with "
            "PeftModel.from_pretrained."
        },
    )
    train_logit_scale: bool = field(default=False, metadata={"help": "With peft: train the logit scale beside it."})

    spatial_disorder: bool = field(
        default=True,
        metadata={
            "help": "ContinualRun compares the tests' embeddings after a phase with those before it and at the start: "
            "changes of angles, rotations of the modalities."
        },
    )
    imav_samples: int = field(
        default=0,
        metadata={
            "help": "With spatial_disorder: embed so many training pairs of the earlier phase too, to see how the "
            "angle between image and caption has changed."
        },
    )
    cross_phase: bool = field(
        default=False,
        metadata={
            "help": "ContinualRun also measures retrieval across phases: each test's images and captions stay indexed "
            "by the model that has just learned it, and later models ask that index."
        },
    )
    max_forgetting: float | None = field(
        default=None,
        metadata={
            "help": "The retention budget of ContinualRun: the mean score on the old tests after a phase is at least "
            "(1 - this) times what it was before it. 0.1: at most a tenth is forgotten, in every phase."
        },
    )
    on_forgetting: str = field(
        default="interpolate",
        metadata={
            "help": "How a phase keeps the budget: 'stop' ends it where it is broken, 'restore' goes back to the "
            "newest weights within it, 'interpolate' moves the weights towards those before the phase, to its edge.",
            "choices": ["stop", "restore", "interpolate"],
        },
    )
    retention_dataset: str | None = field(
        default=None,
        metadata={
            "help": "With max_forgetting: the tests it is about, comma-separated; in examples/continual_clip.py also "
            "data sets (their split test, or the only one). Default: the tests of what was learned before the phase."
        },
    )
    retention_steps: float = field(
        default=0.1,
        metadata={"help": "With max_forgetting: steps between two looks at the old tests, below 1 a share of all."},
    )
    retention_metric: str | None = field(
        default=None,
        metadata={
            "help": "With max_forgetting: the score, for instance image_to_text_mrr. Default: "
            "image_to_text_recall@1, and the first metric of tests of labels."
        },
    )
    resume_from_hub: bool = field(
        default=False,
        metadata={
            "help": "With push_to_hub: where the folder has no checkpoint of the phase that comes next, ContinualRun "
            "goes on from the one that --hub_strategy checkpoint has published."
        },
    )
    hub_collection: str | None = field(
        default=None,
        metadata={
            "help": "With push_to_hub: title of the collection that gets the repository and the stream's data sets."
        },
    )

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of the optimizer."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of matrices."})
    warmup_steps: float = field(
        default=0.2, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of all steps."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate scheduler."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Training pairs a process. Negatives come from the batches of all processes."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images or captions embedded at once."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept inside a phase."})
    dataloader_drop_last: bool = field(
        default=True,
        metadata={
            "help": "Drop the last, smaller contrastive batch of an epoch. Ignored where a phase is smaller than one."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept False: images are read from columns."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "As in TrainingArguments."})

    def __post_init__(self):
        super().__post_init__()
        if self.bad_samples not in ("error", "skip"):
            raise ValueError(f"bad_samples must be 'error' or 'skip', got {self.bad_samples!r}.")
        if self.same_pair_id not in ("positive", "neutral"):
            raise ValueError(f"same_pair_id must be 'positive' or 'neutral', got {self.same_pair_id!r}.")
        if self.pairs_in_batch not in ("any", "apart", "together"):
            raise ValueError(f"pairs_in_batch must be 'any', 'apart' or 'together', got {self.pairs_in_batch!r}.")
        if self.imav_samples < 0 or (self.imav_samples and not self.spatial_disorder):
            raise ValueError(f"imav_samples must be at least 0 and needs spatial_disorder, got {self.imav_samples}.")
        if self.retention_dataset is not None and self.max_forgetting is None:
            raise ValueError("retention_dataset needs a budget: give max_forgetting.")
        if self.hub_private_repo is None:
            self.hub_private_repo = True
        for name in ("resume_from_hub", "hub_collection"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"{name} needs push_to_hub.")
        if self.image_augmentation not in ("none", "affine_color"):
            raise ValueError(f"image_augmentation must be 'none' or 'affine_color', got {self.image_augmentation!r}.")
        if self.teacher not in ("previous", "initial"):
            raise ValueError(f"teacher must be 'previous' or 'initial', got {self.teacher!r}.")
        if self.teacher_cache not in ("auto", "memory", "disk", "off"):
            raise ValueError(f"teacher_cache must be 'auto', 'memory', 'disk' or 'off', got {self.teacher_cache!r}.")
        if self.teacher_cache in ("memory", "disk") and self.image_augmentation != "none":
            raise ValueError(
                f"teacher_cache={self.teacher_cache!r} needs images that are the same every time. Leave out "
                f"image_augmentation={self.image_augmentation!r}, or set teacher_cache='off'."
            )
        if self.gradient_cache_chunk_size is not None and self.gradient_cache_chunk_size < 1:
            raise ValueError(f"gradient_cache_chunk_size must be at least 1, got {self.gradient_cache_chunk_size}.")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size would train with other contrastive batches than it is told, and other results. "
                "Leave it out: gradient_cache_chunk_size bounds memory and changes nothing else."
            )
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} has no effect: pairs come in an order that "
                "is random, of data_seed and the epoch. Leave it out; pairs_in_batch says which may share a batch."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor has no effect on a contrastive loss. Classes are smoothed by an argument of "
                "the recipe: label_smoothing of zscl with classes."
            )
        if self.dataloader_timeout < 0:
            raise ValueError(f"dataloader_timeout must be at least 0 seconds, got {self.dataloader_timeout}.")
        if not self.max_logit_scale >= 1:
            raise ValueError(f"max_logit_scale must be at least 1, got {self.max_logit_scale}.")
        if self.text_learning_rate is not None and self.text_learning_rate_factor is not None:
            raise ValueError("Give text_learning_rate or text_learning_rate_factor, not both.")
        if self.text_learning_rate_factor is not None and not self.text_learning_rate_factor > 0:
            raise ValueError(f"text_learning_rate_factor must be positive, got {self.text_learning_rate_factor}.")
        self._check_peft()

    def _check_peft(self) -> None:
        if self.peft not in (None, "lora"):
            raise ValueError(f"peft must be 'lora' or left out, got {self.peft!r}.")
        if self.train_logit_scale and self.peft is None:
            raise ValueError("train_logit_scale is for peft='lora': without an adapter the logit scale is trained.")
        if self.train_logit_scale and not self.lora_merge:
            raise ValueError("An adapter holds no logit scale: train_logit_scale needs lora_merge.")
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}.")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}.")

    def __getstate__(self) -> dict[str, Any]:
        # The stock Trainer pickles its arguments beside every model, and pushes them with it.
        return {**self.__dict__, "hub_token": None}

    def __copy__(self) -> "ModXTrainingArguments":
        same = object.__new__(type(self))
        same.__dict__.update(self.__dict__)
        return same

    @property
    def max_log_logit_scale(self) -> float:
        """The bound on the `logit_scale` parameter itself, which is a logarithm."""
        return math.log(self.max_logit_scale)

    @property
    def learning_rate_of_text(self) -> float | None:
        """Of the text tower and its projection, where it is another one."""
        if self.text_learning_rate_factor is None:
            return self.text_learning_rate
        return self.text_learning_rate_factor * self.learning_rate

    @property
    def effective_data_seed(self) -> int:
        """`data_seed`, or `seed` where there is none."""
        return self.data_seed if self.data_seed is not None else self.seed

    @property
    def pair_columns(self) -> list[str]:
        """The columns of images, of captions and of pair ids."""
        return [self.image_column, self.caption_column, self.pair_id_column]

    @property
    def total_batch_size(self) -> int:
        """Pairs of one optimizer step, on all processes."""
        return self.train_batch_size * self.world_size * self.gradient_accumulation_steps

    @property
    def batches_held(self) -> int:
        """Batches in a row that form one contrastive batch."""
        return 1 if self.gradient_cache_chunk_size is None else self.gradient_accumulation_steps

    @property
    def contrastive_batch_size(self) -> int:
        """Pairs that see each other as negatives in one step: the batches of all processes, and with the gradient
        cache those of all accumulation steps."""
        return self.train_batch_size * self.world_size * self.batches_held

    def phase_steps(self, num_pairs: int) -> int:
        """Optimizer steps of a phase with so many training pairs."""
        if self.max_steps > 0:
            return self.max_steps
        left_over = num_pairs % self.contrastive_batch_size
        if self.dataloader_drop_last and num_pairs > left_over:
            num_pairs -= left_over
        batches = math.ceil(num_pairs / (self.train_batch_size * self.world_size))
        return math.ceil(self.num_train_epochs * math.ceil(batches / self.gradient_accumulation_steps))
