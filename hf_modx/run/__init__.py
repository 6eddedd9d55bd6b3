"""The parts of a ContinualRun: what it is, what it tests, what it finds, and where all of it lies on the disk."""
