"""What a few batches of data tell of a model, without training it."""

from secateur.calibration.batch_norms import recalibrate as recalibrate

__all__ = ["recalibrate"]
