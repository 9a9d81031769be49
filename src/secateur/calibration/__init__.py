"""What a few batches of data, or a metric, tell of a model, without training it."""

from secateur.calibration.batch_norms import recalibrate as recalibrate
from secateur.calibration.by_blocks import Task as Task
from secateur.calibration.by_blocks import prune_by_blocks as prune_by_blocks
from secateur.calibration.choice import choose_allocation as choose_allocation
from secateur.calibration.choice import recommend as recommend
from secateur.calibration.observation import calibrate as calibrate
from secateur.calibration.one_shot import oneshot as oneshot
from secateur.calibration.recover import recover as recover
from secateur.calibration.refitting import refit as refit
from secateur.calibration.sensitivity import scan as scan
from secateur.calibration.statistics import Statistics as Statistics

__all__ = [
    "Statistics",
    "Task",
    "calibrate",
    "choose_allocation",
    "oneshot",
    "prune_by_blocks",
    "recalibrate",
    "recommend",
    "recover",
    "refit",
    "scan",
]
