"""Really smaller shapes: the same model with fewer units, proven equal to the masked original.

`sc.shrink` gives the smaller model; `propose` gives the plan: what goes, as plain data, and what holds the rest.
"""

from secateur.structure.allocation import ALLOCATIONS as ALLOCATIONS
from secateur.structure.allocation import allocation as allocation
from secateur.structure.capture import table as table
from secateur.structure.criteria import CRITERIA as CRITERIA
from secateur.structure.criteria import activation as activation
from secateur.structure.criteria import criterion as criterion
from secateur.structure.criteria import of_units as of_units
from secateur.structure.options import Options as Options
from secateur.structure.plan import Plan as Plan
from secateur.structure.shrink import propose as propose
from secateur.structure.shrink import shrink as shrink
