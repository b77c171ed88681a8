"""What can go wrong with weights."""


class WeightsError(Exception):
    """Weights or their config are absent, or belong to another model than the one expected."""
