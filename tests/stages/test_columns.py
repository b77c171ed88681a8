"""What is told of columns."""

from itertools import product

from stages.columns import VaeConfig


def test_every_way_to_compute_is_recorded_as_another() -> None:
    ways = [VaeConfig("tiny", 8, False, *way) for way in product(("fp32", "bf16"), (False, True), (False, True))]
    assert len({way.compute for way in ways}) == len(ways)
    assert VaeConfig().compute == "fp32"  # what datasets that know of no other way have
