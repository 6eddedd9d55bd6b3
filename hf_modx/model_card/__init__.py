"""The card of a model, written from the run and never by hand."""

from .card import card_loads, phase_card, phase_config, trainer_card, write_card_of_run, write_phase_card

__all__ = ["card_loads", "phase_card", "phase_config", "trainer_card", "write_card_of_run", "write_phase_card"]
