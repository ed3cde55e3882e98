"""Predicts memory, time and communication of a run's step on devices that need not be present."""
