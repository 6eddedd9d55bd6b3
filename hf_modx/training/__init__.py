"""The parts of a training step and of a checkpoint that ModXTrainer puts together."""
