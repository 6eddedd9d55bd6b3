"""What the GPUs used, by the counters of their driver."""

import torch


class EnergyMeter:
    """The energy that the GPUs of this process's machine took since the meter was made, by NVML's counters: of the
    boards alone, idle power included, whatever else ran on them, without processor and cooling.

    Without `nvidia-ml-py`, without a GPU, or with one that does not count (before Volta), nothing is known.
    """

    def __init__(self):
        self._start = _counted_joules()

    def joules(self) -> float | None:
        """So far; None where it is not known."""
        now = _counted_joules()
        return None if self._start is None or now is None else now - self._start


def _counted_joules() -> float | None:
    """Since the driver was loaded, of all GPUs that CUDA may use."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuids = [torch.cuda.get_device_properties(device).uuid for device in range(torch.cuda.device_count())]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000
    except pynvml.NVMLError:
        return None
