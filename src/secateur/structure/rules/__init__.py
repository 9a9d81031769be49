"""What each function of torch does to labels: one small function, under `@rule`, in one of these rooms."""

from secateur.structure.rules import arithmetic as arithmetic
from secateur.structure.rules import compose as compose
from secateur.structure.rules import contract as contract
from secateur.structure.rules import move as move
from secateur.structure.rules import norms as norms
