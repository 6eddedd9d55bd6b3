"""The old model as a frozen teacher, asked in every step or once a phase."""

from .frozen import ADAPTER, AdapterOffTeacher, Teacher, adapter_is_fresh, embed_in_chunks, teacher_of

__all__ = ["ADAPTER", "AdapterOffTeacher", "Teacher", "adapter_is_fresh", "embed_in_chunks", "teacher_of"]
