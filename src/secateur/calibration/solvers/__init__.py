"""Which weights go and what the others become: one solver a file."""

from secateur.calibration.solvers import alps as alps
from secateur.calibration.solvers import magnitude as magnitude
from secateur.calibration.solvers import sparsegpt as sparsegpt
from secateur.calibration.solvers import wanda as wanda
from secateur.calibration.solvers.base import SOLVERS as SOLVERS
