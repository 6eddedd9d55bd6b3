"""A small continual run that sends itself a signal, SIGKILL or that of KILL_WITH, in the phase that KILL_IN_PHASE
names."""

import os
import signal
import sys

from transformers import TrainerCallback

from hf_modx import ContinualRun, ModXTrainingArguments

from test_continual import make_stream
from tiny import tiny_clip, tiny_processor


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(f"phase-{os.environ.get('KILL_IN_PHASE')}"):
            os.kill(os.getpid(), getattr(signal, os.environ.get("KILL_WITH", "SIGKILL")))


args = ModXTrainingArguments(
    output_dir=sys.argv[1],
    per_device_train_batch_size=8,
    max_steps=3,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
processor = tiny_processor()
run = ContinualRun(
    make_stream(), "modx", args, model=tiny_clip(processor), processing_class=processor, callbacks=[Kill()]
)
run.run()
